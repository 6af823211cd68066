"""Compare runs of cifar.py, or of imagenet.py: one row per setting, over all of its seeds.

    python compare.py checkpoints/*
    python compare.py checkpoints --markdown --plot curves.png      # every run below checkpoints/
"""
import collections
import csv
import importlib
import math
import os
import shlex
import statistics
import sys
from typing import NamedTuple

from utils import datasets, methods
from utils.errors import UserError, shown
from utils.files import digest, drawn, read_json, save_figure
from utils.flags import Parser, file_path, with_todays_names
from utils.lab.checkpoints import SCRIPTS
from utils.logger import read_lines
from utils.metrics import plus_minus, spread
from utils.script import run_script

# Column -> format of its number. Of those in SECOND there are two: the mean, and what is called so.
COLUMNS = {'setting': '', 'n': 'd', 'last epoch': '.2f', 'chosen by validation': '.2f',
           'best, chosen by test set': '.2f',
           'at epoch': '.1f', 'difference': '+.2f', 'parameters (M)': '.2f', 'seconds per epoch': '.1f'}
SECOND = {'last epoch': 'std', 'chosen by validation': 'std', 'best, chosen by test set': 'std',
          'difference': 'standard error'}
ENVIRONMENT = ('commit', 'torch', 'device')


class Unfinished(Exception):
    """Which epoch a run has reached."""


class Mixed(Exception):
    """What a run was trained with changed on the way."""


class Run(NamedTuple):
    folder: str
    setting: dict  # a flag's name -> its value, of the flags that tell settings apart
    seed: int
    environment: dict  # each of ENVIRONMENT -> a word
    curve: dict  # epoch -> top-1 on the test set, or on the validation set if `chosen`
    chosen: bool  # by validation; otherwise the result is that of the last epoch
    top1: float  # the result, on the test set
    best: float  # top-1 of the curve's best epoch
    best_epoch: int
    parameters: int
    seconds: float  # per epoch


class Flags:
    """What a script knows of its flags, by their names in args.json and in the order of --help."""

    def __init__(self, script='cifar.py'):
        self.script = script
        parser = importlib.import_module(SCRIPTS[script]).make_parser()
        defaults = vars(parser.parse_args([]))
        self.spelling = {action.dest: next(word for word in action.option_strings if word.startswith('--'))
                         for action in parser._actions if action.dest in defaults}
        self.defaults = {name: hashable(defaults[name]) for name in self.spelling}
        self.choices = {action.dest: list(action.choices or ()) for action in parser._actions}
        self.of_method = {name: methods.flags(module) for name, module in methods.METHODS.items()}
        self.of_methods = set.union({'method'}, *self.of_method.values())

    def setting(self, args):
        """The flags that decide what a run computes, from its args.json."""
        known = {name: value for name, value in with_todays_names(args).items() if name in self.defaults}
        values = {**self.defaults, **known, **with_todays_names(args.get('as given', {}))}
        if not datasets.has_images_of_any_size(values.get('dataset', 'folder')):
            values.pop('data', None)  # it says where the data set is, not which one
        return {name: hashable(value) for name, value in methods.setting(values).items()}

    def names(self, settings):
        """All flags, and behind them those in `settings` that the script does not know any more."""
        return [*self.defaults, *sorted(set().union(*settings) - set(self.defaults))]

    def without_methods(self, setting):
        return frozenset((name, value) for name, value in setting.items() if name not in self.of_methods)

    def typed(self, setting, names):
        """Some flags of a setting as a person would type them; nothing for those that are off or not given."""
        words = []
        for name in names:
            value = setting.get(name)
            if value is not None and value is not False and value != ():
                words.append(self.spelling.get(name, f'--{name.replace("_", "-")}'))
                values = () if value is True else value if isinstance(value, tuple) else (value,)
                words += [str(each).removesuffix('.0') if isinstance(each, float) else str(each) for each in values]
        return shlex.join(words)


def hashable(value):
    return tuple(value) if isinstance(value, list) else value


