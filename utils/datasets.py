"""The data sets that cifar.py knows: listed, fetched, checked, read as uint8 images."""
import argparse
import os
import re
import shutil
import socket
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils import memory, own_dataset
from utils.batches import Split
from utils.errors import UserError, one_line
from utils.files import digest
from utils.image_files import check_alike, list_images, open_image, readers_quiet

# torchvision and scikit-learn are imported where they are used: each takes a second or more, and no run needs all of
# both.


class Known(NamedTuple):
    num_classes: int
    train_size: int
    flip: bool  # mirroring keeps the meaning of an image; not that of a digit
    source: str = None  # torchvision's class, for the sets that it downloads

    @property
    def policy(self):
        """The policy of AutoAugment: for digits the policy learned on SVHN, otherwise the policy learned on CIFAR-10.
        """
        return 'cifar10' if self.flip else 'svhn'


DATASETS = {
    'cifar10': Known(10, 50000, True, 'CIFAR10'),
    'cifar100': Known(100, 50000, True, 'CIFAR100'),
    'svhn': Known(10, 73257, False, 'SVHN'),
    'mnist': Known(10, 60000, False, 'MNIST'),
    'fashion-mnist': Known(10, 60000, True, 'FashionMNIST'),
    'digits': Known(10, 1437, False),
    'folder': Known(None, None, True),  # counted by describe()
}
PARTS = ('train', 'test')  # of a folder


