"""Images that do not fit in memory, such as ImageNet: listed at the start, decoded and augmented by worker processes.
"""
import contextlib
import csv
import json
import os
import zlib
from typing import NamedTuple

import torch
from PIL import Image

from utils import batches, distributed
from utils.augment import alternating, with_one_before
from utils.errors import UserError, shown
from utils.files import open_text, replacing
from utils.image_files import check_alike, list_images, open_image, readers_quiet

# torchvision is imported where it is used: it takes a second or more.

PARTS = ('train', 'val')
IMAGENET_MEAN, IMAGENET_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of each channel, in units of 0..255


class Folder(NamedTuple):
    """paths: list of N file names. labels: int64 (N,). classes: list of names."""
    paths: list
    labels: torch.Tensor
    classes: list

    def subset(self, indices):
        return Folder([self.paths[index] for index in indices], self.labels[indices], self.classes)

    def class_counts(self):
        """The number of images of each class, a list."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def fingerprint(self, root):
        """A word that tells these files, by their names below `root` and their classes, from others."""
        names = json.dumps([os.path.relpath(path, root) for path in self.paths]).encode()
        return f'{zlib.crc32(self.labels.numpy(), zlib.crc32(names)):08x} of {len(self.paths)}'

    def blank(self):
        """A black PIL image; transforms make of it what they make of any."""
        return Image.new('RGB', (32, 32))

    def name(self, index):
        return self.paths[index]

    def image(self, index):
        """The PIL image; ValueError with the reason if it cannot be read."""
        return open_image(self.paths[index])


def read_folders(root):
    """{'train': `Folder`, 'val': `Folder`} of root/train/CLASS/* and root/val/CLASS/*; UserError if they do not fit
    together, or have less than two classes.
    """
    folders = {part: read_folder(root, part) for part in PARTS}
    check_alike(root, {part: folder.classes for part, folder in folders.items()})
    return folders


def read_folder(root, part):
    """The `Folder` of root/part/CLASS/*, classes in the order of their names. No image is read. UserError if one is
    missing.
    """
    paths, labels, classes = list_images(root, part, PARTS)
    return Folder(paths, torch.tensor(labels, dtype=torch.int64), classes)


def training_transform(image_size, auto_augment=None, interpolation='bilinear', random_erase=0.0, mean=IMAGENET_MEAN,
                       flip=True):
    """PIL image -> uint8 (3, image_size, image_size): cropped and scaled at random, and mirrored if `flip`.

    auto_augment: None or one of `AUTO_AUGMENTS`. random_erase: how probable it is that a rectangle is set to the mean
    colour (Zhong et al., arXiv 1708.04896); mean: that colour, in units of 0..255, which is rounded.
    """
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(interpolation)
    policy = 'imagenet' if auto_augment == 'autoaugment' else auto_augment
    augment = [batches.auto_augment(policy, v2, interpolation=mode)] if policy else []
    erase = [v2.RandomErasing(random_erase, value=[float(round(value)) for value in mean])] if random_erase else []
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([v2.RandomResizedCrop(image_size, interpolation=mode, antialias=True), *flips, *augment,
                       v2.PILToTensor(), *erase])


def small_image_transform(padding=0, flip=False, cutout=0, transform=None, crop_mode='zero', mean=(0, 0, 0)):
    """PIL image -> uint8 (3, height, width), with what `Batches` does to a batch done to one image.

    padding, flip, cutout, crop_mode: as for `Batches`. transform: PIL image -> PIL image, after these. mean: the
    colour of cutout.
    """
    from torchvision.transforms import v2

    steps = [v2.RandomHorizontalFlip()] if flip else []
    if padding:
        mode = 'constant' if crop_mode == 'zero' else crop_mode
        steps.append(lambda image: v2.RandomCrop(image.size[::-1], padding=padding, padding_mode=mode)(image))
    if transform:
        steps.append(transform)
    steps.append(v2.PILToTensor())
    if cutout:
        steps.append(lambda image: _cut_out(image, cutout, mean))
    return v2.Compose(steps)


def _cut_out(image, size, mean):
    """`batches.cut_out` of one uint8 image (3, height, width), at a random place, with the colour `mean`."""
    colour = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    centre = torch.stack([torch.randint(side, (1,)) for side in image.shape[1:]], dim=1)
    return (batches.cut_out(image[None] - colour, size, centre)[0] + colour).round().to(torch.uint8)


def evaluation_transform(image_size, resize, interpolation='bilinear'):
    """PIL image -> uint8 (3, image_size, image_size): the centre of what is scaled to `resize` pixels on the shorter
    side.
    """
    from torchvision.transforms import v2

    return v2.Compose([_without_far_ends, v2.Resize(resize, v2.InterpolationMode(interpolation), antialias=True),
                       v2.CenterCrop(image_size),
                       v2.PILToTensor()])


def _without_far_ends(image, most=20):
    """Scaled by its shorter side, an image of 1 x 30000 pixels would take gigabytes; the middle is all that is used."""
    width, height = image.size
    longest = most * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, width - left, height - top))


def mixing(mixup_alpha, cutmix_alpha, num_classes):
    """MixUp (Zhang et al., arXiv 1710.09412), CutMix (Yun et al., arXiv 1905.04899), or for each batch one of the two.

    None if both alphas are 0 or None; otherwise a function of float images (batch, 3, height, width) and int64 labels
    (batch,) that gives mixed images and float targets (batch, num_classes). An image is mixed with the one before it
    in the batch.
    """
    from torchvision.transforms import v2

    mixes = [kind(alpha=float(alpha), num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)) if alpha]
    return v2.RandomChoice(mixes) if len(mixes) == 2 else mixes[0] if mixes else None


class ImageBatches:
    """A `Folder` or LazySplit as normalised float batches (batch, 3, height, width) in channels_last on the device.

    Used as `batches.Batches` is. Iterating gives it in order, each process some of the batches, whole, so that
    together they see each image once. `shuffled(seed, epoch, first)` gives it shuffled, each process its part of each
    batch; what is drawn for an image depends on (seed, epoch, its position in the epoch) alone: on no number of
    workers or processes, and not on `first`, the index of the first batch.

    mean, std: of each channel, in units of 0..255. transform: a function of a PIL image that gives a uint8 tensor
    (3, height, width), always of the same size. workers: how many processes read; 0: this one does.
    mix: None or a function as of `mixing`, for `shuffled`; what it draws depends on (seed, epoch, the batch's index)
    alone, and each image is mixed with the one before it in the batch of all processes. alternate: mirror each image in
    every second epoch of `shuffled`, after the transform.

    Files that cannot be read are left out, and are in `skipped` (path -> reason) after a pass; UserError instead if
    `strict`.
    """

    def __init__(self, folder, mean, std, batch_size, device, transform, workers=1, mix=None, strict=False,
                 alternate=False):
        self.folder, self.batch_size, self.device = folder, batch_size, torch.device(device)
        self.num_classes, self.class_counts = len(folder.classes), folder.class_counts()
        self.labels = folder.labels.to(device)
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
        self.transform, self.workers, self.mix, self.strict, self.skipped = transform, workers, mix, strict, {}
        self.alternate = alternate
        self.augments = True  # or may do so, as nobody knows the transform

    def __len__(self):
        """The batches of all processes together."""
        return -(-len(self.labels) // self.batch_size)

    def images_in(self, index):
        """How many images batch `index` has, in all processes together and with those that cannot be read."""
        return min(self.batch_size, len(self.labels) - index * self.batch_size)

    def gigabytes(self):
        """What all images take as float32, in units of 2^30 bytes."""
        with batches.random_state_kept():
            size = self.transform(self.folder.blank()).numel()
        return 4 * size * len(self.labels) / 2 ** 30

    def normalised(self, indices):
        """Images as they are, normalised: float (number, 3, height, width); those that cannot be read are left out.

        indices: int64 (number,). All images must be of one size, as those of a LazySplit are.
        """
        from torchvision.transforms import v2

        indices = indices.cpu()
        slices = [slice(start, start + self.batch_size) for start in range(0, len(indices), self.batch_size)]
        decoded = DecodedBatches(self.folder, indices, slices, v2.PILToTensor(), seeds=(0, 0))
        return torch.cat([images for images, _ in self._loaded(decoded)])

    def __iter__(self):
        """Batches without a readable image are left out."""
        images = len(self.labels)
        slices = [slice(start, min(start + self.batch_size, images)) for start in range(0, images, self.batch_size)]
        local = slices[distributed.rank()::distributed.world_size()]
        decoded = DecodedBatches(self.folder, torch.arange(images), local, self.transform, seeds=(0, 0))
        return (batch for batch in self._loaded(decoded) if len(batch[1]))

    def shuffled(self, seed, epoch, first=0):
        """This process's part, perhaps an empty one, of each batch from index `first` on."""
        images = len(self.labels)
        order = torch.randperm(images, generator=batches.seeded_generator(seed, epoch))
        local = distributed.local_slices(images, self.batch_size, first)
        mirrored = alternating(images, epoch, batches.seeded_generator(seed)) if self.alternate else None
        return self._loaded(DecodedBatches(self.folder, order, local, self.transform, (seed, epoch), self.mix, first,
                                           self.batch_size, mirrored))

    def _loaded(self, decoded):
        failed = dict(self.skipped) if decoded.first else {}  # what was mended since the last pass is no longer
        pinned = self.device.type == 'cuda'
        for images, targets, failures in batches.read_ahead(decoded, self.workers, decoded.seeds, pin_memory=pinned):
            failed.update(failures)
            if failures and self.strict:
                path, reason = failures[0]
                raise UserError(f'{path} cannot be read as an image ({reason}); mend or remove it, '
                                'or leave --strict away to skip it')
            yield self.normalise(images), targets.to(self.device, non_blocking=True)
        self.skipped = failed

    def normalise(self, images):
        """uint8, or float if mixed, (batch, 3, height, width) in 0..255 -> float, normalised, in channels_last."""
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return (images.float() - self.mean[:, None, None]) / self.std[:, None, None]


class DecodedBatches(torch.utils.data.Dataset):
    """Of each slice of `order`: images uint8 (batch, 3, height, width), labels int64 (batch,), (path, reason) of
    failures.

    With `mix`, images and targets are what it makes of them and of the image before them in the batch of all processes.
    first: the index of the first batch. batch_size: of all processes. mirrored: bool, of each image of the folder.
    """

    def __init__(self, folder, order, slices, transform, seeds, mix=None, first=0, batch_size=0, mirrored=None):
        self.folder, self.order, self.slices, self.transform = folder, order, slices, transform
        self.seeds, self.mix, self.first, self.batch_size, self.mirrored = seeds, mix, first, batch_size, mirrored

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, item):
        images, labels, failures, part = [], [], [], self.slices[item]
        with batches.random_state_kept(), readers_quiet():
            before = self._before(part) if self.mix else []
            for position in [*before, *range(len(self.order))[part]]:
                index = self.order[position].item()
                try:
                    image = self.folder.image(index)
                except ValueError as error:
                    failures.append((self.folder.name(index), str(error)))
                    continue
                batches.seed_everything(self.seeds, position)
                image = self.transform(image)
                images.append(image.flip(-1) if self.mirrored is not None and self.mirrored[index] else image)
                labels.append(self.folder.labels[index])
            if images:
                images, labels = torch.stack(images), torch.stack(labels)
            else:  # of no images, but of their size
                images, labels = self.transform(self.folder.blank())[None][:0], self.folder.labels[:0]
            if self.mix:
                # the 1: not what the image of that position drew
                batches.seed_everything(self.seeds, self.first + item, 1)
                images, labels = self.mix(images.float(), labels)
                images, labels = images[len(before):], labels[len(before):]
        return images, labels, failures

    def _before(self, part):
        """The place of the image before the local part in the batch of all processes, a list of at most one.

        It is the nearest that can be read, as it would be in one process.
        """
        places = with_one_before(part, self.batch_size, len(self.order))
        if len(places) == part.stop - part.start:
            return []
        batch = range(part.start // self.batch_size * self.batch_size, places[0] + 1)
        for place in reversed(batch):
            with contextlib.suppress(ValueError):
                self.folder.image(self.order[place].item())
                return [place]
        return []


def report_skipped(batches_of, path=None):
    """Print which images of these {part: batches} could not be read, in any process; `path` lists them, with earlier
    ones that still cannot be read. A row is tab-separated as the csv module writes it.
    """
    skipped = {}
    for part in batches_of.values():
        for process in distributed.all_gather(getattr(part, 'skipped', {})):
            skipped.update(process)
    if not distributed.is_first():
        return
    if path and os.path.exists(path):
        with open_text(path, newline='') as file:
            earlier = dict(row for row in csv.reader(file, delimiter='\t') if len(row) == 2)
        skipped = {image: reason for image, reason in earlier.items() if _still_damaged(image)} | skipped
    if skipped:
        image, reason = min(skipped.items())
        print(f'skipped {len(skipped)} image{"s" * (len(skipped) > 1)} that cannot be read: {shown(image)} ({reason})'
              + (' and others' if len(skipped) > 1 else ''))
    if path and (skipped or os.path.exists(path)):
        with replacing(path) as temporary, open_text(temporary, 'w', newline='') as file:
            csv.writer(file, delimiter='\t', lineterminator='\n').writerows(sorted(skipped.items()))


def _still_damaged(path):
    with readers_quiet():
        try:
            open_image(path)
        except ValueError:
            return os.path.exists(path)
    return False
