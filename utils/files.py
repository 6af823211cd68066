"""Files that are either whole or not there, check sums of what is in them, and sentences for a disk that is full."""
import contextlib
import errno
import fcntl
import json
import os
import shutil
import warnings
import zlib

from utils.errors import UserError, shown


class NotWritten(UserError):
    """A file could not be written; what was there before is kept."""


@contextlib.contextmanager
def replacing(path, size=None):
    """Gives a temporary path beside `path`; what was written to it is flushed to disk and takes the place of `path`.

    After an exception, or if the process dies, `path` is what it was before. NotWritten if the system refuses to
    write. size: in bytes, of what will be written, as far as it is known.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f'.unfinished-{name}')
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        _remove(temporary)  # so that the free space that is named is what it was
        raise not_written(path, error, size) or error
    finally:
        _remove(temporary)


@contextlib.contextmanager
def alone(path):
    """While it lasts, no other process is in `alone` with this path: to read a file, add to it and write it again.

    Waits for the other. The lock is a hidden file beside `path`, which is gone afterwards; the system frees the lock
    of a process that dies. Where no such file can be made or locked, nothing is waited for.
    """
    folder, name = os.path.split(path)
    lock = os.path.join(folder, f'.lock-{name}')
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            while not _is_at(lock, held.enter_context(open(lock, 'ab'))):  # another process has removed it
                held.close()
            held.callback(_remove, lock)
        yield


def _is_at(path, file):
    """Lock `file` when it is free; whether it then still is at `path`."""
    fcntl.flock(file, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def not_written(path, error, size=None):
    """A NotWritten if `error`, or what it came from, is the system's refusal to write `path`; otherwise None."""
    cause = error
    while cause and not isinstance(cause, OSError):  # torch.save and Matplotlib raise errors of their own from it
        cause = cause.__context__
    if cause is None or isinstance(error, UserError):
        return None
    words = f'{path} could not be written ({cause.strerror or cause})'
    if size and cause.errno == errno.ENOSPC:
        free = shutil.disk_usage(os.path.dirname(path) or '.').free
        words += f': it needs {megabytes(size)} and {megabytes(free)} are free'
    return NotWritten(words + '; what was there before is kept' * os.path.exists(path))


def megabytes(size):
    """A number of bytes as words."""
    return f'{size / 1e6:.4g} MB' if size < 1e9 else f'{size / 1e9:.4g} GB'


def open_text(path, mode='r', newline=None):
    """A text file in UTF-8 whatever the locale, with the bytes of names that are not UTF-8. newline: '' for csv."""
    return open(path, mode, encoding='utf-8', errors='surrogateescape', newline=newline)


def read_json(path):
    """What a JSON file holds; ValueError if it is not JSON, or nested beyond what Python reads."""
    try:
        with open_text(path) as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{os.path.basename(path)} is not JSON') from error


def write_json(path, value):
    """Pure ASCII, so that everything can read it; names have escapes."""
    text = json.dumps(value, indent=2) + '\n'
    with replacing(path, len(text)) as temporary, open_text(temporary, 'w') as file:
        file.write(text)


def digest(value):
    """A check sum of what JSON can hold, eight hexadecimal digits; the order of keys does not matter."""
    return f'{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}'


def drawn(text):
    """A name as Matplotlib draws it: what is between two $ is no formula, and a legend does not leave out a _."""
    text = shown(text).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def save_figure(figure, *paths, dpi=120):
    """Draw a Matplotlib figure into each file of `paths`, in the format of its ending. Names in it go through `drawn`.
    """
    for path in paths:
        with replacing(path) as temporary, warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph .* missing')  # a letter that the font lacks is drawn as a box
            figure.savefig(temporary, dpi=dpi)
