"""Train and evaluate on folders of photographs with torchvision's networks; under torchrun on several GPUs or machines.

    python imagenet.py --data DIR --arch resnet18 --method dma --coef 0.5
    torchrun --nproc-per-node=8 imagenet.py --data DIR --arch resnet50 --train-batch 1024 --resume auto

The images are DIR/train/CLASS/* and DIR/val/CLASS/*.
"""
import os

import torch

from models import imagenet as models
from utils import batches as image_batches, checkpoint, device as devices, distributed, flags, folders
from utils import memory, methods, output, resume, schedule, strength
from utils.bar import ProgressLine
from utils.device import autocast
from utils.errors import UserError
from utils.eval import Meter, cross_entropy, evaluating, metrics_line, predict
from utils.flags import bounded
from utils.parts import Parts, check_batch, smallest_part
from utils.run import Run, headline, validate
from utils.script import run_script


def make_parser():
    parser = flags.Parser(prog='imagenet.py',
                          usage='python imagenet.py --data DIR --arch resnet18 --method dma --coef 0.5 [flags]',
                          description="Train and evaluate torchvision's image classifiers on folders of images.")
    group = parser.add_argument_group('data')
    group.add_argument('-d', '--data', type=flags.file_path, metavar='DIR',
                       help='with DIR/train/CLASS/* and DIR/val/CLASS/*')
    group.add_argument('-j', '--workers', type=bounded(int, 0), default=min(8, image_batches.processors()), metavar='N',
                       help='processes that read images, of each training process (8, or as many as processors)')
    group.add_argument('--image-size', type=bounded(int, 1), metavar='N',
                       help='side of the images (224, or as the network needs)')
    group.add_argument('--resize', type=bounded(int, 1), metavar='N',
                       help='test on the centre of what has N pixels on its shorter side (8/7 of --image-size)')
    group.add_argument('--strict', action='store_true',
                       help='refuse images that cannot be read, instead of skipping them')
    group = parser.add_argument_group('augmentation: by default crops of random size, and mirroring')
    group.add_argument('--no-augment', action='store_true', help='images as in a test')
    image_batches.add_auto_augment(group, 'ImageNet')
    group.add_argument('--random-erase', type=bounded(float, 0, 1), default=0.0, metavar='P',
                       help='erase a rectangle of this part of the images (0)')
    image_batches.add_mixing(group)
    group = parser.add_argument_group('model')
    group.add_argument('-a', '--arch', default='resnet18', choices=models.MODELS, metavar='NAME',
                       help="any of torchvision's classification models that ends in a linear layer, resnext50, "
                       'resnext101 (resnet18)')
    group.add_argument('--pretrained', action='store_true', help="begin with torchvision's weights")
    group.add_argument('--cardinality', type=bounded(int, 1), metavar='N', help='resnext50, resnext101: groups (32)')
    group.add_argument('--base-width', type=bounded(int, 1), metavar='N',
                       help='resnext50, resnext101: channels of a group (4)')
    group = parser.add_argument_group('training')
    schedule.add_arguments(group)
    flags.add_training_arguments(group, train_batch=256, test_batch=256)
    methods.add_arguments(parser)
    flags.add_run_arguments(parser.add_argument_group('run'), 'checkpoints/imagenet-ARCH-METHOD')
    parser.set_defaults(epochs=90, base_batch=256)
    return parser


def parse_arguments():
    """The flags, validated and filled in, and the checkpoint to resume from or None. Reads no data."""
    parser = make_parser()
    args, state = resume.read_arguments(parser, 'imagenet.py', run_folder, evaluated_without_resume='pretrained')
    if args.data is None:
        parser.error('--data DIR is required, with DIR/train/CLASS/* and DIR/val/CLASS/*')
    if args.init and args.pretrained:
        parser.error('--init and --pretrained exclude each other: both say with which weights a new run begins')
    for name in ('auto_augment', 'random_erase', 'hflip'):
        if args.no_augment and getattr(args, name):
            parser.error(f'--no-augment and {parser.spelling(name)} exclude each other')
    methods.check_arguments(args, parser)
    try:
        options = {name: getattr(args, name) for name in models.OPTION_FLAGS}
        args.arch_options = models.resolve_options(args.arch, options)
        size = preset(args)['size']
    except ValueError as error:
        parser.error(str(error))
    if (args.resize or size) < size:
        parser.error(f'--resize {args.resize} is less than the side of the images, which is {size}')
    architecture = {'arch': args.arch, **args.arch_options, 'num_classes': 2}
    validate(args, state, models.REGIME, parser, memory.without_weights(lambda: build(args, architecture)))
    return args, state


def run_folder(args):
    """Where the results go unless --checkpoint says it."""
    return os.path.join('checkpoints', '-'.join(['imagenet', args.arch, *args.method]))


def preset(args):
    """How images are prepared: 'size', 'resize' in pixels, 'interpolation', 'mean' and 'std' in units of 0..255.

    With --pretrained as torchvision's weights need it. ValueError if it has no weights of the architecture.
    """
    size, resize, interpolation = models.default_image_size(args.arch), None, 'bilinear'
    mean, std = folders.IMAGENET_MEAN, folders.IMAGENET_STD
    if args.pretrained:
        weights = models.weights_preset(args.arch)
        size, interpolation = weights.crop_size[0], weights.interpolation.value
        resize = weights.resize_size[0] if args.image_size in (None, size) else None
        mean, std = ([255 * value for value in values] for values in (weights.mean, weights.std))
    size = args.image_size or size
    resize = args.resize or resize or round(size * 8 / 7)
    return {'size': size, 'resize': resize, 'interpolation': interpolation, 'mean': mean, 'std': std}


