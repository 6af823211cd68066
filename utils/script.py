"""How a script begins and ends: its signals, its exit status, and one sentence instead of a traceback."""
import os
import select
import signal
import sys

import torch

from utils import distributed
from utils.batches import reader_lost
from utils.errors import Stopped, UserError, one_line


def _stop(signum, frame):
    _ignore_signals()  # a second one does not disturb what the first one ends
    raise Stopped(signum)


def _ignore_signals():
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _reader_has_left():
    """Whether nobody reads stdout any more, as where head has seen enough; then Python's own last flush is quiet too.
    """
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        left = any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # it is no file
        return False
    if left:
        sys.stdout = open(os.devnull, 'w')
    return left


def _out_of_memory(error):
    """Whether an exception is the word of Python, NumPy or PyTorch for memory that is not there."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run_script(main):
    """Run a script's `main`: exit status 1 after a UserError or OSError, 128 + signal after SIGINT or SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # what a terminal cannot show never ends a run
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            main()
            sys.stdout.flush()
            distributed.barrier()  # until the first process has written its report
            _ignore_signals()  # nothing is left to stop but the end of Python
            distributed.stop()
        except (UserError, OSError) as error:  # an OSError, of a full disk or a read-only folder, names the file
            distributed.pause_unless_first()
            unread = _reader_has_left() and isinstance(error, BrokenPipeError)
            sys.exit(128 + signal.SIGPIPE if unread else f'error: {error}')
        except (RuntimeError, MemoryError) as error:
            if lost := reader_lost(error):
                sys.exit(f'error: {lost}')
            if _out_of_memory(error):
                sys.exit(f'error: there is not enough memory ({one_line(error)[:200]}); a smaller --train-batch, '
                         '--mini-batch or --test-batch needs less')
            if not distributed.connection_lost(error):
                raise
            sys.exit('error: another process has ended, so this one does too')
    except Stopped as stop:
        if distributed.is_first():
            print(stop.sentence, file=sys.stderr)
        sys.exit(128 + stop.signum)
