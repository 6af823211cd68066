"""How imagenet.py scales: images per second of several processes over those of one, as ratios measured alternately.

    python benchmarks/processes.py                       ResNet-18 at 64 pixels, one and two processes, about ten
                                                         minutes on two cores
    python benchmarks/processes.py --processes 8 --image-size 224 --arch resnet50 --batch 512 --images 20000 -- \\
        --precision bf16

Each run trains one epoch on generated JPEG files of that size. Every process has one thread and one that
reads images; on CUDA, a device and --workers that read. The seconds are those of the training alone, as log.txt has
them.
"""
import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from utils.logger import read_log  # noqa: E402


def write_images(folder, number, size):
    generator = np.random.default_rng(0)
    for part, count in (('train', number), ('val', 10)):
        for index in range(count):
            path = pathlib.Path(folder, part, f'class{index % 10}', f'{index}.jpg')
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray(generator.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
            pixels.resize((size, size), Image.Resampling.BICUBIC).save(path)


def images_per_second(settings, processes, folder):
    flags = ['--data', folder, '--arch', settings.arch, '--image-size', str(settings.image_size), '--train-batch',
             str(settings.batch),
             '--epochs', '1', '--manualSeed', '0', '-j', str(settings.workers), '--checkpoint', f'{folder}/run',
             '--overwrite', *settings.flags]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}',
               'imagenet.py', *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return settings.images / read_log(f'{folder}/run/log.txt')['Seconds'][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--image-size', type=int, default=64)
    parser.add_argument('--images', type=int, default=2560)
    parser.add_argument('--batch', type=int, default=128, help='of all processes together')
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('flags', nargs='*', help='further flags of imagenet.py, after --')
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, settings.images, settings.image_size)
        rounds = [[images_per_second(settings, processes, folder) for processes in (1, settings.processes)]
                  for _ in range(settings.rounds)]
    alone, together = (statistics.median(each) for each in zip(*rounds))
    ratios = sorted(several / one for one, several in rounds)
    print(f'{settings.arch} at {settings.image_size} pixels, batch {settings.batch} {" ".join(settings.flags)}\n'
          f'  one process {alone:8.1f} images/s\n  {settings.processes} processes {together:8.1f} images/s\n'
          f'images per second of {settings.processes} processes over one: {statistics.median(ratios):.3f}  '
          f'(rounds {ratios[0]:.3f} to {ratios[-1]:.3f})')


if __name__ == '__main__':
    main()
