"""Train and evaluate on small images: CIFAR-10/100, SVHN, MNIST, Fashion-MNIST, digits, a folder or your own Dataset.

    python cifar.py --arch resnet --method dma --coef 0.5
    python cifar.py --dataset digits --arch resnet --depth 20 --epochs 10      # needs no download
"""
import os

import torch

from models import cifar as models
from utils import batches as image_batches, checkpoint, conditions, datasets, device as devices, distributed
from utils import flags, folders, memory, methods, output, own_dataset, resume, schedule, strength
from utils.bar import ProgressLine
from utils.device import autocast
from utils.errors import UserError
from utils.eval import Meter, cross_entropy, evaluating, metrics_line, predict
from utils.flags import bounded
from utils.parts import Parts, check_batch, smallest_part
from utils.run import Run, headline, validate
from utils.script import run_script


def make_parser():
    parser = flags.Parser(prog='cifar.py', usage='python cifar.py --arch resnet --method dma --coef 0.5 [flags]',
                          description='Train and evaluate an image classifier on small images.')
    group = parser.add_argument_group('data')
    group.add_argument('-d', '--dataset', type=datasets.dataset_name, default='cifar10', metavar='NAME',
                       help=f'{", ".join(datasets.DATASETS)}, or module:Class, a torch Dataset of your own')
    group.add_argument('--data', type=flags.file_path, default='data', metavar='DIR',
                       help='where the data is, or is downloaded to (data)')
    group.add_argument('-j', '--workers', type=bounded(int, 1), default=min(4, image_batches.processors()), metavar='N',
                       help='threads that read a folder, processes that transform single images (4, or all processors)')
    group.add_argument('--image-size', type=bounded(int, 32), default=32, metavar='N',
                       help='side of the images of a folder or of a data set of your own (32)')
    group.add_argument('--no-cache', action='store_true',
                       help='neither keep decoded images of a folder in DIR/.decoded nor read them there')
    conditions.add_arguments(group)
    group = parser.add_argument_group('augmentation: by default a random crop, and mirroring unless it is digits')
    group.add_argument('--no-augment', action='store_true', help='images as they are')
    group.add_argument('--cutout', type=bounded(int, 1), metavar='N', help='also erase a square of N pixels a side')
    group.add_argument('--crop-padding', type=bounded(int, 0), metavar='N',
                       help='pixels around the image that the random crop may move into (4)')
    group.add_argument('--crop-mode', choices=('zero', 'reflect'),
                       help='what they are: zero, black, or the image mirrored at its border (zero)')
    image_batches.add_auto_augment(group, 'SVHN for digits, else of CIFAR-10')
    image_batches.add_mixing(group)
    group = parser.add_argument_group('model')
    group.add_argument('-a', '--arch', default='resnet', choices=models.MODELS, metavar='NAME',
                       help=', '.join(models.MODELS))
    group.add_argument('--depth', type=bounded(int, 1, 10000), metavar='N',
                       help='layers (each architecture has a default)')
    group.add_argument('--block-name', choices=('BasicBlock', 'Bottleneck'),
                       help='resnet, preresnet, densenet, pyramidnet')
    group.add_argument('--cardinality', type=bounded(int, 1), metavar='N', help='resnext: groups (8)')
    group.add_argument('--widen-factor', type=bounded(int, 1), metavar='N', help='resnext (4), wrn (10)')
    group.add_argument('--growthRate', type=bounded(int, 1), dest='growth_rate', metavar='N', help='densenet (12)')
    group.add_argument('--compressionRate', type=bounded(float, 1), dest='compression_rate', metavar='N',
                       help='densenet (2)')
    group.add_argument('--alpha', type=bounded(int, 1), metavar='N',
                       help='pyramidnet: channels that are added on the way (270)')
    group.add_argument('--widths', metavar='A-B-C', help='channels of the stages: airbench (64-256-256), '
                       'vgg (64-128-256-512-512)')
    group.add_argument('--drop', type=bounded(float, 0, 1), dest='drop_rate', metavar='P',
                       help='dropout in wrn, densenet (0)')
    group.add_argument('--feature-dim', type=bounded(int, 2, 100000), metavar='N',
                       help='a linear layer to N features before the head of any network, such as 2 to draw them')
    group = parser.add_argument_group('training')
    schedule.add_arguments(group)
    flags.add_training_arguments(group, train_batch=128, test_batch=500)
    methods.add_arguments(parser)
    flags.add_run_arguments(parser.add_argument_group('run'), 'checkpoints/DATASET-ARCH-METHOD')
    return parser


