"""Train and evaluate on small images: CIFAR-10/100, SVHN, MNIST, Fashion-MNIST, digits, or a folder of your own.

    python cifar.py --arch resnet --method dma --coef 0.5
    python cifar.py --dataset digits --arch resnet --depth 20 --epochs 10      # needs no download
"""
import functools
import math
import os
import random
import shlex
import time

import torch

from models import cifar as models
from utils import checkpoint, conditions, data, device as devices, methods, metrics, schedule
from utils.arguments import Parser, number
from utils.bar import ProgressLine
from utils.errors import Stopped, UserError, run
from utils.eval import Meter, cross_entropy, quantities, shown_logits
from utils.files import write_json
from utils.logger import Logger, plot_log, read_log, read_rows
from utils.schedule import learning_rate


# What a resumed run does not take over from the flags of the run before it; and the flags that mean something to --evaluate.
NOT_INHERITED = {'given', 'checkpoint', 'overwrite', 'resume', 'evaluate', 'start_epoch', 'gpu_id', 'coef'}
USED_BY_EVALUATE = {'evaluate', 'resume', 'arch', 'dataset', 'data', 'workers', 'image_size', 'test_batch', 'precision',
                    'deterministic', 'gpu_id'}


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
    group.add_argument('--train-batch', type=number(int, 1), default=128, metavar='N', help='(128)')
    group.add_argument('--mini-batch', type=number(int, 1), metavar='N',
                       help='pass each batch in parts of N, each with BatchNorm statistics (and noise) of its own')
    group.add_argument('--batch-multiplier', type=number(int, 1), default=1, metavar='N',
                       help='step along the mean gradient of N batches (1)')
    group.add_argument('--test-batch', type=number(int, 1), default=500, metavar='N', help='(500)')
    schedule.add_arguments(group)
    group.add_argument('--clip-norm', type=number(float, 0, above=True), metavar='NORM', help='largest norm of the gradient')
    methods.add_arguments(parser)
    group = parser.add_argument_group('run')
    group.add_argument('-c', '--checkpoint', metavar='DIR', help='results (checkpoints/DATASET-ARCH-METHOD)')
    group.add_argument('--overwrite', action='store_true', help='replace the run in that folder')
    group.add_argument('--resume', metavar='FILE', help='go on from a checkpoint, with its flags unless given here')
    group.add_argument('-e', '--evaluate', action='store_true', help='only test the checkpoint of --resume')
    group.add_argument('--manualSeed', type=number(int, 0, 2 ** 32 - 1), dest='seed', metavar='N', help='(drawn and printed)')
    group.add_argument('--deterministic', action='store_true', help='same seed, same bits')
    group.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32', help='bf16: autocast (fp32)')
    group.add_argument('--compile', action='store_true', help='torch.compile the model')
    group.add_argument('--gpu-id', metavar='ID', help='the CUDA device to use, as in CUDA_VISIBLE_DEVICES (0)')
    return parser


def parse_arguments():
    """The flags, complete and checked, and the checkpoint to resume from or None. Reads no data."""
    parser = make_parser()
    args, state = parser.parse_args(), None
    if args.resume:
        state = checkpoint.read(args.resume)
        checkpoint.check_flags(args, state, USED_BY_EVALUATE, parser)
        args = parser.parse_args(defaults=state['args'])
    elif args.evaluate:
        parser.error('--evaluate needs --resume FILE, the checkpoint to evaluate')
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
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2 ** 32)
    # What is derived below from other flags is derived anew when the run is resumed, perhaps with other flags.
    args.inherited = {name: value for name, value in vars(args).items() if name not in NOT_INHERITED}
    if args.train_batch % (args.mini_batch or 1):
        parser.error(f'--mini-batch {args.mini_batch} does not divide --train-batch, which is {args.train_batch}')
    try:
        args.network = models.resolve_options(args.arch, {name: getattr(args, name) for name in models.OPTION_FLAGS})
        with torch.device('meta'):
            model = models.build(args.arch, 2, methods.build_head(args), **args.network)
        schedule.settle(args, model.regime, parser)
        if state and not args.evaluate:
            checkpoint.check_schedule(args, state, parser)
        methods.build_optimizer(args, torch.nn.Linear(1, 1), steps_per_epoch=1)
    except ValueError as error:
        parser.error(str(error))
    if 'workers' in args.given and not uses_workers(args, model):
        parser.error('--workers is for --dataset folder, --autoaugment or a model with transforms of its own')
    if args.checkpoint is None:
        name = '-'.join([args.dataset, f'{args.arch}{args.network.get("depth", "")}', *args.method])
        args.checkpoint = os.path.dirname(args.resume) or '.' if args.resume else os.path.join('checkpoints', name)
    return args, state


