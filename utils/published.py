"""The data sets that torchvision downloads: found below --data, judged by what is in their files, fetched if missing.

A file counts by its contents: an archive that was compressed again is as good as the one that was published.
"""
import contextlib
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import shutil
import socket
import struct
import tarfile
import tempfile
import zlib

import numpy as np
import torch

from utils.batches import Split
from utils.errors import UserError, one_line

# torchvision and SciPy are imported where they are used: each takes a second or more.

# MD5 sums of the unpacked files; torchvision has those of the compressed ones.
CONTENTS = {
    'MNIST': {
        'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb',
        'train-labels-idx1-ubyte': 'a25bea736e30d166cdddb491f175f624',
        't10k-images-idx3-ubyte': '2646ac647ad5339dbf082846283269ea',
        't10k-labels-idx1-ubyte': '27ae3e4e09519cfbb04c329615203637',
    },
    'FashionMNIST': {
        'train-images-idx3-ubyte': 'f4a8712d7a061bf5bd6d2ca38dc4d50a',
        'train-labels-idx1-ubyte': '9018921c3c673c538a1fc5bad174d6f9',
        't10k-images-idx3-ubyte': '8181f5470baa50b63fa0f6fddb340f0a',
        't10k-labels-idx1-ubyte': '15d484375f8d13e6eb1aabb0c3f46965',
    },
}
# The digits 0 to 9 of SVHN, of which there is no sum but that of the whole file.
SVHN_COUNTS = {'train': [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659],
               'test': [1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595]}


def load(name, class_name, root, part):
    """One part ('train' or 'test') of a set of torchvision, by the name of its class, as a `Split` of 32x32 pixels.

    What is missing is downloaded. UserError, with everything in `root` as it was, if that fails, or if a file is not
    the published one and no other file has the same contents.
    """
    from torchvision import datasets

    if os.path.exists(root) and not os.path.isdir(root):
        raise UserError(f'--data {root} is not a folder')
    source = getattr(datasets, class_name)
    read = {'CIFAR10': _cifar, 'CIFAR100': _cifar, 'SVHN': _svhn}.get(class_name, _mnist)
    split = read(name, source, root, part)
    if split is None:
        _download(name, root, _downloads(source, part))
        split = read(name, source, root, part)
    return split


def _first_sound(name, candidates):
    """read(path) of the first of `candidates`, pairs (path, read), that is sound; None if there is none of the files.

    UserError about the first file that is there if none is sound.
    """
    failure = None
    for path, read in candidates:
        if os.path.exists(path):
            try:
                return read(path)
            except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
                failure = failure or f'{path} is not as {name} was published: {one_line(error)}'
    if failure:
        raise UserError(f'{failure}; put the original there, or remove it and the set is downloaded')
    return None


def _read(path):
    with open(path, 'rb') as file:
        return file.read()


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@functools.cache  # a set has several files, which two parts share
def _say_once(sentence):
    print(sentence)


def _packed_again(where):
    _say_once(f'{where}: packed in another way than published; the contents are the published ones')


def _mnist(name, source, root, part):
    """MNIST and Fashion-MNIST; compressed files are read as they are, which takes a fraction of a second."""
    sums, published = CONTENTS[source.__name__], dict(source.resources)

    def plain(path):
        return _checked_idx(_read(path), os.path.basename(path), sums)

    def compressed(path):
        packed, file = _read(path), os.path.basename(path)
        content = gzip.decompress(packed)
        if _md5(packed) != published[file]:
            _checked_idx(content, file.removesuffix('.gz'), sums)
            _packed_again(os.path.dirname(path))
        return content

    def find(file):
        folders = os.path.join(root, source.__name__, 'raw'), root  # Debian has the files without folders around them
        return _first_sound(name, [(os.path.join(folder, file + ending), read) for folder in folders
                                   for ending, read in (('', plain), ('.gz', compressed))])

    prefix = 'train' if part == 'train' else 't10k'
    images, labels = find(f'{prefix}-images-idx3-ubyte'), find(f'{prefix}-labels-idx1-ubyte')
    if images is None or labels is None:
        return None
    images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))  # black as the images' own margin
    labels = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return Split(torch.from_numpy(images).unsqueeze(3).expand(-1, -1, -1, 3).contiguous(), torch.from_numpy(labels),
                 [label.split(' - ')[0] for label in source.classes])


def _checked_idx(content, file, sums):
    """`content` if it is that of the published `file`; otherwise ValueError with what is wrong, as precise as can be.
    """
    found = _md5(content)
    if found == sums[file]:
        return content
    others = [f'it is {other} of {which}' for which, known in CONTENTS.items() for other, md5 in known.items()
              if md5 == found]
    images = 60000 if file.startswith('train') else 10000
    expected = (2051, images, 28, 28) if 'images' in file else (2049, images)
    size = 4 * len(expected)
    header = struct.unpack(f'>{len(expected)}I', content[:size].ljust(size, b'\0'))
    if others:
        raise ValueError(others[0])
    if header != expected:
        raise ValueError(f'its IDX header is {" ".join(map(str, header))}, not {" ".join(map(str, expected))}')
    if len(content) != size + math.prod(expected[1:]):
        raise ValueError(f'it holds {len(content)} bytes, not {size + math.prod(expected[1:])}')
    raise ValueError(f'the MD5 sum of its contents is {found}, not {sums[file]}')