def parse_arguments():
    """The flags, validated and filled in, and the checkpoint to resume from or None. Reads no data."""
    parser = make_parser()
    args, state = resume.read_arguments(parser, 'cifar.py', run_folder)
    if 'image_size' in args.given and not datasets.has_images_of_any_size(args.dataset):
        parser.error(f'--image-size is for --dataset folder or module:Class, not {args.dataset}')
    if args.no_cache and args.dataset != 'folder':
        parser.error(f'--no-cache is for --dataset folder, not {args.dataset}')
    if args.dataset == 'digits' and 'data' in args.given:
        parser.error('--data is not used by --dataset digits, which scikit-learn brings along')
    conditions.check_arguments(args, parser)
    for name in ('cutout', 'crop_padding', 'crop_mode', 'auto_augment', 'hflip'):
        if args.no_augment and getattr(args, name) is not None:
            parser.error(f'--no-augment and {parser.spelling(name)} exclude each other')
    if (args.crop_padding or 0) >= args.image_size:
        parser.error(f'--crop-padding {args.crop_padding} must be less than the side of the images, which have '
                     f'{args.image_size} pixels a side')
    if (args.cutout or 0) > args.image_size:
        parser.error(f'--cutout {args.cutout} is larger than the images, which have {args.image_size} pixels a side')
    if args.crop_mode and args.crop_padding == 0:
        parser.error('--crop-mode is not used with --crop-padding 0')
    if not datasets.may_be_mirrored(args.dataset):
        if args.hflip:
            parser.error(f'--hflip is not used by --dataset {args.dataset}, whose images are not mirrored')
        if args.tta:
            parser.error(f'--tta mirror is not for --dataset {args.dataset}, whose mirrored images mean something else')
    methods.check_arguments(args, parser)
    try:
        args.arch_options = arch_options(args)
        model = memory.without_weights(
            lambda: models.build(args.arch, 2, methods.build_head(args), **args.arch_options))
    except ValueError as error:
        parser.error(str(error))
    validate(args, state, model.regime, parser, model)
    if 'workers' in args.given and not uses_workers(args, model):
        parser.error('--workers is for --dataset folder or module:Class, --auto-augment or a model with transforms of '
                     'its own')
    return args, state


def arch_options(args):
    """The options of the architecture, a dict; ValueError for an option that it does not have."""
    return models.resolve_options(args.arch, {name: getattr(args, name) for name in models.OPTION_FLAGS})


def run_folder(args):
    """The folder of the results by default; ValueError for an option that the architecture does not have."""
    arch = f'{args.arch}{arch_options(args).get("depth", "")}'
    return os.path.join('checkpoints', '-'.join([args.dataset.replace(':', '.'), arch, *args.method]))


