"""Image sets that fit in memory: read once, checked, held on the device as uint8, augmented there a batch at a time."""
import os
import shutil
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils.errors import UserError

# torchvision and scikit-learn are imported where they are used: each takes a second or more, and no run needs all of both.


class Known(NamedTuple):
    num_classes: int
    train_size: int
    flip: bool  # mirroring keeps the meaning of an image; not that of a digit
    source: str = None  # torchvision's class, for the sets that it downloads


DATASETS = {
    'cifar10': Known(10, 50000, True, 'CIFAR10'),
    'cifar100': Known(100, 50000, True, 'CIFAR100'),
    'svhn': Known(10, 73257, False, 'SVHN'),
    'mnist': Known(10, 60000, False, 'MNIST'),
    'fashion-mnist': Known(10, 60000, True, 'FashionMNIST'),
    'digits': Known(10, 1437, False),
    'folder': Known(None, None, True),  # counted by describe()
}


class Split(NamedTuple):
    """images: uint8 (N, height, width, 3). labels: int64 (N,). classes: list of names."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: list

    def subset(self, indices):
        return Split(self.images[indices], self.labels[indices], self.classes)


def describe(name, root):
    """What is known about a data set before any image is read, as `Known`; for `folder` the files are counted."""
    if name != 'folder':
        return DATASETS[name]
    folder, test = (_list_folder(root, part) for part in ('train', 'test'))
    if folder.classes != test.classes:
        differing = sorted(set(folder.classes) ^ set(test.classes))
        raise UserError(f'{root}/train and {root}/test must have the same class folders, but only one of them has: '
                        + ', '.join(differing))
    return Known(len(folder.classes), len(folder.samples), True)


def load(name, root, part, image_size=32, workers=4):
    """One part ('train' or 'test') of a data set as a `Split` of square RGB images; UserError if it is not sound."""
    if name == 'digits':
        split = _digits(part)
    elif name == 'folder':
        split = _folder(root, part, image_size, workers)
    else:
        split = _torchvision(name, root, part)
    return _checked(split, f'{name} ({part})')


def _checked(split, what):
    if len(split.images) != len(split.labels) or len(split.images) == 0:
        raise UserError(f'{what} has {len(split.images)} images and {len(split.labels)} labels; it needs as many of both, '
                        'and at least one')
    wrong = ((split.labels < 0) | (split.labels >= len(split.classes))).nonzero()
    if len(wrong):
        index = wrong[0].item()
        raise UserError(f'{what}: image {index} has label {split.labels[index].item()}, '
                        f'outside 0 to {len(split.classes) - 1}')
    return split


def _digits(part):
    """scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32: 1,437 to train and 360 to test, always the same."""
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


def _list_folder(root, part):
    from torchvision.datasets import ImageFolder

    path = os.path.join(root, part)
    if not os.path.isdir(path):
        raise UserError(f'--dataset folder reads --data DIR with DIR/train/CLASS/*.png|jpg and DIR/test/CLASS/*.png|jpg, '
                        f'but there is no folder {path}')
    try:
        return ImageFolder(path)
    except FileNotFoundError as error:
        raise UserError(f'{path}: {" ".join(str(error).split())}') from error


def _folder(root, part, image_size, workers):
    folder = _list_folder(root, part)

    def read(sample):
        try:
            with Image.open(sample[0]) as image:
                if image.mode.startswith(('I', 'F')):
                    raise ValueError(f'mode {image.mode}: more than 8 bits a channel')
                # Scales the shorter side and cuts out the centre; an image of the right size stays as it is.
                return np.asarray(ImageOps.fit(image.convert('RGB'), (image_size, image_size), Image.Resampling.BILINEAR))
        except Exception as error:  # PIL's readers of the many formats raise many kinds
            raise UserError(f'{sample[0]} cannot be read as an image ({error}); mend or remove it') from error

    images = np.empty((len(folder.samples), image_size, image_size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for index, image in enumerate(pool.map(read, folder.samples)):
                images[index] = image
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a bad image, or Ctrl-C, does not wait for the rest
            raise
    return Split(torch.from_numpy(images), torch.tensor(folder.targets), folder.classes)


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
    return source.mirrors[0], [(os.path.join(source.__name__, 'raw', filename), md5) for filename, md5 in source.resources]


def _fetch(name, root, make, url, archives):
    """make(folder, download) on `root` if the set is there; otherwise unpack or download it first.

    That happens in a temporary folder beside, so a start that is broken off or fails leaves `root` as it was.
    """
    from torchvision.datasets.utils import check_integrity

    try:
        return make(root, False)
    except RuntimeError:
        pass  # torchvision's word for: not there, or not whole
    except Exception as error:
        raise UserError(f'the {name} files in {root} are damaged ({_one_line(error)}); '
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
        raise UserError(f'{name} is not in {root}, or not whole{broken}, and downloading it from {url} failed ({_one_line(error)}); '
                        f'put the original at {where}, or run "python cifar.py --dataset digits", which needs no download') from error
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


def _one_line(error):
    return ' '.join(str(error).split()) or type(error).__name__


def mean_and_std(images):
    """Mean and standard deviation of each channel, in units of 0..255, exact: from the histogram of the pixel values."""
    values = torch.arange(256, dtype=torch.float64)
    mean, std = [], []
    for channel in range(3):
        share = torch.bincount(images[..., channel].flatten(), minlength=256).double() / (images.numel() / 3)
        mean.append((share * values).sum().item())
        std.append(max((share * (values - mean[-1]) ** 2).sum().sqrt().item(), 1.0))  # a channel may be constant
    return mean, std


def split_validation(split, fraction, seed):
    """(training part, validation part), stratified by class; UserError if a class would be missing from either."""
    from sklearn.model_selection import train_test_split

    try:
        train, val = train_test_split(np.arange(len(split.labels)), test_size=fraction, stratify=split.labels, random_state=seed)
    except ValueError as error:
        raise UserError(f'--val-split {fraction} cannot be cut from {len(split.labels)} images: {_one_line(error)}') from error
    return tuple(split.subset(torch.from_numpy(np.sort(part))) for part in (train, val))


def seeded_generator(*numbers):
    """A CPU generator whose stream depends on all of the numbers: the run's seed, the epoch, ..."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class Batches:
    """A split on the device, as normalised float batches in channels_last.

    Iterating gives it in order and as it is. `shuffled(seed, epoch)` gives it shuffled, cropped at random after padding
    by `padding` black pixels, and mirrored at random if `flip`; a batch depends on (seed, epoch, its index) alone, and is
    the same on every device.
    """

    def __init__(self, split, mean, std, batch_size, device, padding=0, flip=False):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
        self.num_classes = len(split.classes)
        self.batch_size, self.device, self.padding, self.flip = batch_size, device, padding, flip

    def __len__(self):
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self):
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size)):
            yield self.normalise(images), labels

    def shuffled(self, seed, epoch):
        generator = seeded_generator(seed, epoch)
        number = len(self.labels)
        order = torch.randperm(number, generator=generator)
        offsets = torch.randint(2 * self.padding + 1, (number, 2), generator=generator)
        mirrored = torch.rand(number, generator=generator) < (0.5 if self.flip else 0.0)
        draws = (draw.to(self.device).split(self.batch_size) for draw in (order, offsets, mirrored))
        for chosen, offset, mirror in zip(*draws):
            yield self.normalise(crop_and_flip(self.images[chosen], self.padding, offset, mirror)), self.labels[chosen]

    def normalise(self, images):
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


def crop_and_flip(images, padding, offset, mirror):
    """Pad, cut the original size back out at each image's own place, then mirror those that are to be mirrored.

    images: uint8 (batch, height, width, channels). offset: (batch, 2), row and column in 0..2*padding.
    mirror: bool (batch,).
    """
    batch, height, width, _ = images.shape
    steps = torch.arange(max(height, width), device=images.device)
    rows = offset[:, :1] + steps[:height]
    columns = offset[:, 1:] + torch.where(mirror[:, None], width - 1 - steps[:width], steps[:width])
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded[torch.arange(batch, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
