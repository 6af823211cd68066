"""What cifar.py and imagenet.py do with a model, an optimizer and batches: epochs of steps, tests, checkpoints, the report."""
import copy
import functools
import math
import os
import shlex
import signal
import time

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils import checkpoint, device as devices, distributed, methods, metrics, schedule
from utils.bar import ProgressLine
from utils.errors import Stopped, UserError
from utils.eval import Meter, cross_entropy, quantities, shown_logits
from utils.files import replacing, write_json
from utils.logger import Logger, plot_log, read_log, read_rows
from utils.schedule import learning_rate


def complete(args, state, model, optimizer, batches):
    """`fit` and `report`. If it is stopped, `Stopped` says how to go on."""
    checkpoint.begin_random_state(state, args.seed)
    try:
        try:
            tested = fit(args, state, model, optimizer, batches)
            report(args, state, tested, batches['test'])
        except RuntimeError as error:
            if 'killed by signal: Terminated' not in str(error):
                raise
            raise Stopped(signal.SIGTERM) from error  # which a process that reads images was sent as well, and got first
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise UserError('batch norm cannot train on a single image, and so many images cannot be read that one is left alone; '
                        'mend those, or give larger parts') from error
    except Stopped as stop:
        last = shlex.quote(os.path.join(args.checkpoint, checkpoint.LAST))
        how = 'the same command and --resume auto' if distributed.active() else f'python {state["script"]} --resume {last}'
        stop.sentence = f'Stopped; the finished epochs are kept. Go on with: {how}'
        raise


def fit(args, state, model, optimizer, batches):
    """Train from where `state` is to the last epoch; after each one judge, log, save and draw. Returns the model to be tested.

    batches: {'train': ..., 'test': ...} and perhaps 'val', as data.Batches or images.ImageBatches give them.
    """
    in_folder = functools.partial(os.path.join, args.checkpoint)
    judge = 'val' if 'val' in batches else 'test'
    average = moving_average(args, state, model, optimizer)
    judged_model = average.module if average else model
    criterion = methods.build_criterion(args, model)
    compiled = torch.compile(model) if args.compile else model
    network = distributed.parallel(compiled)
    logger = enter_folder(args, state, model, batches, judge)
    state['best'] = distributed.agreed(state['best'])

    def save(name, **position):
        random_states = distributed.gathered(checkpoint.random_state())
        state.update(state_dict=model.state_dict(), optimizer=optimizer.state_dict(), random_state=random_states[0],
                     other_random_states=random_states[1:], ema=average.state_dict() if average else None,
                     **{'step': 0, 'meter': None, 'seconds': 0.0, **position})
        if distributed.is_first():
            checkpoint.save(in_folder(name), state)

    def save_within_epoch(step):
        if step % args.checkpoint_every == 0 and step < steps:
            whole = copy.deepcopy(meter)
            whole.gather()
            check_losses(whole, epoch, steps, args)
            save(checkpoint.LAST, step=step, meter=whole.state(), seconds=time.perf_counter() - began)

    steps = len(batches['train'])
    first, before, counted = state.get('step', 0), state.get('seconds', 0.0), state.get('meter')
    if not first:
        save(checkpoint.LAST)  # a run broken off in its first epoch can be resumed too
    for epoch in range(state['epoch'], args.epochs):
        began = time.perf_counter() - before
        meter = Meter(steps, batches['train'].num_classes, batches['train'].device)
        if first:
            meter.load(counted, own=distributed.is_first())
        trained = train(batches['train'], network, criterion, optimizer, epoch, args, meter, first,
                        after_step=save_within_epoch if args.checkpoint_every else None)
        seconds, first, before = time.perf_counter() - began, 0, 0.0
        rate = learning_rate(epoch * steps, steps, args)
        judged = test(batches[judge], judged_model if average else compiled, args)
        report_skipped(batches, in_folder('skipped.txt'))
        if not math.isfinite(judged['Loss']):
            raise UserError(f'the {judge} loss became {judged["Loss"]} after epoch {epoch + 1}, at learning rate {rate:.4g}, '
                            f'{last_good(args, epoch)}')
        state['epoch'] = epoch + 1
        if logger:
            logger.append([epoch + 1, rate, *trained.values(), *judged.values(), seconds])
        if judged['Top-1'] > state['best']['top1']:
            state['best'] = {'top1': judged['Top-1'], 'epoch': epoch + 1}
            save(checkpoint.BEST)
        save(checkpoint.LAST)
        if logger:
            plot_log(in_folder('log.txt'), in_folder('log.png'), in_folder('log.pdf'))
        print(f'epoch {epoch + 1}/{args.epochs} | lr {rate:.4g} | {in_words("train", trained)} | {in_words(judge, judged)} '
              f'| {seconds:.1f} s', flush=True)
    return judged_model


def moving_average(args, state, model, optimizer):
    """The exponential moving average of the weights and buffers of `model` over the optimizer's steps, or None without --ema."""
    if not args.ema:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    if state.get('ema'):
        average.load_state_dict(state['ema'])
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    return average


