"""What ends a script with one sentence and an exit status instead of a traceback."""


class UserError(Exception):
    """One sentence: what is wrong, what was given, what would be right. It stays in one line, whatever it quotes."""

    def __str__(self):
        return printable(super().__str__())


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM. A script that can resume puts how to do that into `sentence`."""

    def __init__(self, signum):
        super().__init__()
        self.signum, self.sentence = signum, 'Stopped before there was a result.'


def one_line(error):
    """The text of an exception in one line; its kind if it has none."""
    return ' '.join(str(error).split()) or type(error).__name__


def printable(text):
    """`text` with line breaks, control characters and bytes that are no text written as escapes such as \\n."""
    return ''.join(one if one.isprintable() else one.encode('unicode_escape').decode() for one in text)
