"""A checkpoint of cifar.py or imagenet.py, opened: its network, ready to evaluate, and the images of its run."""
import importlib
import os
import zlib
from typing import NamedTuple

import torch

import smoothout
from utils import batches as image_batches, checkpoint, conditions, datasets, device as devices, folders, methods
from utils import resume
from utils.errors import UserError
from utils.flags import bounded, cuda_device, file_path
from utils.lab.landscape import Landscape

# imported when they are needed, as torchvision takes a second or more
SCRIPTS = {'cifar.py': 'cifar', 'imagenet.py': 'imagenet'}

# Names of the SmoothOut project's models, which its commands give as --model.
SMOOTHOUT_NAMES = {'cifar10_shallow': 'shallow', 'cifar100_shallow': 'shallow', 'mnist_f1': 'mlp'}

KEPT = 4  # gigabytes of images, in memory
SUMMED = 500  # images in a row of a check sum, then their labels: --test-batch of cifar.py, as earlier files have it


class Subject(NamedTuple):
    path: str
    script: object  # the module that trained it
    state: dict  # the checkpoint
    args: object  # the flags of its run, with those of this script in their place
    model: torch.nn.Module  # on the device, in evaluation
    device: torch.device


def add_arguments(parser, modes, default_modes, precision=None):
    """The flags of every script that opens checkpoints: the checkpoints, and what stands in for the flags of their run.

    modes: how many of train, test and val are looked at, as argparse's nargs.
    """
    parser.add_argument('files', type=file_path, metavar='FILE', nargs='*', help='a checkpoint')
    parser.add_argument('--evaluate', type=file_path, metavar='FILE', help='the same as FILE')
    group = parser.add_argument_group('images; the defaults are those of the run')
    group.add_argument('--mode', nargs=modes, choices=('test', 'train', 'val'), default=default_modes,
                       help='which images; those of training augmented as in training, each once '
                       f'({default_modes if modes is None else " ".join(default_modes)})')
    group.add_argument('--no-augment', action='store_true', help='images as they are')
    group.add_argument('--images', type=bounded(int, 1), metavar='N', help='at most N of each, drawn at random (all)')
    group.add_argument('-d', '--dataset', metavar='NAME',
                       type=lambda text: text if text == 'imagenet' else datasets.dataset_name(text),
                       help=f'{", ".join(datasets.DATASETS)}, or module:Class; of checkpoints of imagenet.py imagenet')
    group.add_argument('--data', type=file_path, metavar='DIR', help='where the data is')
    group.add_argument('-j', '--workers', type=bounded(int, 1), metavar='N', help='threads that read images')
    group.add_argument('-b', '--test-batch', '--batch-size', '--mini-batch-size', '--b', type=bounded(int, 1),
                       metavar='N', help='in one pass')
    group = parser.add_argument_group('run')
    group.add_argument('-a', '--arch', '--model', metavar='NAME',
                       help='not needed; refused if it is not that of the checkpoint')
    group.add_argument('--precision', choices=('fp32', 'bf16', 'fp64'), default=precision,
                       help=f'bf16: autocast ({precision or "that of the run"})')
    group.add_argument('--gpu-id', '--gpus', type=cuda_device, metavar='ID',
                       help='the CUDA device to use, as in CUDA_VISIBLE_DEVICES (0)')
    group.add_argument('--manualSeed', type=bounded(int, 0, 2 ** 32 - 1), dest='seed', default=0, metavar='N',
                       help='of all that is drawn here (0)')
    group.add_argument('-o', '--out', type=file_path, metavar='DIR', help='where results go (beside the checkpoint)')


def files_of(args, parser, at_most=None):
    """The checkpoints that the command line names, at least one."""
    named = [path for path in (args.evaluate, *args.files, getattr(args, 'slave_evaluate', None)) if path]
    if not named:
        parser.error('a checkpoint is required: FILE')
    if at_most and len(named) > at_most:
        parser.error(f'at most {at_most} checkpoint{"s" * (at_most > 1)} can be looked at here, and {len(named)} were '
                     'given')
    if len({os.path.realpath(path) for path in named}) < len(named):
        parser.error(f'a checkpoint is named twice in {" ".join(named)}')
    if len({stem(args, path) for path in named}) < len(named):
        where = f' in --out {args.out}; leave --out away' if args.out else '; rename one of them'
        parser.error(f'the results of {" and ".join(named)} would have the same names{where}')
    return named


