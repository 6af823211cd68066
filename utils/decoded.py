"""Images of a folder, decoded, kept beside the data: decoding JPEG files takes longer than training on a tenth of them.
"""
import contextlib
import fcntl
import os
import zipfile

import numpy as np

from utils.files import NotWritten, replacing

FOLDER = '.decoded'  # below the data


def kept(root, name, key, decode):
    """The uint8 array that decode() gives, read from DATA/.decoded/NAME.npz if that is whole and was written for `key`.

    Otherwise it is decoded and written, replacing what was there. Of several runs at once one decodes, and the others
    wait for it. Where nothing can be written the run goes on without, and says so.
    """
    path = os.path.join(root, FOLDER, f'{name}.npz')
    images = _read(path, key)
    if images is None:
        with _alone(os.path.join(root, FOLDER)) as refused:
            images = _read(path, key)  # which another run may have written meanwhile
            if images is None:
                images = decode()
                refused = refused or _written(path, key, images)
        if refused:
            print(f'the decoded images are not kept, as {refused}')
    return images


def _read(path, key):
    """The array in the file, or None if it is missing, damaged (the file has check sums), or of another key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file['images'] if file['key'].item() == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _written(path, key, images):
    """Write the file; the reason in words if that is refused."""
    try:
        with replacing(path, images.nbytes) as temporary, open(temporary, 'wb') as file:
            np.savez(file, images=images, key=key)
    except NotWritten as error:
        return str(error)


@contextlib.contextmanager
def _alone(folder):
    """Gives None while no other run holds `folder`, which is made, or the reason in words why that is impossible."""
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        yield f'{folder} cannot be made ({error.strerror})'
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders; then several runs decode
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield None
    finally:
        os.close(descriptor)
