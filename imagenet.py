"""Train and evaluate on folders of photographs, with torchvision's networks; under torchrun on several GPUs or machines.

    python imagenet.py --data DIR --arch resnet18 --method dma --coef 0.5
    torchrun --nproc-per-node=8 imagenet.py --data DIR --arch resnet50 --train-batch 1024 --resume auto

The images are DIR/train/CLASS/* and DIR/val/CLASS/*. The epochs and steps are those of utils/training.py.
"""
import copy
import os

import torch

from models import imagenet as models
from models.imagenet.wrapped import TorchvisionClassifier
from utils import checkpoint, device as devices, distributed, images, methods, options, training
from utils.arguments import Parser, number
from utils.errors import UserError, run

USED_BY_EVALUATE = options.USED_BY_EVALUATE | {'pretrained', 'image_size', 'resize', 'strict', 'cardinality', 'base_width'}


def make_parser():
    parser = Parser(prog='imagenet.py', usage='python imagenet.py --data DIR --arch resnet18 --method dma --coef 0.5 [flags]',
                    description="Train and evaluate torchvision's image classifiers on folders of images.")
    group = parser.add_argument_group('data')
    group.add_argument('-d', '--data', metavar='DIR', help='with DIR/train/CLASS/* and DIR/val/CLASS/*')
    group.add_argument('-j', '--workers', type=number(int, 0), default=min(8, os.cpu_count() or 1), metavar='N',
                       help='processes that read images, of each training process (8, or as many as processors)')
    group.add_argument('--image-size', type=number(int, 1), metavar='N', help='side of the images (224, or as the network needs)')
    group.add_argument('--resize', type=number(int, 1), metavar='N',
                       help='test on the centre of what has N pixels on its shorter side (8/7 of --image-size)')
    group.add_argument('--strict', action='store_true', help='refuse images that cannot be read, in place of skipping them')
    group = parser.add_argument_group('augmentation: by default crops of random size, and mirroring')
    group.add_argument('--no-augment', action='store_true', help='images as in a test')
    group.add_argument('--auto-augment', choices=images.AUTO_AUGMENTS, metavar='NAME', help=f'also {", ".join(images.AUTO_AUGMENTS)}')
    group.add_argument('--random-erase', type=number(float, 0, 1), default=0.0, metavar='P',
                       help='erase a rectangle of this part of the images (0)')
    group.add_argument('--mixup', type=number(float, 0), default=0.0, metavar='ALPHA', help='mix pairs of images (0)')
    group.add_argument('--cutmix', type=number(float, 0), default=0.0, metavar='ALPHA',
                       help='put a rectangle of one image into another; with --mixup, for each batch one of the two (0)')
    group = parser.add_argument_group('model')
    group.add_argument('-a', '--arch', default='resnet18', choices=models.MODELS, metavar='NAME',
                       help="any of torchvision's classification models that ends in a linear layer, resnext50, resnext101 (resnet18)")
    group.add_argument('--pretrained', action='store_true', help="begin with torchvision's weights")
    group.add_argument('--cardinality', type=number(int, 1), metavar='N', help='resnext50, resnext101: groups (32)')
    group.add_argument('--base-width', type=number(int, 1), metavar='N', help='resnext50, resnext101: channels of a group (4)')
    group = parser.add_argument_group('training')
    options.add_training_arguments(group, train_batch=256, test_batch=256)
    methods.add_arguments(parser)
    options.add_run_arguments(parser.add_argument_group('run'), 'checkpoints/imagenet-ARCH-METHOD')
    parser.set_defaults(epochs=90, base_batch=256)
    return parser


def parse_arguments():
    """The flags, complete and checked, and the checkpoint to resume from or None. Reads no data."""
    parser = make_parser()
    args, state = options.read(parser, 'imagenet.py', run_folder, USED_BY_EVALUATE, evaluated_without_resume='pretrained')
    if args.data is None:
        parser.error('--data DIR is required, with DIR/train/CLASS/* and DIR/val/CLASS/*')
    if args.resume and 'pretrained' in args.given:
        parser.error('--pretrained is where a new run begins; a resumed one goes on from the weights of the checkpoint')
    for flag in ('auto_augment', 'random_erase'):
        if args.no_augment and getattr(args, flag):
            parser.error(f'--no-augment and --{flag.replace("_", "-")} exclude each other')
    methods.check_arguments(args, parser)
    try:
        args.network = models.resolve_options(args.arch, {name: getattr(args, name) for name in models.OPTION_FLAGS})
        size = preset(args)['size']
    except ValueError as error:
        parser.error(str(error))
    if (args.resize or size) < size:
        parser.error(f'--resize {args.resize} is less than the side of the images, which is {size}')
    options.settle(args, state, TorchvisionClassifier.regime, parser)
    return args, state


def run_folder(args):
    """Where the results go unless --checkpoint says it."""
    return os.path.join('checkpoints', '-'.join(['imagenet', args.arch, *args.method]))


def preset(args):
    """How images are prepared: 'size', 'resize' in pixels, 'interpolation', 'mean' and 'std' in units of 0..255.

    With --pretrained as torchvision's weights want it. ValueError if it has no weights of the architecture.
    """
    size, resize, interpolation = models.default_image_size(args.arch), None, 'bilinear'
    mean, std = images.IMAGENET_MEAN, images.IMAGENET_STD
    if args.pretrained:
        weights = models.weights_preset(args.arch)
        size, interpolation = weights.crop_size[0], weights.interpolation.value
        resize = weights.resize_size[0] if args.image_size in (None, size) else None
        mean, std = ([255 * value for value in values] for values in (weights.mean, weights.std))
    size = args.image_size or size
    return {'size': size, 'resize': args.resize or resize or round(size * 8 / 7), 'interpolation': interpolation, 'mean': mean, 'std': std}