def main():
    distributed.start()
    args, state = parse_arguments()
    known = None if args.evaluate else datasets.describe(args.dataset, args.data, args.image_size, args.workers)
    num_classes = known.num_classes if known else len(state['classes'])
    architecture = {'arch': args.arch, **args.arch_options, 'num_classes': num_classes}
    device = devices.set_up(args, compiling=args.compile and not args.evaluate)
    memory.check_network(args, build, architecture, args.image_size, device)
    model = build(args, architecture)
    if state:
        checkpoint.load_model(model, state, architecture, args.resume, to_test=args.evaluate,
                              defaults=models.resolve_options(args.arch, {}))
    elif args.init:
        checkpoint.initialise(model, args.init)
    if known:
        check_batch(args, known.train_size)
        methods.rehearse(args, model, args.image_size, device=device)
        output.claim(args)
    model.to(device, memory_format=torch.channels_last)
    print(headline(args, architecture, model, device))
    if args.evaluate:
        split = load_split(args, state, 'test')
        batches = make_batches(args, state, 'test', split, device, image_batches.input_transform(args, model))
        tested = test(batches, model, args)
        print(f'{args.resume}, of epoch {state["epoch"]} | {metrics_line("test", tested)}')
        return

    state = state or {'script': 'cifar.py', 'epoch': args.start_epoch, 'network': architecture}
    batches = load_batches(args, state, device, image_batches.input_transform(args, model))
    images = len(batches['train'].labels)
    if smallest_part(args, images) == 1:
        methods.rehearse(args, model, args.image_size, images=1, training_images=images, device=device)
    if hasattr(model, 'prepare') and not (args.resume or args.init):
        model.prepare(image_batches.spread(batches['train']))  # the same images in every process
    optimizer = methods.build_optimizer(args, model, len(batches['train']))
    if args.resume:
        resume.check_position(state, len(batches['train']), args)
        checkpoint.load_optimizer(optimizer, state, args.resume)
    fit(args, state, model, optimizer, batches)


def fit(args, state, model, optimizer, batches):
    """Train from where `state` is to the last epoch, then report.

    batches: {'train': ..., 'test': ...} and, with --val-split, 'val'.
    """
    with Run(args, state, model, optimizer, batches) as run:  # its folder; says how to resume when stopped
        criterion = methods.build_criterion(args, model, batches['train'].class_counts)
        for epoch in run.epochs():
            trained = train(run, criterion, optimizer, epoch, args)
            meter = run.test_meter(epoch)  # None in an epoch that --test-every leaves out
            tested = test(batches[run.selection], run.to_test, args, meter) if meter else None
            run.end_epoch(epoch, trained, tested)  # log, checkpoints, curves
        run.report(test)


def train(run, criterion, optimizer, epoch, args):
    """One epoch, or what is left of it; returns the mean loss and the accuracies seen on the way."""
    network = run.network.train()  # compiled; DistributedDataParallel under torchrun
    parts = Parts(network, optimizer, args, run.pixels)  # a batch is one part, unless flags or processes split it
    for step, batch in run.steps(epoch):  # from where it stopped; progress, checks, checkpoints
        schedule.apply(optimizer, step, run.steps_per_epoch, args)  # the learning rate
        strength.apply(run, criterion, step)  # what the methods do at this position in training

        def closure():  # called once by SGD, twice by AMP
            optimizer.zero_grad()
            for images, targets, weight in parts.of(batch):
                with autocast(args, images):
                    outputs = network(images, targets)
                    loss = criterion(outputs, targets)
                (weight * loss).backward()
                parts.keep(outputs, loss)
            parts.flood(args.flood)
            if args.clip_norm:
                torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip_norm)
            return parts.logits, parts.loss

        logits, loss = optimizer.step(closure)
        run.meter.update(logits, batch.targets, loss)
    return run.meter.read_all('train')


