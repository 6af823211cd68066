"""A user's mistake ends a script with one sentence and an exit status, never a traceback."""
import signal
import sys


class UserError(Exception):
    """One sentence: what is wrong, what was given, what would be right."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM. A script that can go on later puts how to do that into `sentence`."""

    def __init__(self, signum):
        super().__init__()
        self.signum, self.sentence = signum, 'Stopped before there was a result.'


def _stop(signum, frame):
    raise Stopped(signum)


def run(main):
    """Run a script's `main`: exit status 1 after a UserError or OSError, 128 + signal number after SIGINT or SIGTERM."""
    from utils import distributed  # which imports UserError from here

    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            main()
        except (UserError, OSError) as error:  # an OSError, of a full disk or a folder that may not be written to, names the file
            distributed.let_the_first_speak()
            sys.exit(f'error: {error}')
        except RuntimeError as error:
            if not distributed.connection_lost(error):
                raise
            sys.exit('error: another process has ended, so this one does too')
    except Stopped as stop:
        if distributed.is_first():
            print(stop.sentence, file=sys.stderr)
        sys.exit(128 + stop.signum)
    distributed.stop()
