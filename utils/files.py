"""Files that are either whole or not there."""
import contextlib
import json
import os
import tempfile


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path`; what was written to it is flushed to disk and takes the place of `path`.

    After an exception, or if the process dies, `path` is what it was before.
    """
    root, extension = os.path.splitext(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or '.', prefix=f'.{os.path.basename(root)}-', suffix=extension)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        # mkstemp lets only the owner read; a result is as readable as any other new file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_json(path, value):
    with replacing(path) as temporary, open(temporary, 'w') as file:
        json.dump(value, file, indent=2)
        file.write('\n')
