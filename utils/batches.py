"""Images in memory: held on the device as uint8, shuffled, cropped, flipped and normalised there a batch at a time."""
import argparse
import contextlib
import functools
import mmap
import os
import random
import signal
import sys
import warnings
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from utils import device as devices, distributed
from utils.augment import alternating, crop_and_flip, cut_out, with_one_before
from utils.errors import one_line
from utils.flags import bounded

# torchvision is imported where it is used: it takes a second or more.


class Split(NamedTuple):
    """images: uint8 (N, height, width, 3). labels: int64 (N,). classes: list of names.

    source: what tells the files that the images were decoded from; '' where they are the data set itself.
    """
    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    source: str = ''

    def subset(self, indices):
        return Split(self.images[indices], self.labels[indices], self.classes)

    def class_counts(self):
        """The number of images of each class, a list."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def mean_and_std(self):
        """Mean and standard deviation of each channel, two lists, in units of 0..255."""
        return mean_and_std(self.images)


def mean_and_std(images):
    """Mean and standard deviation of each channel of uint8 images (..., 3), in units of 0..255, exact."""
    return mean_and_std_of(pixel_histogram(images))


def pixel_histogram(images):
    """float64 (3, 256): how often each value occurs in each channel of uint8 images (..., 3)."""
    return torch.stack([torch.bincount(images[..., channel].flatten(), minlength=256).double() for channel in range(3)])


def mean_and_std_of(histogram):
    """As `mean_and_std`, from a `pixel_histogram`."""
    values = torch.arange(256, dtype=torch.float64)
    mean, std = [], []
    for counts in histogram:
        share = counts / counts.sum()
        mean.append((share * values).sum().item())
        std.append(max((share * (values - mean[-1]) ** 2).sum().sqrt().item(), 1.0))  # a channel may be constant
    return mean, std


def seeded_generator(*numbers, device='cpu'):
    """A generator whose stream depends on all of the numbers: the run's seed, the epoch, ..."""
    return devices.generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class Batches:
    """A split on the device, as normalised float batches in channels_last.

    Iterating gives it in order and as it is. `shuffled(seed, epoch, first)` gives it shuffled, cropped at random after
    padding by `padding` pixels, mirrored at random if `flip`, and with a square of `cutout` pixels a side set to
    the mean colour, from batch `first` on; a batch depends on (seed, epoch, its index) alone, and is the same on every
    device. With flip='alternating' each image is mirrored in every second epoch.

    Among several processes `shuffled` gives each process its part of every batch, perhaps an empty one, and iterating
    gives it some of the batches, whole; len() counts them all.

    transform: a function of a PIL image, cropped and mirrored, that gives a PIL image, or a float tensor (3, height,
    width) that is not normalised any more. It runs in `workers` processes, image by image, also when iterating in
    order.

    crop_mode: what the padding is, 'zero', black pixels, or 'reflect', the image mirrored at its border. mix: None or a
    function as of `folders.mixing`, for `shuffled`, which mixes each image with the one before it in the batch of all
    processes.
    """

    def __init__(self, split, mean, std, batch_size, device, padding=0, flip=False, cutout=0, transform=None,
                 workers=1, crop_mode='zero', mix=None):
        self.device, self.batch_size = torch.device(device), batch_size
        self.num_classes, self.class_counts = len(split.classes), split.class_counts()
        self.images, self.labels = split.images.to('cpu' if transform else device), split.labels.to(device)
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
        self.padding, self.flip, self.cutout, self.transform, self.workers = padding, flip, cutout, transform, workers
        self.crop_mode, self.mix = crop_mode, mix
        # in `shuffled`; or may do so, as nobody knows a transform
        self.augments = bool(padding or flip or cutout or transform)

    def __len__(self):
        return -(-len(self.labels) // self.batch_size)

    def images_in(self, index):
        """How many images batch `index` has, in all processes together."""
        return min(self.batch_size, len(self.labels) - index * self.batch_size)

    def normalised(self, indices):
        """Images as they are, normalised: float (number, 3, height, width). indices: int64 (number,)."""
        return self.normalise(self.images[indices.to(self.images.device)])

    def __iter__(self):
        count, local = len(self.labels), slice(distributed.rank(), None, distributed.world_size())
        images = self.images.split(self.batch_size)[local]
        if self.transform:
            centre, unmirrored = torch.full((count, 2), self.padding), torch.zeros(count, dtype=torch.bool)
            positions = [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)][local]
            images = self._moved((torch.arange(count), centre, unmirrored), positions, seeds=(0, 0))
        for batch, labels in zip(images, self.labels.split(self.batch_size)[local]):
            yield self.normalise(batch), labels

    def shuffled(self, seed, epoch, first=0):
        generator = seeded_generator(seed, epoch)
        count, height, width, _ = self.images.shape
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)
        if self.flip == 'alternating':
            mirrored = alternating(count, epoch, seeded_generator(seed))[order]
        holes = torch.stack([torch.randint(side, (count,), generator=generator) for side in (height, width)], dim=1)
        positions = local = distributed.local_slices(count, self.batch_size, first)
        if self.mix:
            positions = [with_one_before(part, self.batch_size, count) for part in local]
        images = self._moved((order, offsets, mirrored), positions, seeds=(seed, epoch))
        labels, holes = self.labels[order.to(self.device)], holes.to(self.device)
        for index, (batch, position, part) in enumerate(zip(images, positions, local), first):
            batch, targets = self.normalise(batch), labels[position]
            batch = cut_out(batch, self.cutout, holes[position]) if self.cutout else batch
            if self.mix:
                batch, targets = mixed(self.mix, batch, targets, (seed, epoch), index)
            before = len(targets) - (part.stop - part.start)
            yield batch[before:], targets[before:]

    def _moved(self, draws, positions, seeds):
        """Batches of images, cropped and mirrored as `crop_and_flip` says, and through the transform if there is one.

        draws: for each image in the order of the epoch its index, its offset and whether it is mirrored. positions: a
        slice of that order, or a list of places in it, for each batch.
        """
        order, offsets, mirrored = (draw.to(self.images.device) for draw in draws)
        if not self.transform:
            return (crop_and_flip(self.images[order[part]], self.padding, offsets[part], mirrored[part],
                                  self.crop_mode)
                    for part in positions)
        batches = TransformedBatches(self.images, self.padding, (order, offsets, mirrored), positions, self.transform,
                                     seeds, self.crop_mode)
        return read_ahead(batches, self.workers, seeds, pin_memory=self.device.type == 'cuda')

    def normalise(self, images):
        """uint8 (batch, height, width, 3) -> float (batch, 3, height, width) in channels_last; float images stay as
        they are.
        """
        images = images.to(self.device, non_blocking=True)
        if images.is_floating_point():
            return images.contiguous(memory_format=torch.channels_last)
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


