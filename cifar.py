"""Train and evaluate on small images: CIFAR-10/100, SVHN, MNIST, Fashion-MNIST, digits, or a folder of your own.

    python cifar.py --arch resnet --method dma --coef 0.5
    python cifar.py --dataset digits --arch resnet --depth 20 --epochs 10      # needs no download
"""
import functools
import math
import os
import random
import shlex
import shutil
import time

import torch

from models import cifar as models
from utils import checkpoint, data, methods, schedule
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
    group.add_argument('-j', '--workers', type=number(int, 1), default=4, metavar='N', help='threads that read a folder (4)')
    group.add_argument('--image-size', type=number(int, 32), default=32, metavar='N', help='side of the images of a folder (32)')
    group.add_argument('--val-split', type=number(float, 0, 0.9, above=True), metavar='F',
                       help='part of the training set that chooses the best epoch; the test set is then read once')
    group = parser.add_argument_group('model')
    group.add_argument('-a', '--arch', default='resnet', choices=models.MODELS, metavar='NAME', help=', '.join(models.MODELS))
    group.add_argument('--depth', type=number(int, 1), metavar='N', help='layers (each architecture has a default)')
    group.add_argument('--block-name', choices=('BasicBlock', 'Bottleneck'), help='resnet, preresnet, densenet')
    group.add_argument('--cardinality', type=number(int, 1), metavar='N', help='resnext: groups (8)')
    group.add_argument('--widen-factor', type=number(int, 1), metavar='N', help='resnext (4), wrn (10)')
    group.add_argument('--growthRate', type=number(int, 1), dest='growth_rate', metavar='N', help='densenet (12)')
    group.add_argument('--compressionRate', type=number(float, 1), dest='compression_rate', metavar='N', help='densenet (2)')
    group.add_argument('--drop', type=number(float, 0, 1), dest='drop_rate', metavar='P', help='dropout in wrn, densenet (0)')
    group = parser.add_argument_group('training')
    group.add_argument('--epochs', type=number(int, 1), default=300, metavar='N', help='(300)')
    group.add_argument('--start-epoch', type=number(int, 0), default=0, metavar='N', help='begin the schedule there (0)')
    group.add_argument('--train-batch', type=number(int, 1), default=128, metavar='N', help='(128)')
    group.add_argument('--mini-batch', type=number(int, 1), metavar='N',
                       help='pass each batch in parts of N, each with BatchNorm statistics (and noise) of its own')
    group.add_argument('--batch-multiplier', type=number(int, 1), default=1, metavar='N',
                       help='step along the mean gradient of N batches (1)')
    group.add_argument('--test-batch', type=number(int, 1), default=500, metavar='N', help='(500)')
    group.add_argument('--lr', type=number(float, 0), default=0.1, help='highest learning rate (0.1)')
    group.add_argument('--lr-schedule', choices=('step', 'cosine', 'onecycle'), default='step', help='(step)')
    group.add_argument('--schedule', type=number(int, 0), nargs='+', metavar='EPOCH',
                       help='step: when to multiply lr by --gamma (after 1/2 and 3/4 of the epochs)')
    group.add_argument('--gamma', type=number(float, 0), default=0.1, help='(0.1)')
    group.add_argument('--warmup', type=number(float, 0), metavar='EPOCHS',
                       help='climb to the schedule during these (0; onecycle: 0.3 of the epochs)')
    group.add_argument('--momentum', type=number(float, 0, 1), default=0.9, help='(0.9)')
    group.add_argument('--nesterov', action='store_true')
    group.add_argument('--weight-decay', '--wd', type=number(float, 0), default=5e-4, help='(0.0005)')
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
    for flag in {'workers', 'image_size'} & args.given:
        if args.dataset != 'folder':
            parser.error(f'--{flag.replace("_", "-")} is for --dataset folder, not {args.dataset}')
    if args.dataset == 'digits' and 'data' in args.given:
        parser.error('--data is not used by --dataset digits, which scikit-learn brings along')
    methods.check_arguments(args, parser)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2 ** 32)
    # What is derived below from other flags is derived anew when the run is resumed, perhaps with other flags.
    args.inherited = {name: value for name, value in vars(args).items() if name not in NOT_INHERITED}
    schedule.settle(args, parser)
    if args.train_batch % (args.mini_batch or 1):
        parser.error(f'--mini-batch {args.mini_batch} does not divide --train-batch, which is {args.train_batch}')
    try:
        args.network = models.resolve_options(args.arch, {name: getattr(args, name) for name in models.OPTION_FLAGS})
        with torch.device('meta'):
            models.build(args.arch, 2, methods.build_head(args), **args.network)
        methods.build_optimizer(args, torch.nn.Linear(1, 1), steps_per_epoch=1)
    except ValueError as error:
        parser.error(str(error))
    if args.checkpoint is None:
        name = '-'.join([args.dataset, f'{args.arch}{args.network.get("depth", "")}', *args.method])
        args.checkpoint = os.path.dirname(args.resume) or '.' if args.resume else os.path.join('checkpoints', name)
    return args, state


