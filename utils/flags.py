"""The command line: argparse with the habits that all scripts share, the flags of both scripts, and what each flag
means.
"""
import argparse
import math
import os
import re
import sys
from typing import NamedTuple

from utils import distributed
from utils.errors import shown


class Meaning(NamedTuple):
    """What a flag means beyond its effect.

    result: it changes what is computed, so that compare.py tells runs apart by it.
    resume: START  it is about one start of the script; a resumed run does not inherit it
            FREE   it may change when a run is resumed, also by --resume auto
            ASKED  it may change with --resume FILE; --resume auto refuses to change it
            NEVER  it cannot change
            MODEL  it describes the network, which must be that of the checkpoint
            BEGIN  it says where a new run begins, so a resumed run refuses it
    evaluate: --evaluate uses it.
    """
    result: bool
    resume: str
    evaluate: bool


FLOAT32 = (2 - 2 ** -23) * 2.0 ** 127, 2.0 ** -126  # the largest number, and the smallest normal one above 0
START, FREE, ASKED, NEVER, MODEL, BEGIN = 'start', 'free', 'asked', 'never', 'model', 'begin'

# Every flag of cifar.py and imagenet.py by its name in `args`. A flag of a method needs no line: it is (True, ASKED,
# False).
FLAGS = {name: Meaning(*meaning) for name, *meaning in (
    # flag               changes the result   on resume   used by --evaluate
    # data
    ('dataset',          True,                ASKED,      True),
    ('data',             True,                FREE,       True),  # compare.py ignores it where the data set has a name
    ('workers',          False,               FREE,       True),
    ('no_cache',         False,               START,      True),
    ('image_size',       True,                ASKED,      True),
    ('resize',           True,                ASKED,      True),
    ('strict',           False,               ASKED,      True),
    ('val_split',        True,                NEVER,      False),
    ('imbalance',        True,                NEVER,      False),
    ('imbalance_factor', True,                NEVER,      False),
    ('imbalance_seed',   False,               NEVER,      False),  # a seed, as that of manualSeed below
    ('train_fraction',   True,                NEVER,      False),
    ('label_noise',      True,                NEVER,      False),
    # augmentation
    ('no_augment',       True,                ASKED,      False),
    ('cutout',           True,                ASKED,      False),
    ('crop_padding',     True,                ASKED,      False),
    ('crop_mode',        True,                ASKED,      False),
    ('auto_augment',     True,                ASKED,      False),
    ('random_erase',     True,                ASKED,      False),
    ('mixup',            True,                ASKED,      False),
    ('cutmix',           True,                ASKED,      False),
    ('hflip',            True,                ASKED,      False),
    # model
    ('arch',             True,                MODEL,      True),
    ('depth',            True,                MODEL,      True),
    ('block_name',       True,                MODEL,      True),
    ('cardinality',      True,                MODEL,      True),
    ('widen_factor',     True,                MODEL,      True),
    ('growth_rate',      True,                MODEL,      True),
    ('compression_rate', True,                MODEL,      True),
    ('drop_rate',        True,                MODEL,      True),
    ('alpha',            True,                MODEL,      True),
    ('widths',           True,                MODEL,      True),
    ('base_width',       True,                MODEL,      True),
    ('feature_dim',      True,                MODEL,      True),
    ('pretrained',       True,                BEGIN,      True),
    ('init',             True,                BEGIN,      False),
    # training
    ('train_batch',      True,                ASKED,      False),
    ('mini_batch',       True,                ASKED,      False),
    ('batch_multiplier', True,                ASKED,      False),
    ('test_batch',       False,               FREE,       True),
    ('test_every',       True,                ASKED,      False),  # which epochs can be the best one
    ('epochs',           True,                FREE,       False),
    ('start_epoch',      True,                BEGIN,      False),
    ('optimizer',        True,                ASKED,      False),  # the checkpoint has the state of one class
    ('lr',               True,                ASKED,      False),
    ('lr_schedule',      True,                ASKED,      False),
    ('schedule',         True,                ASKED,      False),
    ('lr_step_size',     True,                ASKED,      False),
    ('gamma',            True,                ASKED,      False),
    ('warmup',           True,                ASKED,      False),
    ('lr_start',         True,                ASKED,      False),
    ('lr_floor',         True,                ASKED,      False),
    ('bias_lr_factor',   True,                ASKED,      False),
    ('momentum',         True,                ASKED,      False),
    ('nesterov',         True,                ASKED,      False),
    ('weight_decay',     True,                ASKED,      False),
    ('optimizer_eps',    True,                ASKED,      False),
    ('base_batch',       True,                ASKED,      False),
    ('lr_scaling',       True,                ASKED,      False),
    ('epoch_scaling',    True,                ASKED,      False),
    ('clip_norm',        True,                ASKED,      False),
    ('label_smoothing',  True,                ASKED,      False),
    ('dropout',          True,                ASKED,      False),
    ('flood',            True,                ASKED,      False),
    ('adversarial',      True,                ASKED,      False),
    ('ema',              True,                ASKED,      False),
    ('swa',              True,                ASKED,      False),
    ('tta',              True,                ASKED,      True),
    # method
    ('method',           True,                ASKED,      False),
    ('coef',             False,               START,      False),  # short for a method's own flag, which has the value
    ('method_start',     True,                ASKED,      False),
    ('method_ramp',      True,                ASKED,      False),
    # run
    ('checkpoint',       False,               START,      False),
    ('overwrite',        False,               START,      False),
    ('resume',           False,               START,      True),
    ('checkpoint_every', False,               START,      False),
    ('evaluate',         False,               START,      True),
    ('seed',             False,               NEVER,      False),
    ('deterministic',    False,               ASKED,      True),
    ('precision',        True,                ASKED,      True),
    ('compile',          True,                ASKED,      False),
    ('gpu_id',           False,               START,      True),
)}