def open_checkpoint(path, args, parser):
    """A `Subject`; `args` are the flags of `add_arguments`. A flag that does not fit the checkpoint ends the script."""
    state = checkpoint.read(path)
    check_output_folder(os.path.dirname(stem(args, path)))
    if state['script'] not in SCRIPTS:
        raise UserError(f'{path} is a checkpoint of {state["script"]}, not of {" or ".join(SCRIPTS)}')
    script = importlib.import_module(SCRIPTS[state['script']])
    options = {name: value for name, value in state['network'].items() if value is not None}
    held = resume.inherited_flags(state) | options
    asked = script.make_parser().parse_args([], defaults=held)
    for name in ('dataset', 'data', 'workers', 'test_batch', 'precision', 'gpu_id'):
        if name == 'dataset' and args.dataset == 'imagenet' and state['script'] == 'imagenet.py':
            continue  # it has no such flag, as it has no other data
        if name == 'dataset' and args.dataset == 'imagenet':
            parser.error(f'--dataset imagenet is for checkpoints of imagenet.py, and {path} is of {state["script"]}')
        if getattr(args, name) is not None:
            if not hasattr(asked, name):
                parser.error(f'{parser.spelling(name)} is not used by {path}, a checkpoint of {state["script"]}')
            setattr(asked, name, getattr(args, name))
    if SMOOTHOUT_NAMES.get(args.arch, args.arch) not in (None, state['network']['arch']):
        raise UserError(f'{path} holds the architecture {state["network"]["arch"]}, but --arch {args.arch} was given')
    if 'data' in args.given and getattr(asked, 'dataset', None) == 'digits':
        parser.error('--data is not used by --dataset digits, which scikit-learn brings along')
    modes = [args.mode] if isinstance(args.mode, str) else args.mode
    looks_at_training = 'train' in modes or getattr(args, 'update_bn', False)
    if 'val' in modes and not getattr(asked, 'val_split', None):
        parser.error(f'--mode val needs a run with --val-split, and {path} is of one without')
    asked.resume, asked.mixup, asked.cutmix = path, 0, 0  # what is mixed has no class to be right about
    asked.train_batch, asked.batch_multiplier = asked.test_batch, 1
    device = devices.set_up(asked)
    try:
        model = script.build(asked, state['network'])
    except ValueError as error:
        raise UserError(f'{path} holds a network that cannot be built: {error}') from error
    checkpoint.load_model(model, state, state['network'], path, to_test=True)
    methods.detach_loss_terms(model)
    if args.no_augment:
        if not looks_at_training and not image_batches.input_transform(asked, model):
            parser.error(f'--no-augment changes nothing about --mode {" ".join(modes)}, whose images are never '
                         'augmented')
        asked.no_augment, asked.cutout, asked.auto_augment = True, 0, None
    if 'workers' in args.given and hasattr(script, 'uses_workers') and not script.uses_workers(asked, model):
        parser.error('--workers is for --dataset folder or module:Class, --auto-augment or a model with transforms of '
                     'its own')
    if getattr(args, 'perturb_batch_norm', False) and not smoothout.batch_norm_parameters(model):
        parser.error(f'--perturb-batch-norm is not used by {path}, a network without BatchNorm')
    model.to(device, torch.float64 if asked.precision == 'fp64' else None, memory_format=torch.channels_last)
    return Subject(path, script, state, asked, model.eval(), device)


def check_output_folder(folder, flag='--out'):
    """UserError unless files can be written to `folder`, which may not be there yet."""
    existing = folder or '.'
    while not os.path.exists(existing):
        existing = os.path.dirname(existing) or '.'
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise UserError(f'results cannot be written to {folder or "."}, as {existing} is not a folder that may be '
                        f'written to; give another {flag}')


def check_alike(subjects):
    """UserError unless all of these can be measured on images of one data set."""
    first, *others = subjects
    for other in others:
        if any(other.state[name] != first.state[name] for name in ('classes', 'mean', 'std')):
            raise UserError(f'{first.path} and {other.path} were trained on different images, so they cannot be '
                            'compared')
        if _prepared(first) != _prepared(other):
            raise UserError(f'{first.path} and {other.path} were trained on images of other sizes, so they cannot be '
                            'compared')
        # Of images in files, mean and std are ImageNet's, whatever the folder.
        if hasattr(first.script, 'preset') and os.path.realpath(first.args.data) != os.path.realpath(other.args.data):
            raise UserError(f'{first.path} and {other.path} were trained on images of {first.args.data} and '
                            f'{other.args.data}; give the --data to measure both on')
        if any(image_batches.input_transform(one.args, one.model) for one in (first, other)):
            raise UserError('a network that transforms its images itself cannot be compared with another; give '
                            '--no-augment')


def _prepared(subject):
    """How the images to test are prepared: `preset` of imagenet.py, the size of cifar.py."""
    return subject.script.preset(subject.args) if hasattr(subject.script, 'preset') else subject.args.image_size


