"""Image sets that fit in memory: read once, checked, held on the device as uint8, augmented there a batch at a time."""
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils import distributed
from utils.errors import UserError

# torchvision and scikit-learn are imported where they are used: each takes a second or more, and no run needs all of both.


class Known(NamedTuple):
    num_classes: int
    train_size: int
    flip: bool  # mirroring keeps the meaning of an image; not that of a digit
    source: str = None  # torchvision's class, for the sets that it downloads

    @property
    def policy(self):
        """The AutoAugment policy: that learned on SVHN for digits, that learned on CIFAR-10 for all else."""
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


class Split(NamedTuple):
    """images: uint8 (N, height, width, 3). labels: int64 (N,). classes: list of names."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: list

    def subset(self, indices):
        return Split(self.images[indices], self.labels[indices], self.classes)

    def class_counts(self):
        """The number of images of each class, a list."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()


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


def open_image(path):
    """The image in a file, as RGB; ValueError with the reason, in one line, if it is not one of 8 bits a channel or damaged."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(('I', 'F')):
                raise ValueError(f'mode {image.mode}: more than 8 bits a channel')
            return image.convert('RGB')
    except Exception as error:  # PIL's readers of the many formats raise many kinds
        raise ValueError(_one_line(error)) from error


def _folder(root, part, image_size, workers):
    folder = _list_folder(root, part)

    def read(sample):
        try:
            # Scales the shorter side and cuts out the centre; an image of the right size stays as it is.
            return np.asarray(ImageOps.fit(open_image(sample[0]), (image_size, image_size), Image.Resampling.BILINEAR))
        except ValueError as error:
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


def seeded_generator(*numbers, device='cpu'):
    """A generator whose stream depends on all of the numbers: the run's seed, the epoch, ..."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class Batches:
    """A split on the device, as normalised float batches in channels_last.

    Iterating gives it in order and as it is. `shuffled(seed, epoch)` gives it shuffled, cropped at random after padding
    by `padding` black pixels, mirrored at random if `flip`, and with a square of `cutout` pixels a side set to the mean
    colour; a batch depends on (seed, epoch, its index) alone, and is the same on every device. Batches begin with number `first`.

    Among several processes `shuffled` gives each one its share of every batch, perhaps none of it, and iterating gives it some of
    the batches, whole; len() counts them all.

    transform: a function of a PIL image, cropped and mirrored, that gives a PIL image, or a float tensor (3, height, width)
    that is not normalised any more. It runs in `workers` processes, image by image, also when iterating in order.
    """

    def __init__(self, split, mean, std, batch_size, device, padding=0, flip=False, cutout=0, transform=None, workers=1):
        self.device, self.batch_size = torch.device(device), batch_size
        self.num_classes, self.class_counts = len(split.classes), split.class_counts()
        self.images, self.labels = split.images.to('cpu' if transform else device), split.labels.to(device)
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
        self.padding, self.flip, self.cutout, self.transform, self.workers = padding, flip, cutout, transform, workers
        self.augments = bool(padding or flip or cutout or transform)  # in `shuffled`; or may do so, as nobody knows a transform

    def __len__(self):
        return -(-len(self.labels) // self.batch_size)

    def images_in(self, number):
        """How many images batch `number` has, in all processes together."""
        return min(self.batch_size, len(self.labels) - number * self.batch_size)

    def __iter__(self):
        number, own = len(self.labels), slice(distributed.rank(), None, distributed.world_size())
        images = self.images.split(self.batch_size)[own]
        if self.transform:
            centre, unmirrored = torch.full((number, 2), self.padding), torch.zeros(number, dtype=torch.bool)
            positions = [slice(begin, begin + self.batch_size) for begin in range(0, number, self.batch_size)][own]
            images = self._moved((torch.arange(number), centre, unmirrored), positions, seeds=(0, 0))
        for batch, labels in zip(images, self.labels.split(self.batch_size)[own]):
            yield self.normalise(batch), labels

    def shuffled(self, seed, epoch, first=0):
        generator = seeded_generator(seed, epoch)
        number, height, width, _ = self.images.shape
        order = torch.randperm(number, generator=generator)
        offsets = torch.randint(2 * self.padding + 1, (number, 2), generator=generator)
        mirrored = torch.rand(number, generator=generator) < (0.5 if self.flip else 0.0)
        holes = torch.stack([torch.randint(side, (number,), generator=generator) for side in (height, width)], dim=1)
        shares = distributed.shares(number, self.batch_size, first)
        images = self._moved((order, offsets, mirrored), shares, seeds=(seed, epoch))
        labels, holes = self.labels[order.to(self.device)], holes.to(self.device)
        for batch, share in zip(images, shares):
            batch = self.normalise(batch)
            yield (cut_out(batch, self.cutout, holes[share]) if self.cutout else batch), labels[share]

    def _moved(self, draws, positions, seeds):
        """Batches of images, cropped and mirrored as `crop_and_flip` says, and through the transform if there is one.

        draws: for each image in the order of the epoch its index, its place and whether it is mirrored. positions: a slice of
        that order for each batch.
        """
        order, offsets, mirrored = (draw.to(self.images.device) for draw in draws)
        if not self.transform:
            return (crop_and_flip(self.images[order[part]], self.padding, offsets[part], mirrored[part]) for part in positions)
        return torch.utils.data.DataLoader(
            TransformedBatches(self.images, self.padding, (order, offsets, mirrored), positions, self.transform, seeds),
            batch_size=None, num_workers=self.workers,
            multiprocessing_context='fork' if sys.platform == 'linux' else None,  # so that a transform may be a lambda
            worker_init_fn=_ignore_signals, pin_memory=self.device.type == 'cuda', generator=seeded_generator(*seeds))

    def normalise(self, images):
        """uint8 (batch, height, width, 3) -> float (batch, 3, height, width) in channels_last; what is float already stays as it is."""
        images = images.to(self.device, non_blocking=True)
        if images.is_floating_point():
            return images.contiguous(memory_format=torch.channels_last)
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


class TransformedBatches(torch.utils.data.Dataset):
    """The batches at `positions` of `draws`, as for `Batches._moved`, then image by image through `transform`.

    Whatever the transform draws from, be it torch, random or NumPy, is seeded anew for each image, by its position.
    """

    def __init__(self, images, padding, draws, positions, transform, seeds):
        self.images, self.padding, self.draws, self.positions = images, padding, draws, positions
        self.transform, self.seeds = transform, seeds

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, number):
        part = self.positions[number]
        chosen, offset, mirror = (draw[part] for draw in self.draws)
        images = crop_and_flip(self.images[chosen], self.padding, offset, mirror)
        result = [self._transformed(image, part.start + place) for place, image in enumerate(images.numpy())]
        return torch.stack(result) if result else images

    def _transformed(self, image, position):
        seed_everything(self.seeds, position)
        return _as_tensor(self.transform(Image.fromarray(image)))