def enter_folder(args, state, model, batches, judge):
    """The first writing to the run's folder. Returns the Logger in the first process, None in others."""
    columns = ['Epoch', 'Learning Rate', *(f'{part} {quantity}' for part in ('Train', judge.title())
                                           for quantity in quantities(state['network']['num_classes'])), 'Seconds']
    resumed_log = os.path.join(os.path.dirname(args.resume), 'log.txt') if args.resume else None
    old_rows = read_rows(resumed_log, columns, state['epoch'])
    state['args'], state['optimizer_class'] = args.inherited, args.optimizer
    distributed.wait()
    if not distributed.is_first():
        state.setdefault('best', {})
        return None
    checkpoint.enter_folder(args.checkpoint, args.resume, args.overwrite, finished=state['epoch'] >= args.epochs)
    logger = Logger(os.path.join(args.checkpoint, 'log.txt'), columns, old_rows)
    write_json(os.path.join(args.checkpoint, 'args.json'),
               {name: value for name, value in vars(args).items() if name not in ('given', 'inherited', 'regime')}
               | {'script': state['script'], 'as given': args.inherited, 'network': state['network'], 'parameters': count_parameters(model),
                  'training images by class': batches['train'].class_counts, 'processes': distributed.world_size(),
                  'environment': devices.environment(batches['train'].device)})
    if not os.path.exists(os.path.join(args.checkpoint, checkpoint.BEST)):
        state['best'] = {'top1': -1.0, 'epoch': 0}
    return logger


def train(batches, model, criterion, optimizer, epoch, args, meter=None, first=0, after_step=None):
    """One epoch from batch number `first` on, counted by `meter`; returns the mean loss and the accuracies seen on the way.

    after_step: is told how many batches of the epoch are behind.
    """
    model.train()
    meter = meter or Meter(len(batches), batches.num_classes, batches.device)
    shown, next_part = shown_logits(model), getattr(optimizer, 'next_part', lambda parts: None)
    statistics, processes = distributed.Statistics(model), distributed.world_size()
    size = args.mini_batch or args.train_batch // processes  # of a part, whose images pass the network together
    share = args.train_batch * args.batch_multiplier // processes
    begin = distributed.rank() * share  # of this process's share of the batch
    with ProgressLine(f'train {epoch + 1}/{args.epochs}', len(batches) - first) as bar:
        asked = time.perf_counter()
        for index, (inputs, targets) in enumerate(batches.shuffled(args.seed, epoch, first), first):
            data_seconds = time.perf_counter() - asked
            options = schedule.options(epoch * len(batches) + index, len(batches), args)
            for group in optimizer.param_groups:
                group.update(options)

            own, total = len(targets), batches.images_in(index)
            sizes = part_sizes(own, min(max(total - begin, 0), share), size)
            parts = list(zip(inputs.split(sizes), targets.split(sizes)))
            if own == 0:  # gradients are averaged over all processes, so this one passes something too, with weight 0
                parts = [(inputs.new_zeros(2, *inputs.shape[1:]), targets.new_zeros(2, *targets.shape[1:]))]  # as batch norm needs two

            def renew_noise(noise, position):  # each --mini-batch, or else each whole batch, has noise of its own
                wanted = min(position, total - 1) // (args.mini_batch or args.train_batch)
                if wanted > noise:
                    next_part(wanted - noise)
                return wanted

            def closure():
                optimizer.zero_grad()
                local, noise = getattr(optimizer, 'local_pass', False), 0
                logits, losses = [], []
                with statistics.of_all(len(parts) if own else 0):
                    for number, (images, labels) in enumerate(parts):
                        noise = renew_noise(noise, begin + number * size)
                        with distributed.averaging(model, now=number == len(parts) - 1 and not local):
                            with torch.autocast(batches.device.type, torch.bfloat16, enabled=args.precision == 'bf16'):
                                outputs = model(images, labels)
                                loss = criterion(outputs, labels) * (len(labels) / max(own, 1))
                            (loss * (own * processes / total)).backward()
                        logits.append(shown(outputs))
                        losses.append(loss.detach())
                renew_noise(noise, total)  # as far as every other process
                if args.clip_norm:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
                return torch.cat(logits), sum(losses)

            logits, loss = optimizer.step(closure)
            if own:
                meter.update(logits, targets, loss)
            else:
                meter.skip()
            if bar.advance(meter, data_seconds):
                check_losses(meter, epoch, len(batches), args)
            if after_step:
                after_step(index + 1)
            asked = time.perf_counter()
    meter.gather()
    check_losses(meter, epoch, len(batches), args)
    return read_from(meter, 'train')


def part_sizes(images, expected, size):
    """How many of `images` pass the network together, a list: `size` at a time.

    Where images cannot be read, so that there are fewer than `expected`, one that is left alone goes with the part before, as batch
    norm may need two.
    """
    sizes = [min(size, images - begin) for begin in range(0, images, size)]
    if images < expected and len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [size + 1]
    return sizes