def images_of(subject, part, args):
    """The 'train', 'test' or 'val' images of a checkpoint's run in batches, the same whenever one goes over them."""
    asked, script = subject.args, subject.script
    split = script.load_part(asked, subject.state, part)
    if args.images and args.images < len(split.labels):
        chosen = torch.randperm(len(split.labels), generator=image_batches.seeded_generator(args.seed))[:args.images]
        split = split.subset(chosen.sort().values)
    transforms = image_batches.input_transform(asked, subject.model)
    own_transforms = {'transforms': transforms} if transforms else {}
    batches = script.make_batches(asked, subject.state, part, split, subject.device, **own_transforms)
    shuffled = part == 'train' and batches.augments and not asked.no_augment
    if not (shuffled or batches.transform):
        return batches

    def one_pass():
        known = len(getattr(batches, 'skipped', ()))
        yield from (batch for batch in (batches.shuffled(args.seed, 0) if shuffled else batches) if len(batch[1]))
        if len(getattr(batches, 'skipped', ())) > known:
            folders.report_skipped({part: batches})

    # Images that are read from files are kept, where they fit, so that they are read once.
    large = hasattr(batches, 'gigabytes') and batches.gigabytes() > KEPT
    return Replayed(batches, one_pass) if large else Recorded(batches, one_pass())


def images_of_each(subjects, part, args):
    """For each checkpoint in turn (its images, what describes them): one set for all, read and described once, but of
    'train' and 'val' those of its own run where the flags and the seed of the run draw them, or their labels, from the
    training set.
    """
    shared = None
    for subject in subjects:
        own = part != 'test' and bool(conditions.drawn_by(subject.args))
        if own or shared is None:
            batches = images_of(subject, part, args)
            described = batches, {'mode': part, **describe_images(batches)}
            if not own:
                shared = described
        yield described if own else shared


class Recorded(list):
    """What one pass over batches gave, (inputs, targets) each, to be iterated again without making it again."""

    def __init__(self, batches, one_pass):
        super().__init__(one_pass)
        self.num_classes, self.mean, self.std = batches.num_classes, batches.mean, batches.std
        if not self:
            raise UserError('none of the images can be read')
        self.labels = torch.cat([targets for _, targets in self])


class Replayed:
    """As Recorded, for what does not fit in memory: `one_pass()` gives the same batches again and again."""

    def __init__(self, batches, one_pass):
        self.batches, self.one_pass = batches, one_pass
        self.num_classes, self.mean, self.std = batches.num_classes, batches.mean, batches.std

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return self.one_pass()

    @property
    def labels(self):
        """As many as images can be read, which is known after a pass."""
        return self.batches.labels[:len(self.batches.labels) - len(self.batches.skipped)]


def fingerprint(batches):
    """A number that tells these images and labels, in this order, from others, whatever the size of the batches."""
    number, held = 0, None
    for inputs, targets in batches:
        batch = inputs.permute(0, 2, 3, 1).cpu(), targets.cpu()
        held = batch if held is None else [torch.cat(both) for both in zip(held, batch)]
        while len(held[1]) > SUMMED:
            number, held = _add(number, [part[:SUMMED] for part in held]), [part[SUMMED:] for part in held]
    return number if held is None else _add(number, held)


def _add(number, parts):
    for part in parts:
        number = zlib.crc32(part.contiguous().numpy(), number)
    return number


def landscape(subject, batches):
    return Landscape(subject.model, batches, subject.args.precision)


def names_of(paths):
    """A name for each checkpoint: its file and as many folders around it, at least one, as tell it from the others."""
    parts = [os.path.abspath(_bare(path)).split(os.sep) for path in paths]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ['/'.join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def stem(args, path):
    """Where results about the checkpoint at `path` go, without what tells one result from another: beside it, or into
    --out.
    """
    return os.path.join(args.out, names_of([path])[0].replace('/', '-')) if args.out else _bare(path)


def _bare(path):
    return path.removesuffix('.tar').removesuffix('.pth').removesuffix('.pt')


def description(subject):
    """What tells this checkpoint from others, wherever it lies: its epoch, and a check sum of its weights and buffers,
    which is the same in each --precision.
    """
    number = 0
    for tensor in subject.model.state_dict().values():
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor  # as they are in the checkpoint
        number = zlib.crc32(tensor.cpu().contiguous().numpy(), number)
    return {'epoch': subject.state['epoch'], 'crc32': number}


def how_many(numbers):
    """Numbers of images as a word: 500, or 400 to 600."""
    return ' to '.join(map(str, sorted({min(numbers), max(numbers)})))


def describe_images(batches):
    number = fingerprint(batches)  # a pass, after which it is known how many images can be read
    return {'number': len(batches.labels), 'crc32': number}