class TransformedBatches(torch.utils.data.Dataset):
    """The batches at `positions` of `draws`, as for `Batches._moved`, then image by image through `transform`.

    Whatever the transform draws from, be it torch, random or NumPy, is seeded for each image, by its position.
    """

    def __init__(self, images, padding, draws, positions, transform, seeds, crop_mode='zero'):
        self.images, self.padding, self.draws, self.positions = images, padding, draws, positions
        self.transform, self.seeds, self.crop_mode = transform, seeds, crop_mode

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, index):
        part = self.positions[index]
        chosen, offset, mirror = (draw[part] for draw in self.draws)
        images = crop_and_flip(self.images[chosen], self.padding, offset, mirror, self.crop_mode)
        places = range(part.start, part.stop) if isinstance(part, slice) else part
        result = [self._transformed(image, position) for position, image in zip(places, images.numpy())]
        return torch.stack(result) if result else images

    def _transformed(self, image, position):
        seed_everything(self.seeds, position)
        return _as_tensor(self.transform(Image.fromarray(image)))


def mixed(mix, images, labels, seeds, index):
    """Images and targets of batch `index`, mixed by `mix`; what that draws depends on (seeds, index) alone."""
    with random_state_kept():
        seed_everything(seeds, index, 1)  # the 1: not what the image of that position drew
        return mix(images, labels)


def seed_everything(seeds, *key):
    """Seed whatever a transform draws from: torch, random and NumPy."""
    state = np.random.SeedSequence(seeds, spawn_key=key).generate_state(3)
    torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed seeds all devices, which takes far longer
    random.seed(int(state[1]))
    np.random.seed(state[2])


@contextlib.contextmanager
def random_state_kept():
    """The program's random state is after the block what it was before: without workers it is the main process that
    draws.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _as_tensor(image):
    return torch.from_numpy(np.array(image.convert('RGB'))) if isinstance(image, Image.Image) else image


def processors():
    """How many processors this process may use, of which a container may have fewer than its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def read_ahead(dataset, workers, seeds=(0,), **options):
    """The items of `dataset` in their order, made by as many processes as `workers` says, or here if it is 0.

    Needs no room in /dev/shm, of which a container has little. Where no process can be started, for want of memory or
    semaphores, it says so once and makes them here.
    options: DataLoader's; without batch_size an item is a batch.
    """
    options = {'batch_size': None, 'generator': seeded_generator(*seeds), **options}
    workers = min(workers, len(dataset))
    if workers:
        fork = 'fork' if sys.platform == 'linux' else None  # a transform may be a lambda
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'This DataLoader will create')  # more than processors: on a slow disk
            try:
                return iter(torch.utils.data.DataLoader(dataset, num_workers=workers, multiprocessing_context=fork,
                                                        worker_init_fn=_begin_reader, **options))
            except OSError as error:
                _say_without_readers(one_line(error))
    return iter(torch.utils.data.DataLoader(dataset, **options))