def parse_arguments():
    parser = Parser(prog='compare.py', usage='python compare.py checkpoints/* [flags]',
                    description='One row per setting, over all of its seeds, from the folders that cifar.py and '
                                'imagenet.py write.')
    parser.add_argument('folders', nargs='*', type=file_path, metavar='DIR',
                        help='runs, or folders with runs somewhere below them')
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--markdown', action='store_true', help='print a Markdown table')
    group.add_argument('--csv', action='store_true', help='print CSV with every digit; what is said below it goes to '
                                                          'stderr')
    parser.add_argument('--plot', type=file_path, metavar='FILE',
                        help='draw top-1 accuracy over epochs into a .png or .pdf')
    args = parser.parse_args()
    if not args.folders:
        parser.error('name the folders of the runs to compare, such as checkpoints/*')
    if args.plot and not args.plot.lower().endswith(('.png', '.pdf')):
        parser.error(f'--plot must end in .png or .pdf, was given {args.plot}')
    if args.plot and not os.path.isdir(os.path.dirname(args.plot) or '.'):
        parser.error(f'--plot {args.plot} is in a folder that is not there; make it first')
    return args


def main():
    args = parse_arguments()
    folders, without = find_runs(args.folders)
    flags = Flags(next(filter(None, map(script_of, folders)), 'cifar.py'))
    runs, others = read_runs(folders, flags)
    others += without
    notes = sys.stderr if args.csv else sys.stdout
    if not runs:
        print(*others, sep='\n', file=notes, flush=True)
        raise UserError(f'none of the {len(others)} runs can be compared, as none is finished')
    settings = in_order(runs, flags)
    shared, names = name_settings([own[0].setting for own in settings], flags)
    plain = {flags.without_methods(own[0].setting): own for own in settings if own[0].setting['method'] == ()}
    rows = [summarise(name, own, plain.get(flags.without_methods(own[0].setting))) for name,
            own in zip(names, settings)]
    columns = [column for column in COLUMNS if any(row[column] is not None for row in rows)]
    if args.csv:
        write_csv(rows, columns, shared)
    else:
        print_table(rows, columns, shared, args.markdown)
    used = (', '.join(sorted({one.environment[key] for one in runs})) for key in ENVIRONMENT)
    print('Commit {}; PyTorch {}; device {}.'.format(*used), *others, sep='\n\n' if args.markdown else '\n', file=notes)
    if args.plot:
        plot(args.plot, settings, names, shared)


def find_runs(paths):
    """(the folders of the runs at or below `paths`, each once; a line about each path without any).

    UserError for a path that is not there, or if there is no run at all.
    """
    found, without = {}, []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'there is no folder {path}')
        below = []
        for folder, subfolders, files in os.walk(os.path.normpath(path)):
            is_run = 'args.json' in files or 'log.txt' in files
            below += [folder] if is_run else []
            subfolders[:] = [] if is_run else sorted(name for name in subfolders if not name.startswith('.'))
        if not below:
            without.append(f'left out: {shown(path)} (holds no run)')
        for folder in below:
            found.setdefault(os.path.realpath(folder), folder)
    if not found:
        raise UserError(f'{" ".join(paths[:5])} holds no run, which would be a folder with args.json and log.txt')
    return list(found.values()), without


def read_runs(folders, flags):
    """(finished runs, a line about each other one)."""
    runs, others = {}, []
    for folder in folders:
        if script_of(folder) not in (None, flags.script):
            others.append(f'left out: {folder} (of {script_of(folder)}, and others are of {flags.script})')
            continue
        try:
            one = read_run(folder, flags)
            first = runs.setdefault((frozenset(one.setting.items()), one.seed), one)
            if first is not one:
                others.append(f'left out: {folder} (same setting and seed as {first.folder})')
        except Unfinished as error:
            others.append(f'unfinished: {folder} ({error})')
        except Mixed as error:
            others.append(f'mixed: {folder} ({error})')
        except (OSError, ValueError) as error:
            others.append(f'broken: {folder} ({error})')
        except (KeyError, TypeError, AttributeError, OverflowError) as error:  # a list where a number should be ...
            others.append(f'broken: {folder} (args.json or result.json is not as cifar.py writes it: {error})')
    return list(runs.values()), [shown(line) for line in others]


def script_of(folder):
    """The script that a run is of, or None if its args.json cannot tell."""
    try:
        # the only one when it was not yet written down
        script = read_dict(folder, 'args.json').get('script', 'cifar.py')
    except (OSError, ValueError, AttributeError):
        return None
    return script if isinstance(script, str) and script in SCRIPTS else None