def main():
    args, state = parse_arguments()
    known = None if args.evaluate else data.describe(args.dataset, args.data)
    network = {'arch': args.arch, **args.network, 'num_classes': known.num_classes if known else len(state['classes'])}
    rehearse(args, network)
    if known:
        check_batch(args, known.train_size)
        checkpoint.check_folder(args.checkpoint, args.resume, args.overwrite)
    device = devices.set_up(args, compiling=args.compile and not args.evaluate)
    model = models.build(args.arch, network['num_classes'], methods.build_head(args), **args.network)
    if state:
        checkpoint.load_model(model, state, network, args.resume)
    model.to(device, memory_format=torch.channels_last)
    print(', '.join(f'{name} {value}' for name, value in network.items()),
          f'| {count_parameters(model) / 1e6:.2f} million parameters',
          f'| method: {" ".join(args.method) or "none"} | {args.precision} on {device.type} | seed {args.seed}')
    if args.evaluate:
        split = load_split(args, 'test', state['classes'])
        batches = make_batches(args, state, 'test', split, input_transform(args, model), device)
        print(f'{args.resume}, of epoch {state["epoch"]} | {in_words("test", test(batches, model, args))}')
        return

    state = state or {'epoch': args.start_epoch, 'network': network}
    batches = load_batches(args, state, input_transform(args, model), device)
    check_parts(args, model, len(batches['train'].labels))
    optimizer = methods.build_optimizer(args, model, len(batches['train']))
    if args.resume:
        checkpoint.load_optimizer(optimizer, state, args.resume)
        checkpoint.set_random_state(state['random_state'])
    try:
        fit(args, state, model, optimizer, batches)
        report(args, state, model, batches['test'])
    except Stopped as stop:
        last = shlex.quote(os.path.join(args.checkpoint, checkpoint.LAST))
        stop.sentence = f'Stopped; the finished epochs are kept. Go on with: python cifar.py --resume {last}'
        raise


def rehearse(args, network):
    """A pass over images without content: a loss that cannot work is refused before an image is read or a file written."""
    if args.method and not args.evaluate:
        model = models.build(args.arch, network['num_classes'], methods.build_head(args), **args.network)
        inputs, targets = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
        try:
            methods.build_criterion(args, model)(model(inputs, targets), targets)
        except ValueError as error:
            raise UserError(str(error)) from error


def check_batch(args, images, left_by=''):
    """UserError if the batch is larger than the training set of `images` images."""
    if args.train_batch * args.batch_multiplier > images:
        times = f' times --batch-multiplier {args.batch_multiplier}' if args.batch_multiplier > 1 else ''
        raise UserError(f'--train-batch {args.train_batch}{times} is larger than the training set of {images} images{left_by}')


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


def load_batches(args, state, transforms, device):
    """{'train': ..., 'test': ...} and, with --val-split, 'val'. What normalises them goes into `state`."""
    splits = {part: load_split(args, part, state.get('classes')) for part in ('train', 'test')}
    if 'mean' not in state:
        state['mean'], state['std'] = data.mean_and_std(splits['train'].images)
        state['classes'] = splits['train'].classes
    splits['train'], val = conditions.apply(args, splits['train'])
    images = len(splits['train'].labels)
    shrinking = [f'{flag} {getattr(args, name)}' for name, flag in conditions.SHRINKING.items() if getattr(args, name)]
    check_batch(args, images, f' that {" and ".join(shrinking)} leaves' if shrinking else '')
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


