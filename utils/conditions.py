"""What is done to a training set on purpose: fewer images, other shares of the classes, wrong labels.

Each function is fixed by a seed of its own and leaves the global random state alone.
"""
import numpy as np
import torch

from utils.errors import UserError
from utils.flags import bounded


def add_arguments(group):
    group.add_argument('--val-split', type=bounded(float, 0, 0.9, above=True), metavar='F',
                       help='part of the training set that chooses the best epoch; the test set is then read once')
    group.add_argument('--imbalance', choices=('exp', 'step'), help='long-tailed training set: fewer and fewer images '
                                                                    'from class '
                       'to class, or few in the second half of the classes')
    group.add_argument('--imbalance-factor', type=bounded(float, 0, 1, above=True), metavar='F',
                       help='images of the rarest class over images of the most frequent one (0.1)')
    group.add_argument('--imbalance-seed', type=bounded(int, 0, 2 ** 32 - 1), metavar='N',
                       help='which images stay; --manualSeed does not change that (0)')
    group.add_argument('--train-fraction', type=bounded(float, 0, 1, above=True), metavar='F',
                       help='train on this part of each class, at least one image')
    group.add_argument('--label-noise', type=bounded(float, 0, 1, above=True), metavar='F',
                       help='give this part of the training images a wrong label, any other with equal chance')


def check_arguments(args, parser):
    """Refuse the flags of an imbalance without --imbalance, and fill in those that are not given."""
    for name, default in (('imbalance_factor', 0.1), ('imbalance_seed', 0)):
        if args.imbalance is None and name in args.given:
            parser.error(f'{parser.spelling(name)} is not used without --imbalance exp or --imbalance step')
        if args.imbalance and getattr(args, name) is None:
            setattr(args, name, default)


def left_by(args):
    """Words for what leaves fewer images to train on, such as ' that --val-split 0.1 leaves'; none without such a
    flag.
    """
    words = _words(args, 'val_split', 'imbalance', 'train_fraction')
    return f' that {words} leaves' if words else ''


def drawn_by(args):
    """Words for the flags that draw images, or their labels, from the training set; none without such a flag."""
    return _words(args, 'val_split', 'imbalance', 'train_fraction', 'label_noise')


def _words(args, *names):
    given = ((name.replace('_', '-'), getattr(args, name, None)) for name in names)
    return ' and '.join(f'--{flag} {value}' for flag, value in given if value)


def apply(args, split):
    """(training split, validation split or None) of the whole training set, under the conditions of `args`.

    The validation images are set aside first: they stay as balanced and as well labelled as the test set is.
    """
    val = None
    if args.val_split:
        split, val = split_validation(split, args.val_split, args.seed)
    if args.imbalance:
        split = imbalanced(split, args.imbalance, args.imbalance_factor, args.imbalance_seed)
    if args.train_fraction:
        split = fraction_of(split, args.train_fraction, args.seed)
    if args.label_noise:
        split = with_label_noise(split, args.label_noise, args.seed)
    return split, val


def split_validation(split, fraction, seed):
    """(training part, validation part). Of each class a share of `fraction` is set aside, at least one image, and one
    remains.

    Raises UserError if a class has a single image.
    """
    counts = split.class_counts()
    if min(counts) < 2:
        raise UserError(f'--val-split {fraction} needs two images of each class, and '
                        f'{split.classes[np.argmin(counts)]} has '
                        f'{min(counts)} of {sum(counts)}')
    sizes = [min(max(round(count * fraction), 1), count - 1) for count in counts]
    chosen = choose(split, sizes, np.random.default_rng((seed, 0)))
    rest = np.setdiff1d(np.arange(len(split.labels)), chosen)
    return split.subset(torch.from_numpy(rest)), split.subset(torch.from_numpy(chosen))


def imbalanced_sizes(kind, factor, num_classes, images):
    """Images of each class in a long-tailed set made of `images` balanced ones (Cao et al., arXiv 1906.07413, as their
    code).

    exp   int(n_max factor^(c / (C - 1))) of class c, where C = num_classes and n_max = images / C
    step  int(n_max) of the first half of the classes, int(n_max factor) of the others; of an odd C the larger half are
          those
    """
    largest = images / num_classes
    if kind == 'exp':
        return [int(largest * factor ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
    return [int(largest) if c < num_classes // 2 else int(largest * factor) for c in range(num_classes)]


def imbalanced(split, kind, factor, seed):
    """A long-tailed part of `split`; which images stay is that of the LDAM-DRW code with rand_number = seed.

    A class with fewer images than it should have keeps all. Raises UserError if a class would have none.
    """
    sizes = imbalanced_sizes(kind, factor, len(split.classes), len(split.labels))
    if min(sizes) < 1:
        raise UserError(f'--imbalance-factor {factor} leaves class {split.classes[np.argmin(sizes)]} without an '
                        'image, as the '
                        f'{len(split.classes)} classes have {len(split.labels) / len(split.classes):g} each; give a '
                        'larger one')
    return split.subset(torch.from_numpy(choose(split, sizes, np.random.RandomState(seed))))


def fraction_of(split, fraction, seed):
    """A share of `fraction` of the images of each class, at least one."""
    sizes = [max(round(count * fraction), 1) for count in split.class_counts()]
    return split.subset(torch.from_numpy(choose(split, sizes, np.random.default_rng((seed, 1)))))


def choose(split, sizes, generator):
    """Indices, ascending, of sizes[c] images of each class c drawn at random, or of all where there are fewer."""
    labels = split.labels.numpy()
    drawn = [generator.permutation(np.flatnonzero(labels == c))[:size] for c, size in enumerate(sizes)]
    return np.sort(np.concatenate(drawn))


def with_label_noise(split, fraction, seed):
    """Symmetric noise: round(fraction * N) of the N images get another label, each of the others with the same
    probability.

    Raises UserError if there is only one class, or no image gets another label.
    """
    classes, images = len(split.classes), len(split.labels)
    if classes < 2:
        raise UserError(f'--label-noise {fraction} needs another class to take a wrong label from, and there is only '
                        'one class')
    if images and not round(fraction * images):
        raise UserError(f'--label-noise {fraction} is of {images} images less than one, which changes no label')
    generator = np.random.default_rng((seed, 2))
    wrong = generator.permutation(images)[:round(fraction * images)]
    labels = split.labels.clone()
    labels[wrong] = (labels[wrong] + torch.from_numpy(generator.integers(1, classes, len(wrong)))) % classes
    return split._replace(labels=labels)