def meaning(name):
    """The `Meaning` of a flag by its name in `args`."""
    return FLAGS.get(name, Meaning(True, ASKED, False))


def with_todays_names(values):
    """Flags (name -> value) of a checkpoint or args.json, with names of earlier versions replaced."""
    values = dict(values)
    if 'autoaugment' in values and 'auto_augment' not in values:
        values['auto_augment'] = 'autoaugment' if values['autoaugment'] else None
    values.pop('autoaugment', None)
    if 'beta_decay' in values and 'beta_schedule' not in values:  # it was the only one, when it had no name
        values.update(beta_schedule='decay', beta=None if values.get('beta') == 100 else values.get('beta'))
    return values


class Parser(argparse.ArgumentParser):
    """Errors are one sentence; flags are read without regard to case, `-` and `_`: `--train_batch`, `--manual-seed`.

    Of a flag that is given twice the last counts, so that a command can be repeated with a change at its end. No value
    is empty or `--`, and numbers are `bounded`, also those of a plain type=float or type=int. What follows a bare `--`
    is positional. After `parse_args` the namespace has `given`: the set of names that the command line set.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)
        for kind in (int, float):
            self.register('type', kind, bounded(kind))
        # So that -1:0.1:2 is a value too; no flag here begins with a digit.
        self._negative_number_matcher = re.compile(r'-\.?\d')

    def parse_args(self, args=None, defaults=None):
        """`defaults` (name -> value) of a checkpoint replace the declared defaults where the parser knows the name."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index('--') if '--' in words else len(words)
        words, behind = self._canonical(words[:end]), words[end + 1:]
        declared = {action.dest: action.default for action in self._actions if action.default is not argparse.SUPPRESS}
        unset = object()
        read = vars(super().parse_intermixed_args(words, argparse.Namespace(**dict.fromkeys(declared, unset))))
        if behind:
            self._append_positional(read, behind)
        given = {name: value for name, value in read.items() if value is not unset}
        inherited = {name: value for name, value in (defaults or {}).items() if name in declared}
        for action in self._actions:
            if action.dest in inherited.keys() - given.keys():
                self._check_inherited(action, inherited[action.dest])
        return Arguments(**{**declared, **inherited, **given}, given=set(given))

    def _append_positional(self, read, words):
        """Add `words`, which follow a bare `--`, to the positional values in `read`."""
        actions = self._get_positional_actions()
        if not actions:
            self.error(f'unrecognized arguments: {" ".join(words)}')
        held = read[actions[0].dest]
        try:
            read[actions[0].dest] = [*(held if isinstance(held, list) else []), *self._get_values(actions[0], words)]
        except argparse.ArgumentError as error:
            self.error(str(error))

    def _get_values(self, action, words):  # of argparse, which drops a value `--`
        for word in {'', '--'} & set(words):
            raise argparse.ArgumentError(action, f'must have a value, was given {word or "an empty one"}')
        return super()._get_values(action, words)

    def _check_inherited(self, action, value):
        """Refuse a value of a checkpoint that the flag could not have on the command line."""
        if value == action.default and type(value) is type(action.default):
            return
        several, listed = action.nargs in ('+', '*'), isinstance(value, (list, tuple))
        for one in value if several and listed else [value]:
            try:
                if several and not listed:
                    raise ValueError('must be a list')
                if action.nargs == 0 and type(one) is not bool:
                    raise ValueError('must be True or False')
                word = one if action.nargs == 0 or action.type is None else action.type(str(one))
                if action.choices and word not in action.choices:
                    raise ValueError(f'there are {", ".join(map(str, action.choices))}')
                if action.nargs != 0 and type(word) is not type(one) and (type(word), type(one)) != (float, int):
                    raise ValueError(f'must be a {"word" if action.type is None else type(word).__name__}')
            except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
                self.error(f'{self.spelling(action.dest)} {one} of the checkpoint is not known here; {error}')

    def names(self):
        """The names in `args` of all flags."""
        return {action.dest for action in self._actions}

    def spelling(self, name):
        """The flag, such as --manualSeed, of a name in `args`, such as seed."""
        words = next((action.option_strings for action in self._actions if action.dest == name), ())
        return next((word for word in words if word.startswith('--')), f'--{name.replace("_", "-")}')

    def _canonical(self, words):
        known = {_bare(flag): flag for flag in self._option_string_actions if flag.startswith('--')}
        result = []
        for word in words:
            flag, equals, value = word.partition('=')
            result.append(known.get(_bare(flag), flag) + equals + value if word.startswith('--') else word)
        return result

    def error(self, message):
        distributed.pause_unless_first()
        self.exit(2, f'{self.prog}: error: {shown(message)}\n')


