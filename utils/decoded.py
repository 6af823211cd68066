"""Images of a folder, decoded, kept beside the data: decoding JPEG files takes longer than training on a tenth of them.
"""
import contextlib
import os
import zipfile

import numpy as np

from utils.files import NotWritten, alone, not_written, replacing

FOLDER = '.decoded'  # below the data


def kept(root, name, key, decode):
    """The uint8 array that decode() gives, read from DATA/.decoded/NAME.npz if that is whole and was written for `key`.

    Otherwise it is decoded and written, replacing what was there. Of several runs at once one decodes, and the others
    wait for it. Where nothing can be written the run goes on without, and says so.
    """
    path = os.path.join(root, FOLDER, f'{name}.npz')
    images = _read(path, key)
    if images is None:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)  # for the lock too
        with alone(path):
            images = _read(path, key)  # which another run may have written meanwhile
            if images is None:
                images = decode()
                _write(path, key, images)
    return images


def _read(path, key):
    """The array in the file, or None if it is missing, damaged (the file has check sums), or of another key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file['images'] if file['key'].item() == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path, key, images):
    """Write the file, or say why that is refused."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path, images.nbytes) as temporary, open(temporary, 'wb') as file:
            np.savez(file, images=images, key=key)
    except (NotWritten, OSError) as error:
        print(f'the decoded images are not kept, as {not_written(path, error) or error}')