@torch.no_grad()
def test(batches, model, args, meter=None):
    """Mean cross-entropy and accuracies over all batches, counted by `meter` or a Meter."""
    model.eval()
    meter = meter or Meter(len(batches), batches.num_classes, batches.device)
    with ProgressLine('test', math.ceil(len(batches) / distributed.world_size())) as bar:
        for inputs, targets in batches:
            if len(targets):
                with torch.autocast(batches.device.type, torch.bfloat16, enabled=args.precision == 'bf16'):
                    outputs = model(inputs)
                meter.update(outputs, targets, cross_entropy(outputs, targets))
            bar.advance(meter)
    meter.gather()
    return read_from(meter, 'test')


def read_from(meter, part):
    if not sum(meter.sizes):
        raise UserError(f'none of the images to {part} on can be read')
    return meter.read()


def report_skipped(batches, path=None):
    """Print which images of these {part: batches} could not be read, in any process; `path` lists them, also those of before."""
    skipped = {}
    for part in batches.values():
        for process in distributed.gathered(getattr(part, 'skipped', {})):
            skipped.update(process)
    if path and distributed.is_first() and os.path.exists(path):
        with open(path) as file:
            skipped = dict(line.rstrip('\n').split('\t', 1) for line in file) | skipped
    if skipped and distributed.is_first():
        image, reason = min(skipped.items())
        print(f'skipped {len(skipped)} image{"s" * (len(skipped) > 1)} that cannot be read: {image} ({reason})'
              + (' and others' if len(skipped) > 1 else ''))
        if path:
            with replacing(path) as temporary, open(temporary, 'w') as file:
                file.writelines(f'{image}\t{reason}\n' for image, reason in sorted(skipped.items()))


def check_losses(meter, epoch, steps_per_epoch, args):
    """UserError if a batch of this epoch had a loss that is not a number or infinite."""
    bad = meter.first_bad_batch()
    if bad:
        rate = learning_rate(epoch * steps_per_epoch + bad[0], steps_per_epoch, args)
        raise UserError(f'the loss became {bad[1]} in epoch {epoch + 1}, batch {bad[0] + 1} of {steps_per_epoch}, '
                        f'at learning rate {rate:.4g}, {last_good(args, epoch)}')


def last_good(args, epoch):
    left = 'from before that' if args.checkpoint_every else f'as epoch {epoch} left it'
    return (f'so the run stops; {os.path.join(args.checkpoint, checkpoint.LAST)} is {left}; '
            'try a smaller --lr, a --warmup or a --clip-norm')


def report(args, state, model, batches):
    """The result: of the last epoch, or with --val-split of the epoch that was best on the validation images."""
    in_folder = functools.partial(os.path.join, args.checkpoint)
    best, epoch, chosen = state['best'], state['epoch'], None
    if getattr(args, 'val_split', None):
        chosen = distributed.agreed(checkpoint.read(in_folder(checkpoint.BEST)) if distributed.is_first() else None)
        best, epoch = chosen['best'], chosen['epoch']
        model.load_state_dict(checkpoint.weights_to_test(chosen))
    predictions = metrics.Predictions(len(batches), batches.num_classes, batches.device)
    tested = test(batches, model, args, predictions)
    probabilities, targets = predictions.gathered()
    if not distributed.is_first():
        return
    by_class, confusion = metrics.of_classes(probabilities, targets)
    metrics.write_confusion(confusion, state['classes'], in_folder('confusion.csv'), in_folder('confusion.png'))
    log = read_log(in_folder('log.txt'))
    result = {'epoch': epoch, **{f'test {name}'.lower(): value for name, value in {**tested, **by_class}.items()}, 'best': best,
              'chosen by': 'validation' if chosen else 'last epoch',
              'test images': len(targets), 'parameters': count_parameters(model),
              'seconds per epoch': sum(log['Seconds']) / max(len(log['Seconds']), 1)}
    write_json(in_folder('result.json'), result)
    note = (f'chosen by validation top-1 {best["top1"]:.2f}%' if chosen
            else f'best test epoch {best["epoch"]}: {best["top1"]:.2f}%')
    print(f'\nepoch {epoch} | {in_words("test", tested)} | {note}')
    print(metrics.in_words(state['classes'], by_class))
    for name, files in (('log', 'log.txt'), ('curves', 'log.png log.pdf'), ('checkpoint', checkpoint.LAST), ('best', checkpoint.BEST),
                        ('confusion', 'confusion.csv confusion.png'), ('result', 'result.json')):
        print(f'{name:12}', '  '.join(in_folder(file) for file in files.split()))


def headline(args, network, model, device):
    """What a run says of itself first."""
    return (f'{", ".join(f"{name} {value}" for name, value in network.items())} | {count_parameters(model) / 1e6:.2f} million parameters '
            f'| method: {" ".join(args.method) or "none"} | {args.precision} on {device.type} | seed {args.seed}'
            + (f' | {distributed.world_size()} processes' if distributed.active() else ''))


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def in_words(part, measured):
    return f'{part} ' + ' '.join(f'{name.lower()} {value:.4f}' if name == 'Loss' else f'{name.lower()} {value:.2f}%'
                                 for name, value in measured.items())
