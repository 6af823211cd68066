"""A data set of one's own: --dataset module:Class, any torch Dataset of (image, label).

The class, or function, is called with those of these that its signature names: root (--data), train (True or False),
split ('train' or 'test'). An image is a PIL image, or a uint8 array or tensor (H, W), (H, W, C) or (C, H, W), or a
float one in [0, 1]; a label is a whole number from 0. `classes`, a list of names, is used if the data set has it.
"""
import importlib
import inspect
import operator
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from utils import batches, memory
from utils.batches import Split, mean_and_std_of
from utils.errors import UserError, one_line
from utils.image_files import as_rgb

IN_MEMORY = 4 * 2 ** 30  # bytes, as uint8, of the largest part that is held in memory


def is_own(name):
    return ':' in name


class LazySplit(NamedTuple):
    """A part of a torch Dataset that is too large for memory: read when it is needed, by worker processes.

    indices: int64 (N,), into `dataset`. labels: int64 (N,). classes: list of names. image_size: side in pixels.
    histogram: float64 (3, 256), how often each value of each channel occurs in the whole set.
    """
    dataset: torch.utils.data.Dataset
    indices: torch.Tensor
    labels: torch.Tensor
    classes: list
    image_size: int
    histogram: torch.Tensor

    def subset(self, indices):
        return self._replace(indices=self.indices[indices], labels=self.labels[indices])

    class_counts = Split.class_counts

    def mean_and_std(self):
        """Mean and standard deviation of each channel of the whole set, two lists, in units of 0..255."""
        return mean_and_std_of(self.histogram)

    def blank(self):
        """A black PIL image of the size that all have."""
        return Image.new('RGB', (self.image_size, self.image_size))

    def name(self, index):
        return f'image {self.indices[index]}'

    def image(self, index):
        """A PIL image of image_size x image_size; ValueError with the reason if it cannot be read."""
        return _item(self.dataset, self.indices[index].item(), self.image_size)[0]


def load(name, root, part, image_size, workers):
    """One part, 'train' or 'test', as a Split, or as a `LazySplit` if it is larger than IN_MEMORY.

    Raises UserError, in one sentence, for whatever the data set does not do as described above.
    """
    dataset = _make(name, root, part)
    size = image_size ** 2 * 3
    large = len(dataset) * size > IN_MEMORY
    at_once, processes = max(1, min(64, 2 ** 26 // size)), workers if len(dataset) > 1000 else 0
    memory.check(size * (at_once * (2 * processes + 1) if large else len(dataset)),
                 f'images of {image_size}x{image_size} pixels', '--image-size')
    images = None if large else np.empty((len(dataset), image_size, image_size, 3), dtype=np.uint8)
    labels, histogram = torch.empty(len(dataset), dtype=torch.int64), torch.zeros(3, 256, dtype=torch.float64)
    loader = batches.read_ahead(_Items(dataset, image_size), processes, batch_size=at_once, collate_fn=list)
    for index, item in enumerate(item for items in loader for item in items):
        if isinstance(item, str):
            raise UserError(f'--dataset {name} ({part}), image {index}: {item}')
        image, labels[index] = item
        if large:
            histogram += batches.pixel_histogram(torch.from_numpy(image))
        else:
            images[index] = image
    if part == 'train':
        _largest_label[name, root] = int(labels.max())
    classes = getattr(dataset, 'classes', None)
    if classes is None:
        if (name, root) not in _largest_label:
            load(name, root, 'train', image_size, workers)
        classes = range(_largest_label[name, root] + 1)
        if part == 'train' and len(classes) > len(dataset) + 1000:
            raise UserError(f'--dataset {name} (train) has a label {classes[-1]}, which makes {len(classes)} classes '
                            f'of {len(dataset)} images; number the classes from 0, or name them all in `classes`')
    classes = [str(one) for one in classes]
    if large:
        return LazySplit(dataset, torch.arange(len(dataset)), labels, classes, image_size, histogram)
    return Split(torch.from_numpy(images), labels, classes)


_largest_label = {}  # of training sets that have been read, as reading one takes long


def _make(name, root, part):
    module, _, attribute = name.partition(':')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(make).parameters
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f'--dataset {name} cannot be imported ({type(error).__name__}: {one_line(error)}); it means '
                        f'{attribute} in {module}.py, or in an installed module') from error
    offered = {'root': root, 'train': part == 'train', 'split': part}
    taken = {key: value for key, value in offered.items() if key in parameters}
    if not {'train', 'split'} & set(taken):
        raise UserError(f'--dataset {name} must have a parameter train (True or False) or split (train or test), '
                        f'which chooses the part; it has {", ".join(parameters) or "none"}')
    try:
        dataset = make(**taken)
        empty = len(dataset) == 0
    except Exception as error:
        raise UserError(f'--dataset {name} ({part}) cannot be made ({type(error).__name__}: '
                        f'{one_line(error)})') from error
    if empty:
        raise UserError(f'--dataset {name} ({part}) is empty; it needs at least one image')
    return dataset


class _Items(torch.utils.data.Dataset):
    """The items of a data set of one's own, (uint8 array (size, size, 3), label), or a sentence where there is none."""

    def __init__(self, dataset, image_size):
        self.dataset, self.image_size = dataset, image_size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, label = _item(self.dataset, index, self.image_size)
            return np.array(image), label  # a copy, as torch warns of what cannot be written to
        except ValueError as error:
            return one_line(error)


def _item(dataset, index, image_size):
    """(PIL image of image_size x image_size, label); ValueError with the reason. What is drawn depends on the index
    alone.
    """
    with batches.random_state_kept():
        batches.seed_everything((0, 0), index)
        try:
            image, label = dataset[index]
        except Exception as error:
            raise ValueError(f'a pair (image, label) is expected, and there was {type(error).__name__}: '
                             f'{one_line(error)}'
                             ) from error
    try:
        label = operator.index(label.item() if hasattr(label, 'item') else label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'the label must be a whole number, was given {str(label)[:50]}') from error
    return ImageOps.fit(_as_pil(image), (image_size, image_size), Image.Resampling.BILINEAR), label


def _as_pil(image):
    """A PIL image, or uint8 or float in [0, 1] of shape (H, W), (H, W, C) or (C, H, W), as an RGB PIL image."""
    if isinstance(image, Image.Image):
        return as_rgb(image)
    pixels = np.asarray(image.float() if torch.is_tensor(image) and image.is_floating_point() else image)
    shape = pixels.shape
    channels_first = pixels.ndim == 3 and shape[0] in (1, 3) and (torch.is_tensor(image) or shape[2] not in (1, 3))
    pixels = pixels.transpose(1, 2, 0) if channels_first else pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError('an image must be (H, W), (H, W, 3) or (3, H, W), or a PIL image, was given '
                         f'{shape or type(image)}')
    if pixels.dtype.kind == 'f' and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (255 * pixels).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f'an image must be uint8, or float from 0 to 1, was given {pixels.dtype} '
                         f'from {pixels.min():.4g} to {pixels.max():.4g}')
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
