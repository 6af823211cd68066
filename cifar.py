"""Train and evaluate on small images: CIFAR-10/100, SVHN, MNIST, Fashion-MNIST, digits, or a folder of your own.

    python cifar.py --arch resnet --method dma --coef 0.5
    python cifar.py --dataset digits --arch resnet --depth 20 --epochs 10      # needs no download

The epochs and steps are in utils/training.py, and those of imagenet.py too.
"""
import functools
import os

import torch

from models import cifar as models
from utils import checkpoint, conditions, data, device as devices, distributed, methods, options, training
from utils.arguments import Parser, number
from utils.errors import UserError, run


def make_parser():
    parser = Parser(prog='cifar.py', usage='python cifar.py --arch resnet --method dma --coef 0.5 [flags]',
                    description='Train and evaluate an image classifier on small images.')
    group = parser.add_argument_group('data')
    group.add_argument('-d', '--dataset', default='cifar10', choices=data.DATASETS, metavar='NAME', help=', '.join(data.DATASETS))
    group.add_argument('--data', default='data', metavar='DIR', help='where the data is, or is downloaded to (data)')
    group.add_argument('-j', '--workers', type=number(int, 1), default=min(4, os.cpu_count() or 1), metavar='N',
                       help='threads that read a folder, processes that transform single images (4, or as many as processors)')
    group.add_argument('--image-size', type=number(int, 32), default=32, metavar='N', help='side of the images of a folder (32)')
    conditions.add_arguments(group)
    group = parser.add_argument_group('augmentation: by default a random crop, and mirroring unless it is digits')
    group.add_argument('--no-augment', action='store_true', help='images as they are')
    group.add_argument('--cutout', type=number(int, 1), metavar='N', help='also erase a square of N pixels a side')
    group.add_argument('--autoaugment', action='store_true', help='also AutoAugment, the policy of SVHN for digits, else of CIFAR-10')
    group = parser.add_argument_group('model')
    group.add_argument('-a', '--arch', default='resnet', choices=models.MODELS, metavar='NAME', help=', '.join(models.MODELS))
    group.add_argument('--depth', type=number(int, 1), metavar='N', help='layers (each architecture has a default)')
    group.add_argument('--block-name', choices=('BasicBlock', 'Bottleneck'), help='resnet, preresnet, densenet, pyramidnet')
    group.add_argument('--cardinality', type=number(int, 1), metavar='N', help='resnext: groups (8)')
    group.add_argument('--widen-factor', type=number(int, 1), metavar='N', help='resnext (4), wrn (10)')
    group.add_argument('--growthRate', type=number(int, 1), dest='growth_rate', metavar='N', help='densenet (12)')
    group.add_argument('--compressionRate', type=number(float, 1), dest='compression_rate', metavar='N', help='densenet (2)')
    group.add_argument('--alpha', type=number(int, 1), metavar='N', help='pyramidnet: how many channels are added on the way (270)')
    group.add_argument('--drop', type=number(float, 0, 1), dest='drop_rate', metavar='P', help='dropout in wrn, densenet (0)')
    group = parser.add_argument_group('training')
    options.add_training_arguments(group, train_batch=128, test_batch=500)
    methods.add_arguments(parser)
    options.add_run_arguments(parser.add_argument_group('run'), 'checkpoints/DATASET-ARCH-METHOD')
    return parser


def parse_arguments():
    """The flags, complete and checked, and the checkpoint to resume from or None. Reads no data."""
    parser = make_parser()
    args, state = options.read(parser, 'cifar.py', run_folder, options.USED_BY_EVALUATE | {'dataset', 'image_size'})
    if 'image_size' in args.given and args.dataset != 'folder':
        parser.error(f'--image-size is for --dataset folder, not {args.dataset}')
    if args.dataset == 'digits' and 'data' in args.given:
        parser.error('--data is not used by --dataset digits, which scikit-learn brings along')
    conditions.check_arguments(args, parser)
    if args.no_augment and (args.cutout or args.autoaugment):
        parser.error(f'--no-augment and {"--cutout" if args.cutout else "--autoaugment"} exclude each other')
    if (args.cutout or 0) > args.image_size:
        parser.error(f'--cutout {args.cutout} is larger than the images, which have {args.image_size} pixels a side')
    methods.check_arguments(args, parser)
    args.network = network_options(args)
    try:
        with torch.device('meta'):
            model = models.build(args.arch, 2, methods.build_head(args), **args.network)
    except ValueError as error:
        parser.error(str(error))
    options.settle(args, state, model.regime, parser)
    if 'workers' in args.given and not uses_workers(args, model):
        parser.error('--workers is for --dataset folder, --autoaugment or a model with transforms of its own')
    return args, state


def network_options(args):
    return models.resolve_options(args.arch, {name: getattr(args, name) for name in models.OPTION_FLAGS})


def run_folder(args):
    """Where the results go unless --checkpoint says it; ValueError for an option that the architecture does not have."""
    return os.path.join('checkpoints', '-'.join([args.dataset, f'{args.arch}{network_options(args).get("depth", "")}', *args.method]))