def main():
    distributed.start()
    args, state = parse_arguments()
    folders = {'val': images.read_folder(args.data, 'val')} if args.evaluate else images.read_folders(args.data)
    classes = folders['val'].classes
    if state:
        check_classes(args, state, classes)
    elif args.evaluate:
        known = len(models.default_weights(args.arch).meta['categories'])
        if known != len(classes):
            raise UserError(f"--evaluate --pretrained tests torchvision's weights of {args.arch}, which know {known} classes, but {args.data} "
                            f'has {len(classes)}')
    network = {'arch': args.arch, **args.network, 'num_classes': len(classes)}
    if not args.evaluate:
        options.check_batch(args, len(folders['train'].paths))
        checkpoint.check_folder(args.checkpoint, args.resume, args.overwrite)
    device = devices.set_up(args, compiling=args.compile and not args.evaluate)
    model = build(args, network, pretrained=args.pretrained and not state)
    if state:
        checkpoint.load_model(model, state, network, args.resume, to_test=args.evaluate)
    rehearse(args, model, None if args.evaluate else options.leaves_one(args, len(folders['train'].paths)))
    model.to(device, memory_format=torch.channels_last)
    print(training.headline(args, network, model, device))
    if args.evaluate:
        batches = {'test': make_batches(args, state, 'test', folders['val'], {}, device)}
        tested = training.test(batches['test'], model, args)
        training.report_skipped(batches)
        print(f'{f"{args.resume}, of epoch " + str(state["epoch"]) if state else "torchvision"} | {training.in_words("test", tested)}')
        return

    state = state or {'script': 'imagenet.py', 'epoch': args.start_epoch, 'network': network, 'classes': classes,
                      'mean': preset(args)['mean'], 'std': preset(args)['std']}
    print(f'{len(folders["train"].paths)} training images of {len(classes)} classes, {len(folders["val"].paths)} test images')
    batches = {part: make_batches(args, state, part, folders[folder], {}, device) for part, folder in (('train', 'train'), ('test', 'val'))}
    optimizer = methods.build_optimizer(args, model, len(batches['train']))
    if args.resume:
        checkpoint.check_position(state, len(batches['train']), args)
        checkpoint.load_optimizer(optimizer, state, args.resume)
    training.complete(args, state, model, optimizer, batches)


def build(args, network, pretrained=False):
    """The network that `network` describes; the first process of a machine downloads its weights."""
    try:
        with distributed.first_on_each_machine():
            return models.build(args.arch, network['num_classes'], methods.build_head(args), pretrained, preset(args)['size'],
                                **{name: value for name, value in network.items() if name in models.OPTION_FLAGS})
    except ValueError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if not pretrained:
            raise
        raise UserError(f'the weights of {args.arch} could not be downloaded whole ({" ".join(str(error).split())[:200]})') from error


def rehearse(args, model, leaves_one):
    """A pass over images without content: what cannot work is refused before an image is read or a file written.

    leaves_one: what is wrong with an epoch that ends with a pass of a single image, should the network not train on that.
    """
    model, size = copy.deepcopy(model), preset(args)['size']
    number = 1 if leaves_one else 2
    inputs, targets = torch.zeros(number, 3, size, size), torch.zeros(number, dtype=torch.long)
    try:
        with torch.random.fork_rng(devices=[]):
            criterion = methods.build_criterion(args, model)
            criterion(model(inputs, targets), targets)
    except ValueError as error:
        alone = 'more than 1 value per channel' in str(error)
        raise UserError(f'--arch {args.arch} has batch norm, which {leaves_one}' if alone else str(error)) from error
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--arch {args.arch} cannot take images of {size} pixels ({" ".join(str(error).split())[:200]}); '
                        'give another --image-size') from error


def input_transform(args, model):
    """None of these networks brings transforms of its own."""
    return {}


def uses_workers(args, model):
    return True


def load_part(args, state, part):
    """The 'train' or 'test' images of the run that `state` is of."""
    folder = images.read_folder(args.data, 'val' if part == 'test' else part)
    check_classes(args, state, folder.classes)
    return folder


def check_classes(args, state, classes):
    if state['classes'] != classes:
        raise UserError(f'{args.resume} knows the classes {" ".join(state["classes"][:10])}, but {args.data} has {" ".join(classes[:10])}')


def make_batches(args, state, part, folder, transforms, device):
    """A folder in batches as `part` is treated: 'train' as the flags about augmentation say, the others as they are."""
    how = preset(args)
    mean, std = (state['mean'], state['std']) if state else (how['mean'], how['std'])
    transform, batch, mix = images.evaluation_transform(how['size'], how['resize'], how['interpolation']), args.test_batch, None
    if part == 'train':
        batch, mix = args.train_batch * args.batch_multiplier, images.mixing(args.mixup, args.cutmix, len(folder.classes))
        if not args.no_augment:
            transform = images.training_transform(how['size'], args.auto_augment, how['interpolation'], args.random_erase, mean)
    return images.ImageBatches(folder, mean, std, batch, device, transform, args.workers, mix, args.strict)


if __name__ == '__main__':
    run(main)