def read_run(folder, flags):
    """Raises Unfinished or Mixed if the run is, another error if one of its files is not as cifar.py writes it."""
    args = read_dict(folder, 'args.json')
    if 'check sum' in args:
        check_sum('args.json', {name: value for name, value in args.items() if name != 'check sum'}, args['check sum'])
    lines = read_lines(os.path.join(folder, 'log.txt'))
    curve, setting, epochs = curve_of(lines), flags.setting(args), number(args, 'epochs', file='args.json')
    progress = f'epoch {max(curve, default=0)} of {epochs}'
    if args.get('changes'):
        raise Mixed('; '.join(args['changes']))
    if max(curve, default=0) < epochs:
        raise Unfinished(progress)
    if not os.path.exists(os.path.join(folder, 'result.json')):
        raise Unfinished(f'{progress}, but no result.json')
    result = read_dict(folder, 'result.json')
    check_result(result, lines)
    top1 = number(result, 'test top-1', 100)
    environment = args.get('environment') or {}  # which runs of before it was written do not have
    return Run(folder, setting, number(args, 'seed', file='args.json'),
               {key: str(environment.get(key) or 'unknown') for key in ENVIRONMENT}, curve,
               result['chosen by'] == 'validation', top1, number(result['best'], 'top1', 100),
               int(number(result['best'], 'epoch')), int(number(result, 'parameters')),
               number(result, 'seconds per epoch'))


def number(held, name, most=math.inf, file='result.json'):
    """What `file` holds under a name, if it is a number from 0 to `most`; otherwise ValueError."""
    value = held[name]
    if type(value) not in (int, float) or not 0 <= value <= most or value == math.inf:
        raise ValueError(f'{name} in {file} is {value}')
    return value


def check_result(result, lines):
    """ValueError unless result.json and log.txt are as the run wrote them; earlier versions wrote no check sums."""
    if 'check sums' not in result:
        return
    checked = {name: value for name, value in result.items() if name not in
               ('check sums', 'seconds', 'seconds per epoch')}
    check_sum('result.json', checked, result['check sums']['result.json'])
    check_sum('log.txt', [line[:-1] for line in lines], result['check sums']['log.txt'])
    seconds = [float(line[-1]) for line in lines[1:] if line[-1] != 'nan']
    if result['seconds per epoch'] != sum(seconds) / max(len(seconds), 1):
        raise ValueError('the seconds in log.txt or result.json are not what the run wrote')


def check_sum(name, held, written):
    if digest(held) != written:
        raise ValueError(f'{name} is not what the run wrote; resume it with no flags to have it written again')


def read_dict(folder, name):
    held = read_json(os.path.join(folder, name))
    if not isinstance(held, dict):
        raise ValueError(f'{name} holds no names with values')
    return held


def curve_of(lines):
    """Epoch -> top-1 on the test or validation set, from the lines of log.txt."""
    names, *rows = lines or [[]]
    if rows and len(rows[-1]) < len(names):
        rows.pop()
    try:
        epoch, top1 = names.index('Epoch'), names.index('Val Top-1' if 'Val Top-1' in names else 'Test Top-1')
        curve = {int(row[epoch]): float(row[top1]) for row in rows}
        if any(len(row) != len(names) for row in rows):
            raise IndexError
    except (ValueError, IndexError) as error:
        raise ValueError('log.txt is not a log of cifar.py') from error
    if len(curve) < len(rows) or list(curve) != sorted(curve):
        raise ValueError('the epochs in log.txt do not count up')
    for number, value in curve.items():
        if not math.isfinite(value):
            raise ValueError(f'top-1 of epoch {number} in log.txt is {value}')
    return curve


def in_order(runs, flags):
    """A list of runs for each setting. Settings that share all but the method stand together, the one without a method
    first.
    """
    settings = collections.defaultdict(list)
    for one in runs:
        settings[frozenset(one.setting.items())].append(one)
    names = sorted(flags.names([one.setting for one in runs]), key=lambda name: name in flags.of_methods)

    def comparable(name, value):
        """A flag that is not given comes first, then its choices in the order of --help, numbers by size, words by the
        alphabet.
        """
        choices = flags.choices.get(name, [])
        return [(0,) if each is None else (1, choices.index(each)) if each in choices
                else (2 + isinstance(each, str), each)
                for each in (value if isinstance(value, tuple) else [value])]

    return sorted(settings.values(), key=lambda own: [comparable(name, own[0].setting.get(name)) for name in names])


def name_settings(settings, flags):
    """(the flags that all settings share, [those that tell each from the others])."""
    names = flags.names(settings)
    # Where a method is not selected its flags count as their defaults, so that they show only in the rows that have
    # others.
    differing = [name for name in names if len({setting.get(name, flags.defaults.get(name))
                                                for setting in settings}) > 1]
    alike = {name: value for setting in settings for name, value in setting.items() if name not in differing}
    shared = [name for name in names if name in ('dataset', 'arch') or alike.get(name) != flags.defaults.get(name)]
    differing.sort(key=lambda name: name not in flags.of_methods)
    return flags.typed(alike, shared), [flags.typed(setting, differing) or '(none)' for setting in settings]