def main():
    distributed.start()
    args, state = parse_arguments()
    known = None if args.evaluate else data.describe(args.dataset, args.data)
    network = {'arch': args.arch, **args.network, 'num_classes': known.num_classes if known else len(state['classes'])}
    rehearse(args, network)
    if known:
        options.check_batch(args, known.train_size)
        checkpoint.check_folder(args.checkpoint, args.resume, args.overwrite)
    device = devices.set_up(args, compiling=args.compile and not args.evaluate)
    model = build(args, network)
    if state:
        checkpoint.load_model(model, state, network, args.resume, to_test=args.evaluate)
    model.to(device, memory_format=torch.channels_last)
    print(training.headline(args, network, model, device))
    if args.evaluate:
        split = load_split(args, 'test', state['classes'])
        batches = make_batches(args, state, 'test', split, input_transform(args, model), device)
        print(f'{args.resume}, of epoch {state["epoch"]} | {training.in_words("test", training.test(batches, model, args))}')
        return

    state = state or {'script': 'cifar.py', 'epoch': args.start_epoch, 'network': network}
    batches = load_batches(args, state, input_transform(args, model), device)
    problem = options.leaves_one(args, len(batches['train'].labels))
    if problem and any(isinstance(module, torch.nn.BatchNorm1d) for module in model.modules()):
        raise UserError(f'--arch {args.arch} has batch norm on vectors, which {problem}')
    optimizer = methods.build_optimizer(args, model, len(batches['train']))
    if args.resume:
        checkpoint.check_position(state, len(batches['train']), args)
        checkpoint.load_optimizer(optimizer, state, args.resume)
    training.complete(args, state, model, optimizer, batches)


def build(args, network):
    """The network that `network` describes, with the head of the chosen method."""
    own = {name: value for name, value in network.items() if name in models.OPTION_FLAGS}
    return models.build(args.arch, network['num_classes'], methods.build_head(args), **own)


def rehearse(args, network):
    """A pass over images without content: a loss that cannot work is refused before an image is read or a file written."""
    if args.method and not args.evaluate:
        model = build(args, network)
        inputs, targets = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
        try:
            methods.build_criterion(args, model)(model(inputs, targets), targets)
        except ValueError as error:
            raise UserError(str(error)) from error


def input_transform(args, model):
    """The model's own transforms of images, if it has some and no flag about augmentation was given."""
    return (not (args.no_augment or args.cutout or args.autoaugment) and model.input_transform) or {}


def uses_workers(args, model):
    return args.dataset == 'folder' or args.autoaugment or bool(input_transform(args, model))


def load_split(args, part, classes=None):
    """The 'train' or 'test' part of the data; UserError unless its classes are `classes`, those of a checkpoint."""
    split = data.load(args.dataset, args.data, part, args.image_size, args.workers)
    if classes and split.classes != classes:
        raise UserError(f'{args.resume} knows the classes {" ".join(classes[:10])}, but {args.dataset} has '
                        f'{" ".join(split.classes[:10])}')
    return split


def load_part(args, state, part):
    """The 'train', 'test' or 'val' images of the run that `state` is of."""
    split = load_split(args, 'test' if part == 'test' else 'train', state['classes'])
    return split if part == 'test' else conditions.apply(args, split)[part == 'val']


def load_batches(args, state, transforms, device):
    """{'train': ..., 'test': ...} and, with --val-split, 'val'. What normalises them goes into `state`."""
    with distributed.first_on_each_machine():
        splits = {part: load_split(args, part, state.get('classes')) for part in ('train', 'test')}
    if 'mean' not in state:
        state['mean'], state['std'] = data.mean_and_std(splits['train'].images)
        state['classes'] = splits['train'].classes
    splits['train'], val = conditions.apply(args, splits['train'])
    images = len(splits['train'].labels)
    shrinking = [f'{flag} {getattr(args, name)}' for name, flag in conditions.SHRINKING.items() if getattr(args, name)]
    options.check_batch(args, images, f' that {" and ".join(shrinking)} leaves' if shrinking else '')
    print(f'{images} training images, by class: {" ".join(map(str, splits["train"].class_counts()))}'
          + (f' | {len(val.labels)} for validation' if val else ''))

    parts = {'train': splits['train'], 'test': splits['test'], 'val': val}
    return {part: make_batches(args, state, part, split, transforms, device) for part, split in parts.items() if split}


def make_batches(args, state, part, split, transforms, device):
    """A split in batches as `part` is treated: 'train' as the flags about augmentation say, the others as they are."""
    make = functools.partial(data.Batches, split, state['mean'], state['std'], device=device, workers=args.workers)
    if part != 'train':
        return make(batch_size=args.test_batch, transform=transforms.get('eval'))
    known = data.DATASETS[args.dataset]
    move = not args.no_augment and 'train' not in transforms
    return make(batch_size=args.train_batch * args.batch_multiplier, padding=4 if move else 0, flip=known.flip and move,
                cutout=args.cutout, transform=data.auto_augment(known.policy) if args.autoaugment else transforms.get('train'))


if __name__ == '__main__':
    run(main)
