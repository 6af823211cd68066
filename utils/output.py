"""The folder that a run writes into: what is in it, and that one run at a time writes there."""
import contextlib
import fcntl
import os
import shutil

from utils import distributed
from utils.errors import UserError
from utils.files import digest, replacing

LAST, BEST, RESULT = 'checkpoint.pth.tar', 'model_best.pth.tar', 'result.json'  # RESULT is there when a run is finished
# All that a run writes into its folder. Other files there are not touched, and do not matter.
RESULTS = (LAST, BEST, 'log.txt', 'log.png', 'log.pdf', 'confusion.csv', 'confusion.png', 'args.json', 'skipped.txt',
           RESULT)

# What measure_margins.py and measure_sharpness.py leave beside a checkpoint, by its name.
MEASURED = {name: [f'{name.removesuffix(".pth.tar")}-{what}.json' for what in ('margins', 'sharpness')]
            for name in (LAST, BEST)}

SECONDS = ('seconds', 'seconds per epoch')  # in RESULT, checked by their sum, so that equal runs have equal check sums

_locks = {}  # real path of a folder -> the descriptor that holds its lock


def results_in(folder):
    """The names of the files in `folder` that a run has written."""
    return [name for name in RESULTS if os.path.exists(os.path.join(folder, name))]


def never_saved(folder):
    """Whether a run began in `folder` and was killed before its first checkpoint."""
    found = results_in(folder)
    return 'args.json' in found and set(found) <= {'args.json', 'log.txt'}


def check_sums(result, log):
    """What RESULT has as 'check sums', for compare.py. result: what it holds. log: the words of each line."""
    timeless = {name: value for name, value in result.items() if name not in ('check sums', *SECONDS)}
    return {'log.txt': digest([line[:-1] for line in log]), RESULT: digest(timeless)}


def snapshot(folder):
    """What tells whether a run has written into `folder` since: each result's inode, size and time of writing."""
    found = {}
    for name in RESULTS:
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(folder, name))
            found[name] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def claim(args):
    """Make the run's folder if it is not there, and lock it for the life of this process.

    UserError if another run writes there now or has since the command line was read, or if this one would overwrite a
    run that it does not resume.
    """
    folder, resume = args.checkpoint, args.resume
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'--checkpoint {folder} cannot be used as a folder ({error.strerror})') from error
    if not os.access(folder, os.W_OK):
        raise UserError(f'--checkpoint {folder} may not be written to')
    if distributed.is_first():
        _lock(folder)
        if snapshot(folder) != args.found:
            raise UserError(f'another run has just written to --checkpoint {folder}; start this one again, or use '
                            'another --checkpoint')
    occupied = results_in(folder)
    if args.overwrite or not occupied:
        return
    if not _is_in(folder, resume):
        known = f'--resume {os.path.join(folder, LAST)}, ' if LAST in occupied else ''
        raise UserError(f'--checkpoint {folder} is not empty; use {known}--overwrite, or another --checkpoint')
    if os.path.basename(resume) != LAST:
        raise UserError(f'--resume {resume} would resume in its own folder and replace {LAST} there; '
                        'use another --checkpoint, or --overwrite')


def _lock(folder):
    """Lock `folder` itself, without a file in it; the system frees the lock when this process ends, however it ends."""
    path = os.path.realpath(folder)
    release(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f'another run is writing to --checkpoint {folder}; wait for its end, or use another '
                        '--checkpoint') from error
    except OSError as error:  # some network file systems lock no folders
        print(f'--checkpoint {folder} cannot be locked ({error.strerror}); no other run may write there meanwhile')
    _locks[path] = descriptor


def release(folder):
    """Free the lock of `folder`, if this process holds it."""
    descriptor = _locks.pop(os.path.realpath(folder), None)
    if descriptor is not None:
        os.close(descriptor)


def _forget_locks():
    for descriptor in _locks.values():
        os.close(descriptor)
    _locks.clear()


# The processes that read images outlive a killed run by seconds; the lock must not.
os.register_at_fork(after_in_child=_forget_locks)


def enter(args, finished, without_best=False):
    """The first writing to the folder: drop what is to be overwritten, copy the best epoch of a run resumed from
    elsewhere.

    finished: nothing is left to train, so that the result of a run that resumes in its folder stays until there is
    another. without_best: the best epoch that is there is not one of the run that goes on.
    """
    folder, resume = args.checkpoint, args.resume
    resumes_here = _is_in(folder, resume)
    replaced = [*RESULTS, *MEASURED[LAST], *MEASURED[BEST]] if args.overwrite else []
    for name in [RESULT] * (not finished) + [BEST] * without_best if resumes_here else replaced:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    best = os.path.join(os.path.dirname(resume), BEST) if resume and not (resumes_here or without_best) else ''
    if os.path.exists(best):
        with replacing(os.path.join(folder, BEST)) as temporary:
            shutil.copyfile(best, temporary)


def _is_in(folder, path):
    return bool(path) and os.path.samefile(os.path.dirname(path) or '.', folder)