def main():
    args, state = parse_arguments()
    network = {'arch': args.arch, **args.network, 'num_classes': count_classes(args, state)}
    rehearse(args, network)
    if not args.evaluate:
        checkpoint.check_folder(args.checkpoint, args.resume, args.overwrite)
    device = set_up_device(args)
    model = models.build(args.arch, network['num_classes'], methods.build_head(args), **args.network)
    if state:
        checkpoint.load_model(model, state, network, args.resume)
    model.to(device, memory_format=torch.channels_last)
    print(', '.join(f'{name} {value}' for name, value in network.items()),
          f'| {count_parameters(model) / 1e6:.2f} million parameters',
          f'| method: {" ".join(args.method) or "none"} | {args.precision} on {device.type} | seed {args.seed}')
    if args.evaluate:
        split = load_split(args, 'test', state['classes'])
        batches = data.Batches(split, state['mean'], state['std'], args.test_batch, device)
        print(f'{args.resume}, of epoch {state["epoch"]} | {in_words("test", test(batches, model, args))}')
        return

    state = state or {'epoch': args.start_epoch, 'network': network}
    batches = load_batches(args, state, device)
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


def set_up_device(args):
    """The device, with PyTorch's switches and seeds set for it."""
    if args.gpu_id is not None:
        os.environ['CUDA_VISIBLE_DEVICES'] = args.gpu_id
        if torch.cuda.device_count() != 1:
            raise UserError(f'--gpu-id must name one CUDA device of this machine, and {args.gpu_id} names '
                            f'{torch.cuda.device_count()}')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if args.compile and not args.evaluate and not shutil.which(os.environ.get('CXX', 'g++')):
        raise UserError('--compile needs a C++ compiler, and there is no g++ here')
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # CUDA reads it when it is first used
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    return device


def count_classes(args, state):
    """The number of classes; refuses a batch that is larger than the training set. Reads no image."""
    if args.evaluate:
        return len(state['classes'])
    known = data.describe(args.dataset, args.data)
    if args.train_batch * args.batch_multiplier > known.train_size * (1 - (args.val_split or 0)):
        times = f' times --batch-multiplier {args.batch_multiplier}' if args.batch_multiplier > 1 else ''
        raise UserError(f'--train-batch {args.train_batch}{times} is larger than the training set of {known.train_size} images'
                        + (f' less --val-split {args.val_split}' if args.val_split else ''))
    return known.num_classes


def load_split(args, part, classes=None):
    """The 'train' or 'test' part of the data; UserError unless its classes are `classes`, those of a checkpoint."""
    split = data.load(args.dataset, args.data, part, args.image_size, args.workers)
    if classes and split.classes != classes:
        raise UserError(f'{args.resume} knows the classes {" ".join(classes[:10])}, but {args.dataset} has '
                        f'{" ".join(split.classes[:10])}')
    return split


def load_batches(args, state, device):
    """{'train': ..., 'test': ...} and, with --val-split, 'val'. What normalises them goes into `state`."""
    splits = {part: load_split(args, part, state.get('classes')) for part in ('train', 'test')}
    if 'mean' not in state:
        state['mean'], state['std'] = data.mean_and_std(splits['train'].images)
        state['classes'] = splits['train'].classes
    if args.val_split:
        splits['train'], splits['val'] = data.split_validation(splits['train'], args.val_split, args.seed)
    sizes = {'train': args.train_batch * args.batch_multiplier}
    return {part: data.Batches(split, state['mean'], state['std'], sizes.get(part, args.test_batch),
                               device, padding=4, flip=data.DATASETS[args.dataset].flip) for part, split in splits.items()}


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
    write_json(in_folder('args.json'), {name: value for name, value in vars(args).items() if name not in ('given', 'inherited')}
               | {'network': state['network'], 'parameters': count_parameters(model)})
    state['args'] = args.inherited
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
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(epoch * len(batches) + index, len(batches), args)

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
def test(batches, model, args):
    """Mean cross-entropy and accuracies over all batches."""
    model.eval()
    meter = Meter(len(batches), batches.num_classes, batches.device)
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
    tested = test(batches, model, args)
    log = read_log(in_folder('log.txt'))
    result = {'epoch': epoch, **{f'test {name}'.lower(): value for name, value in tested.items()}, 'best': best,
              'chosen by': 'validation' if args.val_split else 'last epoch',
              'parameters': count_parameters(model),
              'seconds per epoch': sum(log['Seconds']) / max(len(log['Seconds']), 1)}
    write_json(in_folder('result.json'), result)
    note = (f'chosen by validation top-1 {best["top1"]:.2f}%' if args.val_split
            else f'best test epoch {best["epoch"]}: {best["top1"]:.2f}%')
    print(f'\nepoch {epoch} | {in_words("test", tested)} | {note}')
    for name, files in (('log', 'log.txt'), ('curves', 'log.png log.pdf'), ('checkpoint', checkpoint.LAST),
                        ('best', checkpoint.BEST), ('result', 'result.json')):
        print(f'{name:12}', '  '.join(in_folder(file) for file in files.split()))


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def in_words(part, measured):
    return f'{part} ' + ' '.join(f'{name.lower()} {value:.4f}' if name == 'Loss' else f'{name.lower()} {value:.2f}%'
                                 for name, value in measured.items())


if __name__ == '__main__':
    run(main)
