"""The folder that a run writes into: what is in it, and that one run at a time writes there."""
import contextlib
import errno
import fcntl
import os
import shutil

from utils import distributed
from utils.errors import UserError
from utils.files import replacing

LAST, BEST, RESULT = 'checkpoint.pth.tar', 'model_best.pth.tar', 'result.json'  # RESULT is there when a run is finished
# All that a run writes into its folder. Other files there are not touched, and do not matter.
RESULTS = (LAST, BEST, 'log.txt', 'log.png', 'log.pdf', 'confusion.csv', 'confusion.png', 'args.json', 'skipped.txt',
           RESULT)
LOCK = '.lock'

_locks = {}  # real path of a folder -> the open file whose lock this process holds until it ends


def results_in(folder):
    """The names of the files in `folder` that a run has written."""
    return [name for name in RESULTS if os.path.exists(os.path.join(folder, name))]


def never_saved(folder):
    """Whether a run began in `folder` and was killed before its first checkpoint."""
    found = results_in(folder)
    return 'args.json' in found and set(found) <= {'args.json', 'log.txt'}


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
    """Lock `folder`; the system frees the lock when this process ends, however it ends.

    A lock of this kind is not inherited by the processes that read images, which outlive a killed run by seconds.
    """
    path = os.path.realpath(folder)
    if path in _locks:  # closing a second file would free the lock of the first
        return
    file = open(os.path.join(path, LOCK), 'a')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UserError(f'another run is writing to --checkpoint {folder}; wait for its end, or use another '
                            '--checkpoint') from error
        print(f'--checkpoint {folder} is on a file system without locks ({error.strerror}); no other run may write '
              'there meanwhile')
    _locks[path] = file


def enter(args, finished):
    """The first writing to the folder: drop what is to be overwritten, copy the best epoch of a run resumed from
    elsewhere.

    finished: nothing is left to train, so that the result of a run that resumes in its folder stays until there is
    another.
    """
    folder, resume = args.checkpoint, args.resume
    resumes_here = _is_in(folder, resume)
    for name in [RESULT] * (not finished) if resumes_here else RESULTS if args.overwrite else []:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    best = os.path.join(os.path.dirname(resume), BEST) if resume and not resumes_here else ''
    if os.path.exists(best):
        with replacing(os.path.join(folder, BEST)) as temporary:
            shutil.copyfile(best, temporary)


def _is_in(folder, path):
    return bool(path) and os.path.samefile(os.path.dirname(path) or '.', folder)
