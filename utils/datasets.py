"""The data sets that cifar.py knows, read as uint8 images."""
import argparse
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils import decoded, memory, own_dataset, published
from utils.batches import Split
from utils.errors import UserError
from utils.files import digest
from utils.image_files import check_alike, list_images, open_image, readers_quiet

# scikit-learn is imported where it is used: it takes a second or more.


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


def may_be_mirrored(name):
    """Whether the mirror image of an image of this data set is of its class; of one's own sets it is."""
    return DATASETS.get(name, DATASETS['folder']).flip


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


def load(name, root, part, image_size=32, workers=4, cache=True):
    """One part ('train' or 'test') of a data set as a `Split` of square RGB images; UserError if it is not sound.

    A data set of one's own is a `LazySplit` where it is too large for memory. cache: keep the decoded images of a
    folder beside it, and read them from there.
    """
    if own_dataset.is_own(name):
        split = _read.pop((name, root, part, image_size), None)
        split = split or own_dataset.load(name, root, part, image_size, workers)
    elif name == 'digits':
        split = _digits(part)
    elif name == 'folder':
        split = _folder(root, part, image_size, workers, cache)
    else:
        split = published.load(name, DATASETS[name].source, root, part)
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


def _folder(root, part, image_size, workers, cache):
    paths, labels, classes = _listed.pop((root, part), None) or list_images(root, part, PARTS)

    def read(path):
        try:
            # Scales the shorter side and cuts out the centre; an image of the right size stays as it is.
            return np.asarray(ImageOps.fit(open_image(path), (image_size, image_size), Image.Resampling.BILINEAR))
        except ValueError as error:
            raise UserError(f'{path} cannot be read as an image ({error}); mend or remove it') from error

    def decode():
        images = np.empty((len(paths), image_size, image_size, 3), dtype=np.uint8)
        with readers_quiet(), ThreadPoolExecutor(workers) as pool:
            try:
                for index, image in enumerate(pool.map(read, paths)):
                    images[index] = image
            except BaseException:
                pool.shutdown(cancel_futures=True)  # a bad image, or Ctrl-C, does not wait for the rest
                raise
        return images

    names, found = [os.path.relpath(path, root) for path in paths], [os.stat(path) for path in paths]
    files = [(name, status.st_size) for name, status in zip(names, found)]
    key = digest([image_size, PIL.__version__, files, [status.st_mtime_ns for status in found]])
    images = decoded.kept(root, f'{part}-{image_size}', key, decode) if cache else decode()
    return Split(torch.from_numpy(images), torch.tensor(labels), classes, digest(files))
