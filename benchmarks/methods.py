"""What each method costs: a step of cifar.py with it over the same step of plain SGD, as ratios of times measured
alternately.

    python benchmarks/methods.py                         ResNet-20, batch 128, about fifteen minutes on two cores
    python benchmarks/methods.py --rows dma lsoftmax     some of the rows

A step is all that the training loop does with a batch, making the batch and counting the accuracy included. Every
round times each method right after plain SGD; the ratio is of such two, and the median of the rounds is printed. Then
the peak memory of a training step of LSoftmaxLinear over that of nn.Linear, with 100,000 classes, each in a process of
its own.
"""
import argparse
import functools
import multiprocessing
import pathlib
import re
import statistics
import sys

import torch
import torch.nn.functional as F
from train_step import DEVICE, FirstBatches, device_name, seconds

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import cifar  # noqa: E402
from lsoftmax import LSoftmaxLinear  # noqa: E402
from models import cifar as models  # noqa: E402
from utils import methods, schedule  # noqa: E402
from utils.batches import Split  # noqa: E402
from utils.run import Run  # noqa: E402

LAYERS = '--large-margin-layers input layer1 layer2 layer3'
ROWS = {
    'dma': '--method dma',
    'lsoftmax': '--method lsoftmax --margin 4',
    'smoothout': '--method smoothout',
    'amp': '--method amp',
    'amp_late': '--method amp --method-start 0.7 --epochs 1',  # a whole training, whose last 3 of 10 steps are AMP's
    'amp_fraction': '--method amp --climb-fraction 0.25',
    'sam': '--method sam',
    'momentum_sam': '--method sam --direction momentum',
    'large_margin': f'--method large_margin {LAYERS}',
    'large_margin_3': f'--method large_margin {LAYERS} --top-k 3',
}


def epoch(flags, settings, split):
    """A function that trains on the first `settings.steps` batches of an epoch."""
    parser = cifar.make_parser()
    args = parser.parse_args(f'--epochs 2 --lr-schedule cosine --warmup 0 --lr 1e-3 --manualSeed 0 {flags}'.split())
    schedule.fill_in(args, None, parser)
    torch.manual_seed(0)
    model = models.build(settings.arch, 10, methods.build_head(args), depth=settings.depth)
    model.to(DEVICE, memory_format=torch.channels_last)
    train = FirstBatches(split, *split.mean_and_std(), settings.batch, DEVICE, padding=4, flip=True)
    train.steps = settings.steps
    optimizer = methods.build_optimizer(args, model, settings.steps)
    criterion = methods.build_criterion(args, model, train.class_counts)
    return functools.partial(cifar.train, Run(args, {}, model, optimizer, {'train': train}), criterion, optimizer, 0,
                             args)


def peak_memory(kind, classes, features, batch):
    """MiB that two training steps of a classifier need at most, its weight and gradient included."""
    def used():
        if DEVICE.type == 'cuda':
            return torch.cuda.max_memory_allocated() / 2 ** 20
        status = pathlib.Path('/proc/self/status').read_text()  # the most that this process has ever held; Linux only
        return int(re.search(r'VmHWM:\s+(\d+) kB', status).group(1)) / 2 ** 10

    torch.ones(8, 8, device=DEVICE) @ torch.ones(8, 8, device=DEVICE)  # what the libraries hold for themselves
    before = used()
    torch.manual_seed(0)
    x, targets = torch.randn(batch, features, device=DEVICE), torch.randint(classes, (batch,), device=DEVICE)
    with torch.device(DEVICE):
        plain = torch.nn.Linear(features, classes, bias=False) if kind == 'linear' else None
        layer = plain or LSoftmaxLinear(features, classes)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        hidden = x.clone().requires_grad_()
        F.cross_entropy(layer(hidden, targets) if kind == 'lsoftmax' else layer(hidden), targets).backward()
        optimizer.step()
    return used() - before


def in_own_process(function, *arguments):
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='resnet')
    parser.add_argument('--depth', type=int)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--steps', type=int, default=10, help='steps in one timing, a multiple of 10')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--classes', type=int, default=100000, help='of the measurement of memory; 0 leaves it out')
    settings = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randint(256, (50000, 32, 32, 3), dtype=torch.uint8, generator=generator),
                       torch.randint(10, (50000,), generator=generator), list('0123456789'))
    plain, timed = epoch('', settings, split), {name: epoch(ROWS[name], settings, split) for name in settings.rows}
    for function in (plain, *timed.values()):
        function()  # warm-up: memory, autotuning
    rounds = [{name: (seconds(plain), seconds(function)) for name, function in timed.items()}
              for _ in range(settings.rounds)]

    name = device_name()
    print(f'{settings.arch}, batch {settings.batch}, {settings.rounds} rounds of {settings.steps} steps, torch '
          f'{torch.__version__}, {name}')
    each = statistics.median(reference for row in rounds for reference, _ in row.values()) / settings.steps
    print(f'plain SGD: {each * 1000:.1f} ms per step')
    for name in settings.rows:
        ratios = sorted(row[name][1] / row[name][0] for row in rounds)
        print(f'{ROWS[name]:90} {statistics.median(ratios):.3f}  (rounds {ratios[0]:.3f} to {ratios[-1]:.3f})')
    if settings.classes:
        peaks = {kind: in_own_process(peak_memory, kind, settings.classes, 512, 256) for kind in ('lsoftmax', 'linear')}
        print(f'peak memory of a step with {settings.classes} classes, 512 features, batch 256: LSoftmaxLinear '
              f'{peaks["lsoftmax"]:.0f} MiB, '
              f'nn.Linear {peaks["linear"]:.0f} MiB, ratio {peaks["lsoftmax"] / peaks["linear"]:.3f}')


if __name__ == '__main__':
    main()