def summarise(name, runs, baseline):
    """A row: column -> number, or for those in SECOND (mean, deviation or None); None where there is nothing to tell.

    baseline: the runs with the same flags but without a method, which may be `runs` themselves, or None.
    """
    chosen = runs[0].chosen  # as --val-split, which decides it, is a part of the setting
    result = spread([one.top1 for one in runs])
    return {'setting': name, 'n': len(runs),
            'last epoch': None if chosen else result,
            'chosen by validation': result if chosen else None,
            'best, chosen by test set': None if chosen else spread([one.best for one in runs]),
            'at epoch': None if chosen else statistics.fmean(one.best_epoch for one in runs),
            'difference': None if baseline in (None, runs) else difference(runs, baseline),
            'parameters (M)': statistics.fmean(one.parameters for one in runs) / 1e6,
            'seconds per epoch': statistics.fmean(one.seconds for one in runs)}


def difference(runs, baseline):
    """(difference of the means, its standard error or None if either has a single seed)."""
    (mean, deviation), (base_mean, base_deviation) = (spread([one.top1 for one in side]) for side in (runs, baseline))
    error = None
    if deviation is not None and base_deviation is not None:
        error = math.sqrt(deviation ** 2 / len(runs) + base_deviation ** 2 / len(baseline))
    return mean - base_mean, error


def print_table(rows, columns, shared, markdown):
    cells = [[as_text(row[column], column) for column in columns] for row in rows]
    if markdown:
        named = (['`' + row[0].replace('|', '\\|') + '`', *row[1:]] for row in cells)
        lines = [f'| {" | ".join(line)} |' for line in (columns, ['---'] * len(columns), *named)]
        shared = f'`{shared}`'
    else:
        widths = [max(map(len, column)) for column in zip(columns, *cells)]
        lines = ['   '.join(map(str.ljust, line, widths)).rstrip() for line in (columns, *cells)]
    print(f'all: {shared}\n', *lines, sep='\n')
    note = '; difference to the same flags without a method +- its standard error' if 'difference' in columns else ''
    print(f'\nTop-1 test accuracy in percent: mean +- standard deviation over n seeds{note}.', end='\n\n' if markdown
          else '\n')


def as_text(value, column):
    if value is None:
        return ''
    first, second = value if column in SECOND else (value, None)
    return plus_minus(first, second, COLUMNS[column])


def write_csv(rows, columns, shared):
    """With every digit; the flags that all settings share are a column of their own."""
    table = {'all': [shared] * len(rows)}
    for column in columns:
        if column in SECOND:
            firsts, seconds = zip(*(row[column] or (None, None) for row in rows))
            table |= {f'{column} mean': firsts, f'{column} {SECOND[column]}': seconds}
        else:
            table[column] = [row[column] for row in rows]
    table = {name: values for name, values in table.items() if any(value is not None for value in values)}
    csv.writer(sys.stdout, lineterminator='\n').writerows([table, *zip(*table.values())])


def plot(path, settings, names, shared):
    """Draw the mean over seeds of top-1 against the epochs that all of them have, with a band of one standard
    deviation.
    """
    from matplotlib.figure import Figure  # a second of import time that a table should not pay

    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    for index, (name, runs) in enumerate(zip(names, settings)):
        epochs = sorted(set.intersection(*(set(one.curve) for one in runs)))
        means, deviations = zip(*(spread([one.curve[epoch] for one in runs]) for epoch in epochs))
        line, = axes.plot(epochs, means, label=drawn(f'{name}, n = {len(runs)}'),
                          marker='.' if len(epochs) < 30 else None,
                          linestyle=('-', '--', ':', '-.')[index // 10 % 4])  # there are ten colours
        if len(runs) > 1:
            low, high = ([mean + sign * d for mean, d in zip(means, deviations)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    parts = sorted({'validation' if own[0].chosen else 'test' for own in settings})
    axes.set(xlabel='epoch', ylabel=f'{" or ".join(parts)} top-1 accuracy (%)')
    axes.set_title(drawn(shared), fontsize='small', wrap=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', fontsize='small')
    save_figure(figure, path)


if __name__ == '__main__':
    run_script(main)
