"""Files that are either whole or not there."""
import contextlib
import json
import os
import warnings

from utils.errors import shown


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path`; what was written to it is flushed to disk and takes the place of `path`.

    After an exception, or if the process dies, `path` is what it was before.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f'.unfinished-{name}')
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def open_text(path, mode='r', newline=None):
    """A text file in UTF-8 whatever the locale, with the bytes of names that are not UTF-8. newline: '' for csv."""
    return open(path, mode, encoding='utf-8', errors='surrogateescape', newline=newline)


def write_json(path, value):
    """Pure ASCII, so that everything can read it; names have escapes."""
    with replacing(path) as temporary, open_text(temporary, 'w') as file:
        json.dump(value, file, indent=2)
        file.write('\n')


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
