"""What the training loop costs beyond the mathematics, as ratios of times measured alternately in one run.

    python benchmarks/train_step.py                      ResNet-20, batch 128, about five minutes on two cores

1. An epoch of cifar.py over a bare loop: forward, backward and optimizer step on one batch that never leaves the
   device.
2. Images per second of cifar.py, in float32 and in bf16, over the usual pipeline: PIL images through torchvision's
   transforms in a DataLoader with workers, float32, contiguous, loss and accuracy read at every step.

Every round times all four, one after the other; a ratio is taken within a round, and the median of the rounds is
printed.
"""
import argparse
import itertools
import os
import pathlib
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import cifar  # noqa: E402
from models import cifar as models  # noqa: E402
from utils import checkpoint, methods, output, schedule  # noqa: E402
from utils.batches import Batches, Split  # noqa: E402
from utils.logger import Logger, plot_log  # noqa: E402
from utils.run import Run  # noqa: E402

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
EPOCH = 391  # steps in an epoch of CIFAR-10 at batch 128


def seconds(function):
    """How long function() takes, the device's work included."""
    wait = torch.cuda.synchronize if DEVICE.type == 'cuda' else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def in_rounds(timed, rounds):
    """Seconds of each pair of functions, after a warm-up of each (memory, autotuning), alternately: a list with a dict
    for each round, name -> (seconds of the first, seconds of the second).
    """
    for pair in timed.values():
        for function in pair:
            function()
    return [{name: (seconds(bare), seconds(ours)) for name, (bare, ours) in timed.items()} for _ in range(rounds)]


def device_name():
    return torch.cuda.get_device_name() if DEVICE.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'


def network(settings, channels_last=True):
    torch.manual_seed(0)
    model = models.build(settings.arch, 10, depth=settings.depth).to(DEVICE)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def bare_loop(settings):
    model = network(settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    inputs = torch.randn(settings.batch, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (settings.batch,), device=DEVICE)

    def epoch():
        for _ in range(settings.steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    return epoch


def cifar_train(settings, split, precision):
    parser = cifar.make_parser()
    args = parser.parse_args(f'--precision {precision} --epochs 2 --lr-schedule cosine --warmup 0 --manualSeed '
                             '0'.split())
    schedule.fill_in(args, None, parser)
    model = network(settings)
    optimizer, criterion = methods.build_optimizer(args, model, settings.steps), methods.build_criterion(args, model)
    train = FirstBatches(split, *split.mean_and_std(), settings.batch, DEVICE, padding=4, flip=True)
    train.steps = settings.steps
    run = Run(args, {}, model, optimizer, {'train': train})
    return lambda: cifar.train(run, criterion, optimizer, 0, args), model, optimizer


class FirstBatches(Batches):
    """The first `steps` batches of an epoch, after the draws for the whole of it."""

    def __len__(self):
        return self.steps

    def shuffled(self, seed, epoch, first=0):
        return itertools.islice(super().shuffled(seed, epoch, first), self.steps)


class Pictures(Dataset):
    """As torchvision's CIFAR10: an array, from which each image is made a PIL image and transformed."""

    def __init__(self, split):
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(),
                                    T.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def usual_pipeline(settings, split):
    pictures = Pictures(split)
    sampler = RandomSampler(pictures, num_samples=settings.steps * settings.batch)
    loader = DataLoader(pictures, settings.batch, sampler=sampler, num_workers=settings.workers,
                        persistent_workers=True,
                        pin_memory=DEVICE.type == 'cuda')
    model = network(settings, channels_last=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def epoch():
        for inputs, targets in loader:
            inputs, targets = inputs.to(DEVICE, non_blocking=True), targets.to(DEVICE, non_blocking=True)
            outputs = model(inputs)
            loss = F.cross_entropy(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item(), (outputs.argmax(dim=1) == targets).float().mean().item()

    return epoch


def end_of_epoch(model, optimizer):
    """What cifar.py does once per epoch besides training and testing: a log row, two checkpoints and the curves."""
    folder = tempfile.TemporaryDirectory()
    logger = Logger(os.path.join(folder.name, 'log.txt'),
                    ['Epoch', 'Train Loss', 'Test Loss', 'Train Top-1', 'Test Top-1'])

    def write():
        logger.append([1, 1.0, 1.0, 50.0, 50.0])
        state = {'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict(),
                 'random': checkpoint.random_state()}
        for name in (output.BEST, output.LAST):
            checkpoint.save(os.path.join(folder.name, name), state)
        plot_log(logger.path, os.path.join(folder.name, 'log.png'), os.path.join(folder.name, 'log.pdf'))

    write.folder = folder  # deleted with the function
    return write


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='resnet')
    parser.add_argument('--depth', type=int)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--steps', type=int, default=40, help='steps in one timing')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count()), help="the DataLoader's")
    settings = parser.parse_args()
    number = settings.steps * settings.batch
    split = Split(torch.randint(256, (50000, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (50000,)),
                  list('0123456789'))
    ours, model, optimizer = cifar_train(settings, split, 'fp32')
    timed = {'bare': bare_loop(settings), 'ours': ours, 'ours bf16': cifar_train(settings, split, 'bf16')[0],
             'usual': usual_pipeline(settings, split), 'end of epoch': end_of_epoch(model, optimizer)}
    for function in timed.values():
        function()  # warm-up: memory, workers, autotuning
    rounds = [{name: seconds(function) for name, function in timed.items()} for _ in range(settings.rounds)]

    name = device_name()
    print(f'{settings.arch}, batch {settings.batch}, {settings.rounds} rounds of {settings.steps} steps, torch '
          f'{torch.__version__}, {name}')
    for key in timed:
        each = statistics.median(row[key] for row in rounds)
        print(f'  {key:12} {each * 1000:8.1f} ms' if key == 'end of epoch' else
              f'  {key:12} {each / settings.steps * 1000:8.1f} ms per step {number / each:9.0f} images/s')

    def ratio(function):
        values = sorted(function(row) for row in rounds)
        return f'{statistics.median(values):.3f}  (rounds {values[0]:.3f} to {values[-1]:.3f})'

    print('epoch of cifar.py / bare loop:', ratio(lambda row: row['ours'] / row['bare']))
    print(f'  with the end of an epoch of {EPOCH} steps:',
          ratio(lambda row: (row['ours'] * EPOCH / settings.steps + row['end of epoch'])
                / (row['bare'] * EPOCH / settings.steps)))
    print('images per second over the usual pipeline, fp32:', ratio(lambda row: row['usual'] / row['ours']))
    print('images per second over the usual pipeline, bf16:', ratio(lambda row: row['usual'] / row['ours bf16']))


if __name__ == '__main__':
    main()