def seed_everything(seeds, *key):
    """Whatever a transform draws from, be it torch, random or NumPy."""
    state = np.random.SeedSequence(seeds, spawn_key=key).generate_state(3)
    torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed seeds all devices, which takes far longer
    random.seed(int(state[1]))
    np.random.seed(state[2])


def _as_tensor(image):
    return torch.from_numpy(np.array(image.convert('RGB'))) if isinstance(image, Image.Image) else image


def _ignore_signals(worker):
    """Ctrl-C reaches every process of a terminal; the main one stops the workers in good order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def auto_augment(policy):
    """AutoAugment (Cubuk et al., CVPR 2019, arXiv 1805.09501), PIL image -> PIL image. policy: 'cifar10' or 'svhn'.

    What moves into the image from outside is grey, as in the paper's code.
    """
    from torchvision import transforms

    return transforms.AutoAugment(transforms.AutoAugmentPolicy(policy), fill=[128, 128, 128])


def cut_out(images, size, centre):
    """Set a square to 0, which is the mean colour after normalising (DeVries and Taylor, arXiv 1708.04552), in place.

    images: float (batch, channels, height, width). size: side of the square in pixels; what is outside of the image is lost.
    centre: (batch, 2), row and column.
    """
    inside = []
    for axis in (0, 1):
        start = centre[:, axis, None] - size // 2
        position = torch.arange(images.shape[2 + axis], device=images.device)
        inside.append((start <= position) & (position < start + size))
    return images.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


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