@torch.no_grad()
def test(batches, model, args, meter=None):
    """Mean cross-entropy and accuracies over the images of all processes, counted by `meter` or a Meter."""
    meter = meter or Meter(len(batches), batches.num_classes, batches.device)
    with evaluating(model), ProgressLine('test', -(-len(batches) // distributed.world_size())) as bar:
        for images, targets in batches:
            with autocast(args, images):
                outputs = predict(model, images, args.tta)
            meter.update(outputs, targets, cross_entropy(outputs, targets))
            bar.advance(meter)
    return meter.read_all('test')


def build(args, architecture):
    """The network that `architecture` describes, with the head and the loss terms of the chosen methods."""
    options = {name: value for name, value in architecture.items() if name in models.OPTION_FLAGS}
    model = models.build(args.arch, architecture['num_classes'], methods.build_head(args), **options)
    model.head_dropout = args.dropout
    return methods.attach_loss_terms(args, model)


def uses_workers(args, model):
    transforms = image_batches.input_transform(args, model)
    return datasets.has_images_of_any_size(args.dataset) or bool(args.auto_augment or transforms)


def load_split(args, state, part):
    """The 'train' or 'test' part of the data; UserError if it is not what the checkpoint `state` was trained with."""
    split = datasets.load(args.dataset, args.data, part, args.image_size, args.workers, not args.no_cache)
    classes = state.get('classes', split.classes)
    if split.classes != classes:
        raise UserError(f'{args.resume} knows the classes {" ".join(classes[:10])}, but {args.dataset} has '
                        f'{" ".join(split.classes[:10])}')
    resume.check_images(args, state, part, datasets.fingerprint(split),
                        conditions.drawn_by(args) if part == 'train' else '')
    return split


def load_part(args, state, part):
    """The 'train', 'test' or 'val' images of the run that `state` is of."""
    split = load_split(args, state, 'test' if part == 'test' else 'train')
    return split if part == 'test' else conditions.apply(args, split)[part == 'val']


def load_batches(args, state, device, transforms):
    """{'train': ..., 'test': ...} and, with --val-split, 'val'. What normalises them goes into `state`."""
    with distributed.first_on_each_machine():
        splits = {part: load_split(args, state, part) for part in ('train', 'test')}
    if 'mean' not in state:
        state['mean'], state['std'] = splits['train'].mean_and_std()
        state['classes'] = splits['train'].classes
    if args.adversarial and transforms:
        raise UserError(f'--adversarial needs to know the pixels, and --arch {args.arch} transforms its images itself; '
                        'give --no-augment')
    splits['train'], val = conditions.apply(args, splits['train'])
    images = len(splits['train'].labels)
    check_batch(args, images, conditions.left_by(args))
    print(f'{images} training images, by class: {" ".join(map(str, splits["train"].class_counts()))}'
          + (f' | {len(val.labels)} for validation' if val else ''))

    parts = {'train': splits['train'], 'test': splits['test'], 'val': val}
    return {part: make_batches(args, state, part, split, device, transforms) for part, split in parts.items() if split}


def make_batches(args, state, part, split, device, transforms={}):
    """A split in batches: 'train' as the flags about augmentation say, other parts as they are.

    transforms: those of the model, see `image_batches.input_transform`.
    """
    known = datasets.DATASETS.get(args.dataset, datasets.DATASETS['folder'])
    batch_size, augment, transform, mix = args.test_batch, {}, transforms.get('eval'), None
    if part == 'train':
        batch_size, transform = args.train_batch * args.batch_multiplier, transforms.get('train')
        if args.auto_augment:
            name = known.policy if args.auto_augment == 'autoaugment' else args.auto_augment
            transform = image_batches.auto_augment(name)
        move = not args.no_augment and 'train' not in transforms
        padding = 4 if args.crop_padding is None else args.crop_padding
        flip = {'none': False, 'alternating': 'alternating'}.get(args.hflip, True)
        flip = flip if move and datasets.may_be_mirrored(args.dataset) else False
        augment = {'padding': padding if move else 0, 'flip': flip, 'cutout': args.cutout,
                   'crop_mode': args.crop_mode or 'zero'}
        mix = folders.mixing(args.mixup, args.cutmix, len(split.classes))
    if isinstance(split, own_dataset.LazySplit):
        if transforms:
            raise UserError(f'--dataset {args.dataset} is read image by image, which a model with transforms of its '
                            'own cannot be trained on; give --no-augment')
        alternate = augment.get('flip') == 'alternating'
        augment['flip'] = augment.get('flip') is True
        one_by_one = folders.small_image_transform(**augment, transform=transform, mean=state['mean'])
        return folders.ImageBatches(split, state['mean'], state['std'], batch_size, device, one_by_one, args.workers,
                                    mix, alternate=alternate)
    return image_batches.Batches(split, state['mean'], state['std'], batch_size, device, transform=transform,
                                 workers=args.workers, mix=mix, **augment)


if __name__ == '__main__':
    run_script(main)
