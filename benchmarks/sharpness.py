"""What a scan costs beyond evaluating the network, as ratios of times measured alternately in one run.

    python benchmarks/sharpness.py                       ResNet-20, 1000 images, about three minutes on two cores

1. Points per second of visualize_sharpness.py, each with weights of its own and a row in the table, over a bare
   evaluation of the same data: batches that never leave the device and are already normalised, loss and accuracy
   added up.
2. The same for gradients, as measure_sharpness.py needs them, over a bare forward and backward pass.

Every round times all four, one after the other; a ratio is taken within a round, and the median of the rounds is
printed.
"""
import argparse
import os
import pathlib
import statistics
import sys
import tempfile

import torch
import torch.nn.functional as F
from train_step import DEVICE, device_name, in_rounds, network

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from utils.batches import Batches, Split, seeded_generator  # noqa: E402
from utils.lab.landscape import Landscape  # noqa: E402
from utils.lab.scan import Scan  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='resnet')
    parser.add_argument('--depth', type=int)
    parser.add_argument('--images', type=int, default=1000)
    parser.add_argument('--batch', type=int, default=500)
    parser.add_argument('--points', type=int, default=5, help='in one timing')
    parser.add_argument('--rounds', type=int, default=7)
    settings = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randint(256, (settings.images, 32, 32, 3), dtype=torch.uint8, generator=generator),
                       torch.randint(10, (settings.images,), generator=generator), list('0123456789'))
    batches = Batches(split, *split.mean_and_std(), settings.batch, DEVICE)
    model = network(settings).eval()
    landscape, resident = Landscape(model, batches), list(batches)
    direction = landscape.noise(seeded_generator(0, device=DEVICE), 'normal', 'filter')

    def bare_points():
        with torch.no_grad():
            for _ in range(settings.points):
                loss, correct = torch.zeros((), device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
                for inputs, targets in resident:
                    outputs = model(inputs)
                    loss += F.cross_entropy(outputs, targets)
                    correct += (outputs.argmax(dim=1) == targets).sum()
                loss.item(), correct.item()

    def scan():
        with tempfile.TemporaryDirectory() as folder:
            table = Scan(os.path.join(folder, 'scan'), {}, ['alpha', 'loss', 'top-1', 'top-5'], 1)
            for index in range(settings.points):
                alpha = 0.01 * index
                table.append((alpha,), landscape.measure(landscape.weights + alpha * direction).values())

    def bare_gradients():
        for _ in range(settings.points):
            model.zero_grad()
            for inputs, targets in resident:
                F.cross_entropy(model(inputs), targets).backward()

    def gradients():
        for index in range(settings.points):
            landscape.loss_and_gradient(landscape.weights + 0.01 * index * direction)

    timed = {'scan': (bare_points, scan), 'gradients': (bare_gradients, gradients)}
    rounds, name = in_rounds(timed, settings.rounds), device_name()
    print(f'{settings.arch}, {settings.images} images, {settings.rounds} rounds of {settings.points} points, torch '
          f'{torch.__version__}, {name}')
    for name, what in (('scan', 'points per second over a bare evaluation'),
                       ('gradients', 'gradients per second over a bare pass')):
        ratios = sorted(row[name][0] / row[name][1] for row in rounds)
        each = statistics.median(row[name][1] for row in rounds) / settings.points
        print(f'{what}: {statistics.median(ratios):.3f}  (rounds {ratios[0]:.3f} to {ratios[-1]:.3f}; {each:.3f} s '
              'each)')


if __name__ == '__main__':
    main()