def check_parts(args, model, images):
    """UserError if an epoch of `images` images ends with a pass of one image and the network cannot train on that."""
    size = args.mini_batch or args.train_batch
    if images % size == 1 % size and any(isinstance(module, torch.nn.BatchNorm1d) for module in model.modules()):
        raise UserError(f'--arch {args.arch} has batch norm on vectors, which cannot train on a single image, and {images} images in '
                        f'parts of {size} leave one; choose another --{"mini" if args.mini_batch else "train"}-batch')


def fit(args, state, model, optimizer, batches):
    """Train from epoch state['epoch'] to the last; after each one judge, log, save and draw."""
    in_folder = functools.partial(os.path.join, args.checkpoint)
    judge = 'val' if args.val_split else 'test'
    criterion = methods.build_criterion(args, model)
    compiled = torch.compile(model) if args.compile else model
    columns = ['Epoch', 'Learning Rate', *(f'{part} {quantity}' for part in ('Train', judge.title())
                                           for quantity in quantities(state['network']['num_classes'])), 'Seconds']
    resumed_log = os.path.join(os.path.dirname(args.resume), 'log.txt') if args.resume else None
    old_rows = read_rows(resumed_log, columns, state['epoch'])
    checkpoint.enter_folder(args.checkpoint, args.resume, args.overwrite)
    logger = Logger(in_folder('log.txt'), columns, old_rows)
    write_json(in_folder('args.json'), {name: value for name, value in vars(args).items() if name not in ('given', 'inherited', 'regime')}
               | {'as given': args.inherited, 'network': state['network'], 'parameters': count_parameters(model),
                  'training images by class': batches['train'].class_counts, 'environment': devices.environment(batches['train'].device)})
    state['args'], state['optimizer_class'] = args.inherited, args.optimizer
    if not os.path.exists(in_folder(checkpoint.BEST)):
        state['best'] = {'top1': -1.0, 'epoch': 0}

    def save(name):
        state.update(state_dict=model.state_dict(), optimizer=optimizer.state_dict(), random_state=checkpoint.random_state())
        checkpoint.save(in_folder(name), state)

    save(checkpoint.LAST)  # a run broken off in its first epoch can be resumed too
    for epoch in range(state['epoch'], args.epochs):
        began = time.perf_counter()
        trained = train(batches['train'], compiled, criterion, optimizer, epoch, args)
        seconds = time.perf_counter() - began
        rate = learning_rate(epoch * len(batches['train']), len(batches['train']), args)
        judged = test(batches[judge], compiled, args)
        if not math.isfinite(judged['Loss']):
            raise UserError(f'the {judge} loss became {judged["Loss"]} after epoch {epoch + 1}, at learning rate {rate:.4g}, '
                            f'{last_good(args, epoch)}')
        state['epoch'] = epoch + 1
        logger.append([epoch + 1, rate, *trained.values(), *judged.values(), seconds])
        if judged['Top-1'] > state['best']['top1']:
            state['best'] = {'top1': judged['Top-1'], 'epoch': epoch + 1}
            save(checkpoint.BEST)
        save(checkpoint.LAST)
        plot_log(in_folder('log.txt'), in_folder('log.png'), in_folder('log.pdf'))
        print(f'epoch {epoch + 1}/{args.epochs} | lr {rate:.4g} | {in_words("train", trained)} | {in_words(judge, judged)} '
              f'| {seconds:.1f} s', flush=True)


def train(batches, model, criterion, optimizer, epoch, args):
    """One epoch; returns the mean loss and the accuracies seen on the way."""
    model.train()
    meter = Meter(len(batches), batches.num_classes, batches.device)
    shown, next_part = shown_logits(model), getattr(optimizer, 'next_part', lambda: None)
    with ProgressLine(f'train {epoch + 1}/{args.epochs}', len(batches)) as bar:
        asked = time.perf_counter()
        for index, (inputs, targets) in enumerate(batches.shuffled(args.seed, epoch)):
            data_seconds = time.perf_counter() - asked
            options = schedule.options(epoch * len(batches) + index, len(batches), args)
            for group in optimizer.param_groups:
                group.update(options)

            size = args.mini_batch or args.train_batch
            parts = list(zip(inputs.split(size), targets.split(size)))

            def closure():
                optimizer.zero_grad()
                logits, losses = [], []
                for number, (images, labels) in enumerate(parts):
                    if number > 0:
                        next_part()
                    with torch.autocast(batches.device.type, torch.bfloat16, enabled=args.precision == 'bf16'):
                        outputs = model(images, labels)
                        loss = criterion(outputs, labels) * (len(labels) / len(targets))
                    loss.backward()
                    logits.append(shown(outputs))
                    losses.append(loss.detach())
                if args.clip_norm:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
                return torch.cat(logits), sum(losses)

            logits, loss = optimizer.step(closure)
            meter.update(logits, targets, loss)
            if bar.advance(meter, data_seconds):
                check_losses(meter, epoch, len(batches), args)
            asked = time.perf_counter()
    check_losses(meter, epoch, len(batches), args)
    return meter.read()