def main():
    distributed.start()
    args, state = parse_arguments()
    images = {'val': folders.read_folder(args.data, 'val')} if args.evaluate else folders.read_folders(args.data)
    classes = images['val'].classes
    check_classes(args, state, classes)
    architecture = {'arch': args.arch, **args.arch_options, 'num_classes': len(classes)}
    if not args.evaluate:
        check_batch(args, len(images['train'].paths))
        output.claim(args)
    device = devices.set_up(args, compiling=args.compile and not args.evaluate)
    memory.check_network(args, build, architecture, preset(args)['size'], device)
    model = build(args, architecture, pretrained=args.pretrained and not state)
    if state:
        checkpoint.load_model(model, state, architecture, args.resume, to_test=args.evaluate,
                              defaults=models.resolve_options(args.arch, {}))
    elif args.init:
        checkpoint.initialise(model, args.init)
    training_images = 0 if args.evaluate else len(images['train'].paths)
    smallest = 2 if args.evaluate else smallest_part(args, training_images)
    methods.rehearse(args, model, preset(args)['size'], smallest, training_images, device)
    model.to(device, memory_format=torch.channels_last)
    print(headline(args, architecture, model, device))
    if args.evaluate:
        if state:
            resume.check_images(args, state, 'test', images['val'].fingerprint(args.data))
        batches = make_batches(args, state, 'test', images['val'], device)
        tested = test(batches, model, args)
        folders.report_skipped({'test': batches})
        source = f'{args.resume}, of epoch {state["epoch"]}' if state else 'torchvision'
        print(f'{source} | {metrics_line("test", tested)}')
        return

    state = state or {'script': 'imagenet.py', 'epoch': args.start_epoch, 'network': architecture, 'classes': classes,
                      'mean': preset(args)['mean'], 'std': preset(args)['std']}
    print(f'{training_images} training images of {len(classes)} classes, {len(images["val"].paths)} test images')
    batches = {}
    for part, folder in (('train', images['train']), ('test', images['val'])):
        resume.check_images(args, state, part, folder.fingerprint(args.data))
        batches[part] = make_batches(args, state, part, folder, device)
    optimizer = methods.build_optimizer(args, model, len(batches['train']))
    if args.resume:
        resume.check_position(state, len(batches['train']), args)
        checkpoint.load_optimizer(optimizer, state, args.resume)
    fit(args, state, model, optimizer, batches)


def fit(args, state, model, optimizer, batches):
    """Train from where `state` is to the last epoch, then report. batches: {'train': ..., 'test': ...}."""
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


def build(args, architecture, pretrained=False):
    """The network that `architecture` describes, with the head and the loss terms of the chosen methods.

    The first process of a machine downloads the weights.
    """
    options = {name: value for name, value in architecture.items() if name in models.OPTION_FLAGS}
    try:
        with distributed.first_on_each_machine():
            model = models.build(args.arch, architecture['num_classes'], methods.build_head(args), pretrained,
                                 preset(args)['size'], **options)
        model.head_dropout = args.dropout
        return methods.attach_loss_terms(args, model)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_part(args, state, part):
    """The 'train' or 'test' images of the run that `state` is of."""
    folder = folders.read_folder(args.data, 'val' if part == 'test' else part)
    check_classes(args, state, folder.classes)
    resume.check_images(args, state, part, folder.fingerprint(args.data))
    return folder


def check_classes(args, state, classes):
    """UserError unless the checkpoint has these classes, or with --evaluate --pretrained the weights as many."""
    if state and state['classes'] != classes:
        raise UserError(f'{args.resume} knows the classes {" ".join(state["classes"][:10])}, but {args.data} has '
                        f'{" ".join(classes[:10])}')
    if args.evaluate and not state:
        known = len(models.default_weights(args.arch).meta['categories'])
        if known != len(classes):
            raise UserError(f"--evaluate --pretrained tests torchvision's weights of {args.arch}, which know {known} "
                            "classes, "
                            f'but {args.data} has {len(classes)}')


def make_batches(args, state, part, folder, device):
    """A folder in batches: 'train' as the flags about augmentation say, other parts as they are."""
    how = preset(args)
    mean, std = (state['mean'], state['std']) if state else (how['mean'], how['std'])
    transform = folders.evaluation_transform(how['size'], how['resize'], how['interpolation'])
    batch_size, mix, alternate = args.test_batch, None, False
    if part == 'train':
        batch_size = args.train_batch * args.batch_multiplier
        mix = folders.mixing(args.mixup, args.cutmix, len(folder.classes))
        if not args.no_augment:
            alternate = args.hflip == 'alternating'
            transform = folders.training_transform(how['size'], args.auto_augment, how['interpolation'],
                                                   args.random_erase, mean, flip=args.hflip in (None, 'random'))
    return folders.ImageBatches(folder, mean, std, batch_size, device, transform, args.workers, mix, args.strict,
                                alternate)


if __name__ == '__main__':
    run_script(main)