@functools.cache
def _say_without_readers(reason):
    print(f'no process can be started to read images ({reason}), so the training process reads them itself',
          file=sys.stderr)


def _begin_reader(worker):
    # Ctrl-C reaches every process of a terminal, and the main one stops the workers in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ForkingPickler.register(torch.Tensor, _send)


def _send(tensor):
    """How a worker hands over a tensor: in a file of memory alone, which /dev/shm does not bound; as bytes if it is
    small, or too many files are open.
    """
    array = tensor.contiguous().numpy(force=True)
    if array.size > 10000 and hasattr(os, 'memfd_create'):
        with contextlib.suppress(OSError), open(os.memfd_create('batch'), 'wb') as file:
            file.write(array)
            file.flush()
            return _receive, (DupFd(file.fileno()), tensor.dtype, tensor.shape)
    return torch.from_numpy, (array,)


def _receive(handle, dtype, shape):
    descriptor = handle.detach()
    with open(descriptor, 'r+b') as file:
        memory = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def reader_lost(error):
    """A sentence if `error` says that a process that reads images was killed from outside; otherwise None."""
    if not isinstance(error, RuntimeError) or 'DataLoader worker' not in str(error):
        return None
    if 'killed by signal' not in str(error) and 'exited unexpectedly' not in str(error):
        return None
    return (f'a process that reads images was killed ({one_line(error)[:100]}), as happens where memory runs out; '
            'try fewer of them, a smaller -j, or a smaller batch')


def auto_augment(name, transforms=None, **options):
    """A transform of PIL images.

    name: 'imagenet', 'cifar10' or 'svhn' for the policy of AutoAugment that was learned there (Cubuk et al., CVPR 2019,
    arXiv 1805.09501), 'randaugment' (Cubuk et al., arXiv 1909.13719), 'trivialaugment' (Mueller and Hutter,
    arXiv 2103.10158) or 'augmix' (Hendrycks et al., arXiv 1912.02781).
    transforms: torchvision.transforms.v2, which draws differently, or None: torchvision.transforms, where what moves
    into the image from outside is grey, as in the paper's code. options: fill, interpolation.
    """
    if transforms is None:
        from torchvision import transforms
        options = {'fill': [128, 128, 128], **options}
    kinds = {'randaugment': transforms.RandAugment, 'trivialaugment': transforms.TrivialAugmentWide,
             'augmix': transforms.AugMix}
    if name in kinds:
        return kinds[name](**options)
    return transforms.AutoAugment(transforms.AutoAugmentPolicy(name), **options)


AUTO_AUGMENTS = ('autoaugment', 'imagenet', 'cifar10', 'svhn', 'randaugment', 'trivialaugment', 'augmix')


def add_auto_augment(group, policies):
    """--auto-augment. policies: what 'autoaugment' stands for, in words."""
    group.add_argument('--auto-augment', nargs='?', choices=AUTO_AUGMENTS, const='autoaugment', metavar='NAME',
                       help=f'also {", ".join(AUTO_AUGMENTS)} (without NAME autoaugment: the policy of {policies})')


def alpha(text):
    """An argparse type: the parameter of a symmetric Beta distribution, where float32 can draw from it; 0 is off."""
    value = bounded(float, 0)(text)
    if value and not 0.01 <= value <= 10000:
        raise argparse.ArgumentTypeError(f'must be 0, or a number from 0.01 to 10000, was given {text}')
    return value


def add_mixing(group):
    """The flags about mirroring and mixing."""
    group.add_argument('--hflip', choices=('random', 'alternating', 'none'),
                       help='mirror each image at random, in every second epoch, or never (random)')
    group.add_argument('--mixup', type=alpha, default=0.0, metavar='ALPHA', help='mix pairs of images (0)')
    group.add_argument('--cutmix', type=alpha, default=0.0, metavar='ALPHA',
                       help='put a rectangle of one image into another; with --mixup, each batch one of the two (0)')


def input_transform(args, model):
    """The model's own transforms of images, if it has some and no flag about augmentation is given; else {}."""
    names = ('cutout', 'crop_padding', 'crop_mode', 'hflip')
    given = args.no_augment or args.auto_augment or any(getattr(args, name, None) is not None for name in names)
    return (not given and model.input_transform) or {}


def spread(batches, number=5000):
    """`number` images of `Batches` or `ImageBatches`, or all if there are fewer, at even distances, as a folder lists
    its images class by class; normalised and not augmented: float (number, 3, height, width).
    """
    images = len(batches.labels)
    return batches.normalised(torch.arange(min(number, images)) * images // min(number, images))
