"""Image files in class folders: each listed once, opened as RGB; what is left out is named."""
import collections
import contextlib
import os
import warnings

import numpy as np
from PIL import Image

from utils.errors import UserError, one_line, shown

# Folders that file managers, notebooks and archives leave behind, together with all whose names begin with a dot.
DEBRIS = ('__MACOSX', '__pycache__', '@eaDir', 'lost+found', '$RECYCLE.BIN', 'System Volume Information')
# What Pillow recognises, but cannot draw by itself.
NOT_DRAWN = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')


def list_images(root, part, parts):
    """(paths, labels, classes) of the image files at or below root/part/CLASS, in the order of their names.

    Links are followed; a file that has several names in a class is listed once. Prints a line about what is left out.
    part: one of `parts`, the folders that `root` should have. classes: names, in UTF-8 whatever the locale. UserError
    if there is no such folder, no class in it, a class without an image, or one file in two classes.
    """
    path = os.path.join(root, part)
    if not os.path.isdir(path):
        layout = ' and '.join(f'DIR/{name}/CLASS/*.jpg|png' for name in parts)
        raise UserError(f'images are expected at {layout}, but there is no folder {path}')
    with os.scandir(path) as entries:
        entries = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    folders = [entry.name for entry in entries if os.path.isdir(entry.path) and not _is_hidden(entry.name)]
    if not folders:
        raise UserError(f'{path} has no class folders; its images are expected at {path}/CLASS/*.jpg|png')
    extensions, left_out = readable_extensions(), LeftOut()
    for entry in entries:
        if _extension(entry.name) in extensions and not os.path.isdir(entry.path):
            left_out.add('outside of the class folders', entry.path)
    found = [_walk(os.path.join(path, name), os.path.realpath(path), extensions, left_out) for name in folders]
    paths, inodes = ([file[i] for files in found for file in files] for i in (0, 1))
    labels = [label for label, files in enumerate(found) for _ in files]
    again = _listed_before(paths, inodes, labels)
    for index in sorted(again):
        left_out.add('another name of an image that is listed', paths[index])
    paths, labels = ([value for index, value in enumerate(values) if index not in again] for values in (paths, labels))
    empty = [folders[label] for label in sorted(set(range(len(folders))) - set(labels))]
    if empty:
        raise UserError(f'{path}: every class folder must have an image (jpg, png, ...), but there is none in '
                        f'{some(empty)}' + (f' ({left_out})' if left_out else ''))
    only = os.path.join(path, folders[0])
    if len(folders) == 1 and all(os.path.dirname(name) != only for name in paths):
        below = sorted({os.path.relpath(name, only).split(os.sep)[0] for name in paths})
        raise UserError(f'{path} has a single class folder, {folders[0]}, with the folders {some(below)} in it; if '
                        f'these are the classes, move them up, to {path}')
    if left_out:
        print(f'{path}: {left_out}')
    return paths, labels, [os.fsencode(name).decode('utf-8', 'surrogateescape') for name in folders]


def check_alike(root, classes):
    """UserError unless the parts of `root`, part -> names of its classes, have the same, at least two classes."""
    (first, names), (second, others) = classes.items()
    differing = sorted(set(names) ^ set(others))
    if differing:
        raise UserError(f'{root}/{first} and {root}/{second} must have the same class folders, but only one of them '
                        f'has: {some(differing)}')
    if len(names) < 2:
        raise UserError(f'{root}/{first} has a single class folder, {names[0]}; a classifier needs at least two')


class LeftOut(collections.Counter):
    """How many files are left out, by reason, and an example of each."""

    def __init__(self):
        super().__init__()
        self.examples = {}

    def add(self, reason, path):
        self[reason] += 1
        self.examples.setdefault(reason, path)

    def __str__(self):
        words = (f'{count} {reason} ({shown(self.examples[reason])})' for reason, count in self.most_common())
        return f'{self.total()} file{"s" * (self.total() > 1)} left out: {some(list(words))}'


def some(names, most=5):
    """The first names, in words."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def readable_extensions():
    """The endings, such as .jpg, of the names of files that this Pillow can read."""
    known = Image.registered_extensions()
    return {extension for extension, kind in known.items() if kind in Image.OPEN and kind not in NOT_DRAWN}


def _extension(name):
    return os.path.splitext(name)[1].lower()


def _is_hidden(name):
    return name.startswith('.') or name in DEBRIS


def _walk(folder, root, extensions, left_out):
    """[(path, inode)] of the images at or below a class folder, by folder, then by name.

    A folder that was visited, or that this one lies in, is not visited again, so links cannot lead in circles.
    """
    above, found, pending, visited = {root, os.path.dirname(os.path.realpath(folder))}, {}, [folder], set()
    for path in tuple(above):
        while path != os.path.dirname(path):
            above.add(path := os.path.dirname(path))
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in visited | above:
            left_out.add('link to a folder that is listed, or lies above', folder)
            continue
        visited.add(real)
        files = found[folder] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                linked, extension = entry.is_symlink(), _extension(entry.name)
                if _is_hidden(entry.name):
                    continue
                if os.path.isdir(entry.path) if linked else entry.is_dir():
                    pending.insert(0 if linked else len(pending), entry.path)  # links last
                elif extension not in extensions:
                    left_out.add(shown(extension) or 'without an ending', entry.path)
                elif inode := _inode(entry):
                    files.append((entry.path, inode))
                else:
                    left_out.add('no file', entry.path)
        files.sort(key=lambda file: os.fsencode(file[0]))
    return [file for folder in sorted(found, key=os.fsencode) for file in found[folder]]


def _inode(entry):
    """The number of the file that a directory entry leads to; None if it is a pipe or the like.

    A link that leads nowhere has its own: it is listed, and cannot be read.
    """
    if not entry.is_symlink():
        return entry.inode() if entry.is_file() else None
    try:
        return os.stat(entry.path).st_ino if os.path.isfile(entry.path) or not os.path.exists(entry.path) else None
    except OSError:
        return entry.inode()


def _listed_before(paths, inodes, labels):
    """The set of positions whose file is at an earlier position too; UserError if it has another label there."""
    numbers = np.array(inodes, dtype=np.uint64)
    order = numbers.argsort(kind='stable')
    twice = numbers[order][1:] == numbers[order][:-1]
    candidates = sorted(set(order[1:][twice]) | set(order[:-1][twice]))
    first, again = {}, set()
    for index in map(int, candidates):
        try:  # an inode is a number within a file system, and some do not know it
            status = os.stat(paths[index])
        except OSError:
            continue
        before = first.setdefault((status.st_dev, status.st_ino), index)
        if labels[before] != labels[index]:
            raise UserError(f'{paths[before]} and {paths[index]} are the same file, in two classes; remove one of '
                            'them')
        if before != index:
            again.add(index)
    return again


def open_image(path):
    """The image in a file, as RGB; ValueError with the reason, in one line, if it is damaged or has above 8 bits a
    channel.
    """
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except Exception as error:  # PIL's readers of the many formats raise many kinds
        raise ValueError(one_line(error)) from error


def as_rgb(image):
    """A PIL image as RGB, what is transparent in its own colour; ValueError if it has above 8 bits a channel."""
    if image.mode.startswith(('I', 'F')):
        raise ValueError(f'mode {image.mode}: more than 8 bits a channel')
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # the same colours, and no warning
    return image.convert('RGB')


@contextlib.contextmanager
def readers_quiet():
    """Without Pillow's warnings, of odd metadata or a large image: what can be read is read. Not within a thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', module='PIL')
        yield
