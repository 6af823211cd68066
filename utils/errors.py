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
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
    except OSError as error:  # a full disk, a folder that may not be written to: the message names the file
        sys.exit(f'error: {error}')
    except Stopped as stop:
        print(stop.sentence, file=sys.stderr)
        sys.exit(128 + stop.signum)
