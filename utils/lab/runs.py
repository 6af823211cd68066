"""Finished runs of cifar.py and imagenet.py, read from their folders: what was set, what came out, and whether the
files are what the run wrote.
"""
import importlib
import math
import os
import shlex
import sys
from typing import NamedTuple

from utils import datasets, methods, output, schedule
from utils.errors import UserError, shown
from utils.files import digest, read_json
from utils.flags import with_todays_names
from utils.lab.checkpoints import SCRIPTS
from utils.logger import read_lines

ENVIRONMENT = ('commit', 'torch', 'device')


class Metric(NamedTuple):
    column: str
    meaning: str
    higher: str  # what a higher number is
    lower: str
    accuracy: bool = False  # in percent, so that there is an error too
    form: str = '.2f'


UP, DOWN = ('better', 'worse'), ('worse', 'better')
METRICS = {
    'top1': Metric('top-1', 'top-1 test accuracy in percent', *UP, accuracy=True),
    'loss': Metric('loss', 'loss: mean cross-entropy (NLL) on the test images', *DOWN, form='.4f'),
    'ece': Metric('ECE', 'ECE: expected calibration error on the test images in percent', *DOWN),
    'balanced': Metric('balanced', 'balanced: mean accuracy of the classes in percent', *UP, accuracy=True),
    'worst': Metric('worst class', 'worst class: the accuracy of the worst class in percent', *UP, accuracy=True),
    'train': Metric('train top-1', 'train top-1: accuracy on the training batches of the epoch of the result, as they '
                    'were trained on, with wrong labels or mixed images, in percent', 'higher', 'lower', accuracy=True),
}


class Unfinished(Exception):
    """Which epoch a run has reached."""


class Mixed(Exception):
    """What a run was trained with changed on the way."""


class Seeds(NamedTuple):
    """What a run draws from. Runs with the same share their images, initial weights and order of batches."""
    seed: int
    imbalance_seed: int  # 0 without --imbalance

    def __str__(self):
        drawn = f' with --imbalance-seed {self.imbalance_seed}' if self.imbalance_seed else ''
        return f'{self.seed}{drawn}'


def seeds_of(args):
    return Seeds(args.get('seed'), args.get('imbalance_seed') or 0)


class Run(NamedTuple):
    folder: str
    setting: dict  # a flag's name -> its value, of the flags that tell settings apart
    seed: Seeds
    environment: dict  # each of ENVIRONMENT -> a word
    curve: dict  # tested epoch -> top-1 on the test set, or on the validation set if `chosen`
    chosen: bool  # by validation; otherwise the result is that of the last epoch
    values: dict  # the result: each of METRICS -> its number, None in a run of before it was written
    best: float  # top-1 of the curve's best epoch
    best_epoch: int
    parameters: int
    seconds: float  # per epoch
    images: int | None  # of the test, None in a run of before they were counted


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
        self.of_methods = set.union({'method', 'method_start', 'method_ramp'}, *self.of_method.values())

    def setting(self, args):
        """The flags that decide what a run computes, from its args.json."""
        known = {name: value for name, value in with_todays_names(args).items() if name in self.defaults}
        values = {**self.defaults, **known, **with_todays_names(args.get('as given', {}))}
        if not datasets.has_images_of_any_size(values.get('dataset', 'folder')):
            values.pop('data', None)  # it says where the data set is, not which one
        elif values.get('data'):
            values['data'] = os.path.normpath(values['data'])
        made = schedule.OPTIMIZERS.get(values.get('optimizer') or args.get('optimizer'))
        brought = any(hasattr(methods.METHODS.get(name), 'optimizer') for name in values.get('method', ()))
        found = args.get('optimizer class')
        if made and found and found != made.func.__name__ and not brought:
            values['optimizer_class'] = found  # of one that was written into the script
        values |= {'optimizer_options': options} if (options := args.get('optimizer options')) else {}
        return {name: hashable(value) for name, value in methods.setting(values).items()}

    def read(self, text):
        """(the names of the flags that `text` gives, the setting that they make); ends with the script's sentence for a
        flag that it does not have.
        """
        parser = importlib.import_module(SCRIPTS[self.script]).make_parser()
        parser.prog = os.path.basename(sys.argv[0])  # whose user has given them
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f'{text} cannot be read as flags ({error})') from error
        if {'-h', '--help'} & {*words}:
            raise UserError(f'{text} asks for help, and names no row')
        args = parser.parse_args(words)
        methods.check_arguments(args, parser)  # gives --coef to the method that it means
        return args.given, self.setting({'as given': vars(args)})

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
            off = value == 0 and self.defaults.get(name) == 0  # as --mixup 0 is, without which nothing is mixed
            if value is not None and value is not False and value != () and not off:
                words.append(self.spelling.get(name, f'--{name.replace("_", "-")}'))
                values = () if value is True else value if isinstance(value, tuple) else (value,)
                words += [str(each).removesuffix('.0') if isinstance(each, float) else str(each) for each in values]
        return shlex.join(words)


def hashable(value):
    return tuple(value) if isinstance(value, list) else value


def find_runs(paths):
    """(the folders of the runs at or below `paths`, each once; a line about each path without any).

    UserError for a path that is not there, or if there is no run at all.
    """
    found, without = {}, []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'there is no folder {path}')
        below, visited = [], set()
        for folder, subfolders, files in os.walk(os.path.normpath(path), followlinks=True):
            if (real := os.path.realpath(folder)) in visited:  # a link has led back
                subfolders.clear()
                continue
            visited.add(real)
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