@torch.no_grad()
def test(batches, model, args, meter=None):
    """Mean cross-entropy and accuracies over all batches, counted by `meter` or a Meter."""
    model.eval()
    meter = meter or Meter(len(batches), batches.num_classes, batches.device)
    with ProgressLine('test', len(batches)) as bar:
        for inputs, targets in batches:
            with torch.autocast(batches.device.type, torch.bfloat16, enabled=args.precision == 'bf16'):
                outputs = model(inputs)
            meter.update(outputs, targets, cross_entropy(outputs, targets))
            bar.advance(meter)
    return meter.read()


def check_losses(meter, epoch, steps_per_epoch, args):
    """UserError if a batch of this epoch had a loss that is not a number or infinite."""
    bad = meter.first_bad_batch()
    if bad:
        rate = learning_rate(epoch * steps_per_epoch + bad[0], steps_per_epoch, args)
        raise UserError(f'the loss became {bad[1]} in epoch {epoch + 1}, batch {bad[0] + 1} of {steps_per_epoch}, '
                        f'at learning rate {rate:.4g}, {last_good(args, epoch)}')


def last_good(args, epoch):
    return (f'so the run stops; {os.path.join(args.checkpoint, checkpoint.LAST)} is as epoch {epoch} left it; '
            'try a smaller --lr, a --warmup or a --clip-norm')


def report(args, state, model, batches):
    """The result: of the last epoch, or with --val-split of the epoch that was best on the validation images."""
    in_folder = functools.partial(os.path.join, args.checkpoint)
    best, epoch = state['best'], state['epoch']
    if args.val_split:
        chosen = checkpoint.read(in_folder(checkpoint.BEST))
        best, epoch = chosen['best'], chosen['epoch']
        model.load_state_dict(chosen['state_dict'])
    predictions = metrics.Predictions(len(batches), batches.num_classes, batches.device)
    tested = test(batches, model, args, predictions)
    by_class, confusion = metrics.of_classes(*predictions.gathered())
    metrics.write_confusion(confusion, state['classes'], in_folder('confusion.csv'), in_folder('confusion.png'))
    log = read_log(in_folder('log.txt'))
    result = {'epoch': epoch, **{f'test {name}'.lower(): value for name, value in {**tested, **by_class}.items()}, 'best': best,
              'chosen by': 'validation' if args.val_split else 'last epoch',
              'parameters': count_parameters(model),
              'seconds per epoch': sum(log['Seconds']) / max(len(log['Seconds']), 1)}
    write_json(in_folder('result.json'), result)
    note = (f'chosen by validation top-1 {best["top1"]:.2f}%' if args.val_split
            else f'best test epoch {best["epoch"]}: {best["top1"]:.2f}%')
    print(f'\nepoch {epoch} | {in_words("test", tested)} | {note}')
    print(metrics.in_words(state['classes'], by_class))
    for name, files in (('log', 'log.txt'), ('curves', 'log.png log.pdf'), ('checkpoint', checkpoint.LAST), ('best', checkpoint.BEST),
                        ('confusion', 'confusion.csv confusion.png'), ('result', 'result.json')):
        print(f'{name:12}', '  '.join(in_folder(file) for file in files.split()))


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def in_words(part, measured):
    return f'{part} ' + ' '.join(f'{name.lower()} {value:.4f}' if name == 'Loss' else f'{name.lower()} {value:.2f}%'
                                 for name, value in measured.items())


if __name__ == '__main__':
    run(main)