class Arguments(argparse.Namespace):
    """The flags, name -> value. From `watch` on it sees which of them are set, and which of these are read again."""

    __slots__ = ('_watched',)  # name -> whether it has been set since; without those that were read after that

    def watch(self):
        self._watched = dict.fromkeys(vars(self), False)

    def __setattr__(self, name, value):
        if name in getattr(self, '_watched', ()):
            self._watched[name] = True
        super().__setattr__(name, value)

    def __getattribute__(self, name):
        if not name.startswith('_') and getattr(self, '_watched', {}).get(name):
            del self._watched[name]
        return super().__getattribute__(name)

    def not_read(self):
        """The flags that were set since `watch` and not read after it; each is told once."""
        names = [name for name, was_set in self._watched.items() if was_set]
        for name in names:
            del self._watched[name]
        return names


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=110)


def _bare(flag):
    return flag.lower().replace('-', '').replace('_', '')


def bounded(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: an int or float in [low, high], or in (low, high] with above=True.

    An int fits into int64. A float is 0 or a normal number of float32, as libraries fail at what is larger or smaller.
    """
    what = 'a whole number' if kind is int else 'a number'
    largest, smallest = (2 ** 63 - 1, 0) if kind is int else FLOAT32

    def convert(text):
        given = f'was given {text if len(text) <= 50 else text[:50] + "..."}'
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'must be {what}{bounds}, {given}') from None
        if not (low < value if above else low <= value) or value > high:
            raise argparse.ArgumentTypeError(f'must be {what}{bounds}, {given}')
        if abs(value) > largest:
            raise argparse.ArgumentTypeError(f'must be {what} of at most {largest:g}, {given}')
        if abs(value) < smallest and re.search('[1-9]', text.lower().partition('e')[0]):
            raise argparse.ArgumentTypeError(f'must be {"" if above else "0 or "}at least {smallest:.3g}, {given}')
        return value

    bounds = '' if low == -math.inf else f' {"above" if above else "of at least"} {low}'
    bounds += '' if high == math.inf else f'{" and" * bool(bounds)} {"at most" if bounds else "of at most"} {high}'
    return convert


def pixels(text):
    """An argparse type: a share of the way from black to white, such as 8/255."""
    try:
        above, _, below = text.partition('/')
        value = bounded(float, 0)(above) / bounded(float, 0)(below or '1')
    except (argparse.ArgumentTypeError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError('must be a share of the way from black to white, from 0 to 1, such as '
                                         f'8/255, was given {text}')
    return value


def file_path(text):
    """An argparse type: a path, with ~ replaced by the home folder also where the shell did not."""
    if not text:
        raise argparse.ArgumentTypeError('must be a path, was given an empty word')
    return os.path.expanduser(text)


def cuda_device(text):
    """An argparse type: one CUDA device, as CUDA_VISIBLE_DEVICES names it."""
    if not re.fullmatch(r'[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+', text):
        raise argparse.ArgumentTypeError('must be one CUDA device, such as 0 (torchrun uses several), was given '
                                         f'{text}')
    return text


def add_training_arguments(group, train_batch, test_batch):
    """train_batch, test_batch: the defaults."""
    group.add_argument('--train-batch', type=bounded(int, 1), default=train_batch, metavar='N',
                       help=f'images of a batch, all processes together ({train_batch})')
    group.add_argument('--mini-batch', type=bounded(int, 1), metavar='N',
                       help='ghost batches of N: pass each batch in parts with BatchNorm statistics (and noise) of '
                            'their own')
    group.add_argument('--batch-multiplier', type=bounded(int, 1), default=1, metavar='N',
                       help='step along the mean gradient of N batches (1)')
    group.add_argument('--test-batch', type=bounded(int, 1), default=test_batch, metavar='N', help=f'({test_batch})')
    group.add_argument('--bias-lr-factor', type=bounded(float, 0.001, 1000), default=1.0, metavar='F',
                       help='learning rate of BatchNorm biases, as a multiple of lr; their weight decay is divided by '
                            'it, so that a step of SGD or AdamW shrinks them as before (1)')
    group.add_argument('--clip-norm', type=bounded(float, 0, above=True), metavar='NORM',
                       help='largest norm of the gradient')
    group.add_argument('--label-smoothing', type=bounded(float, 0, 1), default=0.0, metavar='S',
                       help='spread this part of each target over all classes (0)')
    group.add_argument('--dropout', type=bounded(float, 0, 1), default=0.0, metavar='P',
                       help='drop this part of the features before the head of any network (0)')
    group.add_argument('--flood', type=bounded(float, 0, above=True), metavar='B',
                       help='let the training loss not fall below B: train on |loss - B| + B')
    group.add_argument('--adversarial', type=pixels, metavar='EPS',
                       help='train half on images that a step of FGSM changed by EPS, such as 8/255 with white - black '
                            '= 1')
    group.add_argument('--ema', type=bounded(float, 0, 0.999999999, above=True), metavar='DECAY',
                       help='test an exponential moving average of the weights, such as 0.999 at every step')
    group.add_argument('--swa', type=bounded(float, 0, 0.999999), metavar='START',
                       help='test the mean of the weights after each epoch behind this share of the training, such as '
                            '0.75, with BatchNorm statistics of its own')
    group.add_argument('--tta', choices=('mirror',),
                       help='test the mean of the logits of each image and of its mirror image')
    group.add_argument('--test-every', type=bounded(int, 1), metavar='N',
                       help='test after every N epochs, and after the last (each, or so that no more images are tested '
                            'than trained on)')


def add_run_arguments(group, folder):
    """folder: how the default of --checkpoint is named."""
    group.add_argument('-c', '--checkpoint', type=file_path, metavar='DIR', help=f'results ({folder})')
    group.add_argument('--overwrite', action='store_true', help='replace the run in that folder')
    group.add_argument('--resume', type=file_path, metavar='FILE',
                       help='resume from a checkpoint, with its flags unless given here; "auto": from the checkpoint '
                            'in the '
                       'run\'s folder, if there is one')
    group.add_argument('--init', type=file_path, metavar='FILE',
                       help='begin with the weights of a checkpoint, or of a state_dict, where names and shapes fit')
    group.add_argument('--checkpoint-every', type=bounded(int, 1), metavar='N',
                       help='also within an epoch, every N batches')
    group.add_argument('-e', '--evaluate', action='store_true', help='only test the checkpoint of --resume')
    group.add_argument('--manualSeed', type=bounded(int, 0, 2 ** 32 - 1), dest='seed', metavar='N',
                       help='(drawn and printed)')
    group.add_argument('--deterministic', action='store_true', help='same seed, same bits')
    group.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32', help='bf16: autocast (fp32)')
    group.add_argument('--compile', action='store_true', help='torch.compile the model')
    group.add_argument('--gpu-id', type=cuda_device, metavar='ID',
                       help='the CUDA device to use, as in CUDA_VISIBLE_DEVICES (0)')
