"""Runs per hour with runs side by side over one run after the other, as ratios measured alternately.

    python benchmarks/jobs.py                      LeNet and ResNet-8 on digits, one run for each core
    python benchmarks/jobs.py --jobs 8 --rounds 5 -- --dataset cifar10 --epochs 3

A batch is as many whole runs as there are side by side, with start, tests, pictures and report, through
scripts/jobs.py. A run that is alone has the threads that PyTorch gives it.
"""
import argparse
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
NETWORKS = {'LeNet': '--arch lenet --lr 0.02 --epochs 20', 'ResNet-8': '--arch resnet --depth 8 --epochs 10'}


def seconds(flags, runs, jobs):
    """How long `runs` runs of cifar.py take, `jobs` at a time."""
    environment = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    with tempfile.TemporaryDirectory() as folder:
        commands = [shlex.join([sys.executable, 'cifar.py', *flags, '--manualSeed', str(seed), '--checkpoint',
                                f'{folder}/{seed}']) for seed in range(runs)]
        began = time.perf_counter()
        subprocess.run([sys.executable, 'scripts/jobs.py', str(jobs)], input='\n'.join(commands), text=True, cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--jobs', type=int, default=len(os.sched_getaffinity(0)), help='runs side by side')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('flags', nargs='*', help='further flags of cifar.py, after --')
    settings = parser.parse_args()
    for name, network in NETWORKS.items():
        flags = ['--dataset', 'digits', *shlex.split(network), *settings.flags]
        ratios = []
        for _ in range(settings.rounds):
            alone = seconds(flags, settings.jobs, 1)
            ratios.append(alone / seconds(flags, settings.jobs, settings.jobs))
        print(f'{name}: {statistics.median(ratios):.2f} times the runs per hour with {settings.jobs} side by side '
              f'({min(ratios):.2f} to {max(ratios):.2f} in {settings.rounds} rounds; a batch of {settings.jobs} took '
              f'{alone:.0f} s one after the other)', flush=True)


if __name__ == '__main__':
    main()
