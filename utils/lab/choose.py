"""The best of several trials, each a folder with one run for each seed, by validation images alone.

    python -m utils.lab.choose checkpoints/search/fashion-mnist-0.01-50epochs/trials/dma
    python -m utils.lab.choose results/search/fashion-mnist-0.01-50epochs/trials/* --markdown

Prints the name of the best folder below each DIR; with --markdown a table of all trials instead. A trial counts by the
mean over its seeds of the top-1 accuracy on the validation images after the last epoch. The test set has no part in it.
"""
import os
import sys

from utils.errors import UserError
from utils.flags import Parser, file_path
from utils.lab import runs as lab_runs
from utils.metrics import plus_minus, spread
from utils.script import run_script


def main():
    parser = Parser(prog='choose', usage='python -m utils.lab.choose DIR [DIR ...] [--markdown]',
                    description='The best of several trials by validation images.')
    parser.add_argument('folders', nargs='+', type=file_path, metavar='DIR',
                        help='a folder with a folder for each trial')
    parser.add_argument('--markdown', action='store_true', help='print a table of all trials')
    args = parser.parse_args()
    if args.markdown:
        print('| trial | n | validation top-1 | |', '| --- | --- | --- | --- |', sep='\n')
    for folder in args.folders:
        trials = validation_of(folder)
        best = max(trials, key=lambda name: spread(trials[name])[0])
        if not args.markdown:
            print(best)
            continue
        for name, values in trials.items():
            print(f'| {os.path.basename(os.path.normpath(folder))}: {name} | {len(values)} '
                  f'| {plus_minus(*spread(values), ".2f")} | {"chosen" if name == best else ""} |')


def validation_of(folder):
    """The name of each trial below `folder` -> a list of the last epoch's validation top-1, one number for each seed.

    A trial that lacks a seed of the others, as its run failed, is left out and named. UserError if none is left, or if
    a run has no validation images.
    """
    paths, _ = lab_runs.find_runs([folder])
    runs, others = lab_runs.read_runs(paths, lab_runs.Flags())
    trials, settings = {}, {}
    for run in runs:
        if not run.chosen:
            raise UserError(f'{run.folder} has no validation images, by which it could be chosen; it needs --val-split')
        name = os.path.relpath(run.folder, folder).split(os.sep)[0]
        trials.setdefault(name, {})[run.seed] = run.curve[max(run.curve)]
        if settings.setdefault(name, run.setting) != run.setting:
            flags = [flag for flag in settings[name] if settings[name][flag] != run.setting.get(flag)]
            raise UserError(f'{os.path.join(folder, name)} has runs of several settings ({", ".join(flags)}), and a '
                            'trial is one setting with several seeds; train those of the other setting again')
    print(*others, sep='\n', end='\n' if others else '', file=sys.stderr)
    seeds = set().union(*trials.values())
    for name, values in list(trials.items()):
        if missing := sorted(seeds - values.keys()):
            print(f'left out: {os.path.join(folder, name)} (no finished run of seed {missing[0]})', file=sys.stderr)
            del trials[name]
    if not trials:
        raise UserError(f'no trial in {folder} is finished')
    if '.' in trials:
        raise UserError(f'{folder} is a run itself; name a folder with a folder for each trial')
    return {name: [values[seed] for seed in sorted(values)] for name, values in sorted(trials.items())}


if __name__ == '__main__':
    run_script(main)