def dataset_name(text):
    """An argparse type: one of DATASETS, or module:Class for a torch Dataset of one's own."""
    if text not in DATASETS and not re.fullmatch(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*', text):
        raise argparse.ArgumentTypeError(f'invalid choice: {text!r} (choose from {", ".join(DATASETS)}, or '
                                         'module:Class for a '
                                         'torch Dataset of your own)')
    return text


def has_images_of_any_size(name):
    """Whether images are scaled to --image-size, and --workers read them."""
    return name == 'folder' or own_dataset.is_own(name)


def describe(name, root, image_size=32, workers=4):
    """What is known about a data set before its images are read, as `Known`; the files of `folder` are counted.

    A data set of one's own is read here, and `load` returns what was read.
    """
    if own_dataset.is_own(name):
        split = _checked(own_dataset.load(name, root, 'train', image_size, workers), f'{name} (train)')
        if split.labels.unique().numel() < 2:
            raise UserError(f'--dataset {name} (train) has images of a single class, {split.classes[split.labels[0]]}; '
                            'a classifier needs at least two')
        _read[name, root, 'train', image_size] = split
        return Known(len(split.classes), len(split.labels), True)
    if name != 'folder':
        return DATASETS[name]
    listed = {part: list_images(root, part, PARTS) for part in PARTS}
    check_alike(root, {part: classes for part, (_, _, classes) in listed.items()})
    images = sum(len(paths) for paths, _, _ in listed.values())
    memory.check(images * image_size ** 2 * 3, f'{images} images of {image_size}x{image_size} pixels', '--image-size')
    _listed.update({(root, part): own for part, own in listed.items()})
    paths, _, classes = listed['train']
    return Known(len(classes), len(paths), True)


def load(name, root, part, image_size=32, workers=4):
    """One part ('train' or 'test') of a data set as a `Split` of square RGB images; UserError if it is not sound.

    A data set of one's own is a `LazySplit` where it is too large for memory.
    """
    if own_dataset.is_own(name):
        split = _read.pop((name, root, part, image_size), None)
        split = split or own_dataset.load(name, root, part, image_size, workers)
    elif name == 'digits':
        split = _digits(part)
    elif name == 'folder':
        split = _folder(root, part, image_size, workers)
    else:
        split = _torchvision(name, root, part)
    return _checked(split, f'{name} ({part})')


def fingerprint(split):
    """A word that tells the images and labels of a split, in this order, from any other's.

    Of files that were decoded their names and sizes count, as decoders differ by machine; of a data set of one's own
    that is too large for memory the labels alone.
    """
    source = getattr(split, 'source', '').encode()
    pixels = split.images.numpy() if isinstance(split, Split) and not source else source
    return f'{zlib.crc32(split.labels.numpy(), zlib.crc32(pixels)):08x} of {len(split.labels)}'


_read, _listed = {}, {}  # what `describe` has read and listed, and `load` has not yet returned


def _checked(split, what):
    images = len(split.images) if isinstance(split, Split) else len(split.indices)
    if images != len(split.labels) or images == 0:
        raise UserError(f'{what} has {images} images and {len(split.labels)} labels; it needs as many of both, '
                        'and at least one')
    wrong = ((split.labels < 0) | (split.labels >= len(split.classes))).nonzero()
    if len(wrong):
        index = wrong[0].item()
        raise UserError(f'{what}: image {index} has label {split.labels[index].item()}, '
                        f'outside 0 to {len(split.classes) - 1}')
    return split


def _digits(part):
    """scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32: 1,437 to train and 360 to test, always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).unsqueeze(1)
    images = F.interpolate(images, size=32, mode='bilinear').round().to(torch.uint8).permute(0, 2, 3, 1)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    chosen = torch.from_numpy(np.sort(train if part == 'train' else test))
    names = [str(name) for name in digits.target_names]
    return Split(_three_channels(images), torch.from_numpy(digits.target).long(), names).subset(chosen)


def _three_channels(images):
    return images.expand(-1, -1, -1, 3).contiguous()


def _folder(root, part, image_size, workers):
    paths, labels, classes = _listed.pop((root, part), None) or list_images(root, part, PARTS)

    def read(path):
        try:
            # Scales the shorter side and cuts out the centre; an image of the right size stays as it is.
            return np.asarray(ImageOps.fit(open_image(path), (image_size, image_size), Image.Resampling.BILINEAR))
        except ValueError as error:
            raise UserError(f'{path} cannot be read as an image ({error}); mend or remove it') from error

    images = np.empty((len(paths), image_size, image_size, 3), dtype=np.uint8)
    with readers_quiet(), ThreadPoolExecutor(workers) as pool:
        try:
            for index, image in enumerate(pool.map(read, paths)):
                images[index] = image
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a bad image, or Ctrl-C, does not wait for the rest
            raise
    files = [(os.path.relpath(path, root), os.path.getsize(path)) for path in paths]
    return Split(torch.from_numpy(images), torch.tensor(labels), classes, digest(files))


def _torchvision(name, root, part):
    from torchvision import datasets

    if os.path.exists(root) and not os.path.isdir(root):
        raise UserError(f'--data {root} is not a folder')
    source = getattr(datasets, DATASETS[name].source)
    which = {'split': part} if name == 'svhn' else {'train': part == 'train'}
    data = _fetch(name, root, lambda folder, download: source(folder, download=download, **which),
                  *_archives(name, source, part))
    if name.startswith('cifar'):
        return Split(torch.from_numpy(data.data), torch.tensor(data.targets), data.classes)
    if name == 'svhn':
        images = torch.from_numpy(data.data).permute(0, 2, 3, 1).contiguous()
        return Split(images, torch.from_numpy(data.labels).long(), [str(digit) for digit in range(10)])
    images = F.pad(data.data, (2, 2, 2, 2)).unsqueeze(3)  # 28x28 -> 32x32, black as the images' own margin
    return Split(_three_channels(images), data.targets.long(), [name.split(' - ')[0] for name in data.classes])


def _archives(name, source, part):
    """(where it is downloaded from, [(path below --data, MD5 sum)]) of the files that `source` reads for a set."""
    if name.startswith('cifar'):
        return source.url, [(source.filename, source.tgz_md5)]
    if name == 'svhn':
        url, filename, md5 = source.split_list[part]
        return url, [(filename, md5)]
    return source.mirrors[0], [(os.path.join(source.__name__, 'raw', filename), md5) for filename,
                               md5 in source.resources]


def _fetch(name, root, make, url, archives):
    """make(folder, download) on `root` if the set is there; otherwise unpack or download it first.

    That happens in a temporary folder inside, so a start that is interrupted or fails leaves `root` as it was.
    """
    from torchvision.datasets.utils import check_integrity

    try:
        return make(root, False)
    except RuntimeError:
        pass  # torchvision's word for: not there, or not whole
    except Exception as error:
        raise UserError(f'the {name} files in {root} are damaged ({one_line(error)}); '
                        'remove them and start again') from error
    damaged = [path for path, md5 in archives
               if os.path.exists(os.path.join(root, path)) and not check_integrity(os.path.join(root, path), md5)]
    patience = socket.getdefaulttimeout()
    try:
        os.makedirs(root, exist_ok=True)
        socket.setdefaulttimeout(30)
        with tempfile.TemporaryDirectory(dir=root, prefix='.unfinished-') as work:
            for path, _ in archives:
                if os.path.exists(os.path.join(root, path)) and path not in damaged:
                    os.makedirs(os.path.dirname(os.path.join(work, path)), exist_ok=True)
                    os.symlink(os.path.abspath(os.path.join(root, path)), os.path.join(work, path))
            make(work, True)
            _move_into(work, root)
    except Exception as error:  # whatever failed in there, the user is told the same three things
        where = ' and '.join(os.path.join(root, path) for path, _ in archives)
        broken = f' ({", ".join(damaged)} is there, but truncated or damaged)' if damaged else ''
        raise UserError(f'{name} is not in {root}, or not whole{broken}, and downloading it from {url} failed '
                        f'({one_line(error)}); put the original at {where}, or run "python cifar.py --dataset digits", '
                        'which needs no download') from error
    finally:
        socket.setdefaulttimeout(patience)
    return make(root, False)


def _move_into(work, root):
    for folder, _, files in os.walk(work):
        target = os.path.join(root, os.path.relpath(folder, work))
        os.makedirs(target, exist_ok=True)
        for file in files:
            if not os.path.islink(os.path.join(folder, file)):
                shutil.move(os.path.join(folder, file), os.path.join(target, file))
