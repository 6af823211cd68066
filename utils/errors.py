"""What ends a script with one sentence and an exit status instead of a traceback."""


class UserError(Exception):
    """One sentence: what is wrong, what was given, what would be right. It stays in one line, whatever it quotes."""

    def __str__(self):
        return shown(super().__str__())


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM. A script that can resume puts how to do that into `sentence`."""

    def __init__(self, signum):
        super().__init__()
        self.signum, self.sentence = signum, 'Stopped before there was a result.'


def one_line(error):
    """The text of an exception in one line; its kind if it has none."""
    if isinstance(getattr(error, 'reason', None), OSError):  # what is inside of `<urlopen error ...>`
        error = error.reason
    return ' '.join(str(error).split()) or type(error).__name__


def shown(text):
    """A name as it can be printed anywhere: in one line, with escapes for control characters and undecoded bytes."""
    if text.isprintable():
        return text
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode() for char in text)