def _cifar(name, source, root, part):
    """CIFAR-10 and CIFAR-100: the unpacked folder, or else the archive, which is then unpacked if `root` is writable.
    """
    meta = source.meta['filename']
    chosen = [file for file, _ in (source.train_list if part == 'train' else source.test_list)]
    sums = {**dict(source.train_list), **dict(source.test_list), meta: source.meta['md5']}

    def check(file, content):
        if content is None:
            raise ValueError(f'it has no {file}')
        if _md5(content) != sums[file]:
            raise ValueError(f'the MD5 sum of {file} in it is {_md5(content)}, not {sums[file]}')
        return content

    def unpacked(folder):
        paths = {file: os.path.join(folder, file) for file in (*chosen, meta)}
        return {file: check(file, _read(path) if os.path.exists(path) else None) for file, path in paths.items()}

    def archive(path):
        contents = _members(path, sums)
        contents = {file: check(file, contents.get(file)) for file in sums}
        if _md5(_read(path)) != source.tgz_md5:
            _packed_again(path)
        _write(contents, os.path.join(root, source.base_folder))
        return contents

    contents = _first_sound(name, [(os.path.join(root, source.base_folder), unpacked),
                                   (os.path.join(root, source.filename), archive)])
    if contents is None:
        return None
    parts = [pickle.loads(contents[file], encoding='latin1') for file in chosen]  # safe, as the sums are right
    images = np.concatenate([part['data'] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = [label for part in parts for label in part.get('labels', part.get('fine_labels'))]
    return Split(torch.from_numpy(images).contiguous(), torch.tensor(labels),
                 pickle.loads(contents[meta], encoding='latin1')[source.meta['key']])


def _members(path, names):
    """{file name: bytes} of the files of a tar archive that have one of these names, in whatever folder."""
    with tarfile.open(path) as archive:
        return {os.path.basename(member.name): archive.extractfile(member).read() for member in archive
                if member.isfile() and os.path.basename(member.name) in names}


def _write(contents, folder):
    """Write files, name -> bytes, into `folder`, each whole or not at all; nothing where the system refuses to."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=os.path.dirname(folder),
                                                                   prefix='.unfinished-') as work:
        for file, content in contents.items():
            with open(os.path.join(work, file), 'wb') as target:
                target.write(content)
        os.makedirs(folder, exist_ok=True)
        for file in contents:
            shutil.move(os.path.join(work, file), os.path.join(folder, file))


def _svhn(name, source, root, part):
    """SVHN. A file that was saved again can be told by its numbers alone: of images, and of each digit."""
    _, filename, published = source.split_list[part]

    def read(path):
        content = _read(path)
        images, labels = _mat_arrays(content)
        if _md5(content) != published:
            counts = np.bincount(labels, minlength=10).tolist()
            if images.shape != (32, 32, 3, len(labels)) or images.dtype != np.uint8 or counts != SVHN_COUNTS[part]:
                raise ValueError(f'it has {images.dtype} images {images.shape} and, of the digits 0 to 9, {counts}, '
                                 f'not uint8 (32, 32, 3, {sum(SVHN_COUNTS[part])}) and {SVHN_COUNTS[part]}')
            _say_once(f'{path}: saved in another way than published; it has the published number of each digit')
        return Split(torch.from_numpy(images.transpose(3, 0, 1, 2)).contiguous(), torch.from_numpy(labels),
                     [str(digit) for digit in range(10)])

    return _first_sound(name, [(os.path.join(root, filename), read)])


def _mat_arrays(content):
    """(images, labels from 0 to 9) of a file of SVHN; ValueError if it has none."""
    import scipy.io

    try:
        arrays = scipy.io.loadmat(io.BytesIO(content))
        return arrays['X'], arrays['y'].astype(np.int64).reshape(-1) % 10  # the files call the digit 0 "10"
    except Exception as error:  # SciPy raises many kinds
        raise ValueError(f'it is no Matlab file with X and y ({one_line(error)})') from error


def _downloads(source, part):
    """[(path below --data, addresses, MD5 sum)] of the files of a set that are downloaded."""
    if source.__name__.startswith('CIFAR'):
        return [(source.filename, [source.url], source.tgz_md5)]
    if source.__name__ == 'SVHN':
        url, filename, md5 = source.split_list[part]
        return [(filename, [url], md5)]
    return [(os.path.join(source.__name__, 'raw', file), [mirror + file for mirror in source.mirrors], md5)
            for file, md5 in source.resources]


def _download(name, root, files):
    """Download those of `files`, see `_downloads`, that are missing in `root`: all of them, or after an error none.

    That happens in a temporary folder inside, so a start that is interrupted leaves `root` as it was.
    """
    missing = [file for file in files if not os.path.exists(os.path.join(root, file[0]))]
    patience = socket.getdefaulttimeout()
    try:
        os.makedirs(root, exist_ok=True)
        socket.setdefaulttimeout(30)
        with tempfile.TemporaryDirectory(dir=root, prefix='.unfinished-') as work:
            for path, urls, md5 in missing:
                _download_one(os.path.join(work, os.path.basename(path)), urls, md5)
            for path, _, _ in missing:
                os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
                shutil.move(os.path.join(work, os.path.basename(path)), os.path.join(root, path))
    except Exception as error:  # whatever failed in there, the user is told the same three things
        where = ' and '.join(os.path.join(root, path) for path, _, _ in files)
        raise UserError(f'{name} is not in {root}, or not all of it, and downloading it from {missing[0][1][0]} failed '
                        f'({one_line(error)}); put the original at {where}, or run "python cifar.py --dataset digits", '
                        'which needs no download') from error
    finally:
        socket.setdefaulttimeout(patience)


def _download_one(path, urls, md5):
    from torchvision.datasets.utils import download_url

    for url in urls:
        try:
            return download_url(url, *os.path.split(path), md5)
        except Exception:
            if url == urls[-1]:
                raise