def read_runs(folders, flags, groups=()):
    """(finished runs, a line about each other one). A setting has one run of a seed: in each of the folders `groups`,
    and in all others together. A line too if runs of one data set there were tested on different numbers of images.
    """
    runs, others, tests = {}, [], {}
    for folder in folders:
        if script_of(folder) not in (None, flags.script):
            others.append(f'left out: {folder} (of {script_of(folder)}, and others are of {flags.script})')
            continue
        try:
            one = read_run(folder, flags)
            group = next((group for group in groups if folder.startswith(os.path.join(group, ''))), None)
            first = runs.setdefault((group, frozenset(one.setting.items()), one.seed), one)
            if first is not one:
                others.append(f'left out: {folder} (same setting and seed as {first.folder})')
                continue
            tested = tests.setdefault((group, one.setting.get('dataset')), {})
            tested.setdefault(one.images, []).append(folder)
        except Unfinished as error:
            others.append(f'unfinished: {folder} ({error})')
        except Mixed as error:
            others.append(f'mixed: {folder} ({error})')
        except (OSError, ValueError) as error:
            others.append(f'broken: {folder} ({error})')
        except (KeyError, TypeError, AttributeError, OverflowError) as error:  # a list where a number should be ...
            others.append(f'broken: {folder} (args.json or result.json is not as cifar.py writes it: {error})')
    for tested in tests.values():
        tested.pop(None, None)
        if len(tested) > 1:
            others.append('not the same test: ' + ', '.join(
                f'{names[0]}{f" and {len(names) - 1} others" * (len(names) > 1)} on {images} images'
                for images, names in sorted(tested.items(), key=lambda item: len(item[1]))))
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
        held = {name: value for name, value in args.items() if name != 'check sum'}
        check_sum('args.json', digest(held), args['check sum'])
    lines = read_lines(os.path.join(folder, 'log.txt'))
    (curve, done), setting, epochs = curve_of(lines), flags.setting(args), number(args, 'epochs', file='args.json')
    progress = f'epoch {done} of {epochs}'
    if args.get('changes'):
        raise Mixed('; '.join(args['changes']))
    if done < epochs:
        raise Unfinished(progress)
    if done not in curve:
        raise ValueError(f'top-1 of epoch {done}, the last, is nan in log.txt')
    if not os.path.exists(os.path.join(folder, 'result.json')):
        raise Unfinished(f'{progress}, but no result.json')
    result = read_dict(folder, 'result.json')
    check_result(result, lines)
    values = measured(result)
    chosen, best_epoch = result['chosen by'] == 'validation', int(number(result['best'], 'epoch'))
    values['train'] = trained(lines, best_epoch if chosen else done)
    environment = args.get('environment') or {}  # which runs of before it was written do not have
    for name, seed in seeds_of(args)._asdict().items():
        number({name: seed}, name, file='args.json')
    return Run(folder, setting, seeds_of(args),
               {key: str(environment.get(key) or 'unknown') for key in ENVIRONMENT}, curve,
               chosen, values, number(result['best'], 'top1', 100), best_epoch, int(number(result, 'parameters')),
               number(result, 'seconds per epoch'),
               int(number(result, 'test images')) if 'test images' in result else None)


def measured(result):
    """Each of METRICS that is of the test set -> its number in result.json, or None if it is not there."""
    places = {'loss': ('test loss', math.inf), 'ece': ('test calibration error', 100),
              'balanced': ('test balanced accuracy', 100)}
    values = {'top1': number(result, 'test top-1', 100)}
    for metric, (name, most) in places.items():
        values[metric] = number(result, name, most) if name in result else None
    classes = [share for share in result.get('test class accuracy', []) if share is not None]
    values['worst'] = number({'test class accuracy': min(classes)}, 'test class accuracy', 100) if classes else None
    return values


def trained(lines, epoch):
    """Top-1 in training in an epoch, from the lines of log.txt."""
    names, *rows = lines
    epochs, place = [row[names.index('Epoch')] for row in rows], names.index('Train Top-1')
    return float(rows[epochs.index(str(epoch))][place])


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
    held = output.check_sums(result, lines)
    for name in ('result.json', 'log.txt'):
        check_sum(name, held[name], result['check sums'][name])
    seconds = [float(line[-1]) for line in lines[1:] if line[-1] != 'nan']
    if (result['seconds per epoch'] != sum(seconds) / max(len(seconds), 1)
            or result.get('seconds') not in (None, sum(seconds))):
        raise ValueError('the seconds in log.txt or result.json are not what the run wrote')


def check_sum(name, held, written):
    if held != written:
        raise ValueError(f'{name} is not what the run wrote; resume it with no flags to have it written again')


def read_dict(folder, name):
    held = read_json(os.path.join(folder, name))
    if not isinstance(held, dict):
        raise ValueError(f'{name} holds no names with values')
    return held


def curve_of(lines):
    """(tested epoch -> top-1 on the test or validation set, the last epoch), from the lines of log.txt."""
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
        if math.isinf(value):
            raise ValueError(f'top-1 of epoch {number} in log.txt is {value}')
    return {number: value for number, value in curve.items() if not math.isnan(value)}, max(curve, default=0)
