"""Finished runs as the rows of a table: one for each setting, over its seeds, compared with a baseline."""
import collections
import shlex
import statistics as averages
from typing import NamedTuple

from utils.errors import UserError
from utils.flags import meaning
from utils.lab import statistics
from utils.lab.runs import METRICS
from utils.metrics import spread


class Spread(NamedTuple):
    """A mean over seeds with the standard deviation, None of a single seed."""
    mean: float
    std: float


def with_metrics(runs, metrics):
    """(the runs that have all of these metrics, a line about each other one, of an earlier version)."""
    lacking = {one.folder: [name for name in metrics if one.values[name] is None] for one in runs}

    def reason(names):
        of_result = [name for name in names if name in METRICS]
        columns = ' and no '.join(metrics[name].column for name in of_result or names)
        if of_result:
            return f'its result.json has no {columns}; resume it with no flags to have it written again'
        return f'no finite {columns} was measured of its result'

    return ([one for one in runs if not lacking[one.folder]],
            [f'left out: {folder} ({reason(names)})' for folder, names in lacking.items() if names])


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
    """(the flags that all settings share, [those that tell each from the others], the names of the latter)."""
    names = flags.names(settings)
    # Where a method is not selected its flags count as their defaults, so that they show only in the rows that have
    # others.
    differing = [name for name in names if len({setting.get(name, flags.defaults.get(name))
                                                for setting in settings}) > 1]
    alike = {name: value for setting in settings for name, value in setting.items() if name not in differing}
    shared = [name for name in names if name in ('dataset', 'arch') or alike.get(name) != flags.defaults.get(name)]
    differing.sort(key=lambda name: name not in flags.of_methods)
    return (flags.typed(alike, shared), [flags.typed(setting, differing) or '(none)' for setting in settings],
            differing)


def find_baselines(asked, settings, names, differing, flags):
    """For each setting the runs that it is compared with, or None: the runs of the row that `asked` names or describes,
    or where that is None the runs with the same flags but without a method. '(none)' is also the only row without a
    method, where that has other flags than their defaults.
    """
    if asked is None:
        plain = {flags.without_methods(own[0].setting): own for own in settings if own[0].setting['method'] == ()}
        found = [plain.get(flags.without_methods(own[0].setting)) for own in settings]
    elif names.count(asked) == 1:
        found = [settings[names.index(asked)]] * len(settings)
    else:
        asked, fitting = '(none)' if asked == 'none' else asked, []  # as --grid says it
        if asked.startswith(('-', '(none)')):
            given, wanted = flags.read(asked.replace('(none)', ''))
            if stray := [flags.spelling[name] for name in given if not meaning(name).result and name != 'coef']:
                raise UserError(f'--baseline names {stray[0]}, which tells no rows apart; it can be one of: '
                                f'{"; ".join(names)}')
            fitting = [own for own in settings if all(
                own[0].setting.get(name, flags.defaults.get(name)) == wanted.get(name, flags.defaults.get(name))
                for name in {*differing, *given})]
        if not fitting and asked == '(none)':
            fitting = [own for own in settings if own[0].setting['method'] == ()]
        if len(fitting) != 1:
            raise UserError(f'--baseline {shlex.quote(asked)} fits no row; it can be one of: {"; ".join(names)}')
        found = fitting * len(settings)
    return [None if baseline is own else baseline for own, baseline in zip(settings, found)]


def summarise(settings, names, baselines, args):
    """The rows, each column -> number, word, `Spread`, Interval, or None where there is nothing to tell."""
    rows = []
    for name, runs, baseline in zip(names, settings, baselines):
        by_validation = runs[0].chosen  # as --val-split, which decides it, is a part of the setting
        no_choice = by_validation or all(len(one.curve) == 1 for one in runs)
        rows.append({'setting': name, 'n': len(runs),
                     'best, chosen by test set': None if no_choice else
                     Spread(*spread([turned(METRICS['top1'], one.best, args) for one in runs])),
                     'at epoch': None if no_choice else averages.fmean(one.best_epoch for one in runs),
                     'pairs': None if baseline is None else len({one.seed for one in runs}
                                                                & {one.seed for one in baseline}),
                     'parameters (M)': averages.fmean(one.parameters for one in runs) / 1e6,
                     'seconds per epoch': averages.fmean(one.seconds for one in runs)})
        for metric in args.metrics:
            values, base = values_of(runs, metric, args), values_of(baseline or [], metric, args)
            value = Spread(*spread(list(values.values())))
            differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
            label = prefix(metric, args)
            rows[-1] |= {args.metrics[metric].column: value, 'last epoch': None if by_validation else value,
                         'chosen by validation': value if by_validation else None,
                         **{label + column: None for column in COMPARED}}
            if baseline:
                rows[-1] |= {f'{label}difference': statistics.welch([*values.values()], [*base.values()])
                             or averages.fmean(values.values()) - averages.fmean(base.values()),
                             f'{label}paired difference': statistics.paired(differences),
                             f'{label}p': statistics.sign_flip(differences)}
    for name, metric in args.metrics.items():
        words = metric.higher, metric.lower
        turns = args.error and metric.accuracy and 'better' in words  # a higher error is worse, and higher
        judge(rows, baselines, prefix(name, args), words[::-1] if turns else words)
    return rows


TOO_FEW = 'too few seeds'
COMPARED = ('difference', 'paired difference', 'p', 'p (Holm)', 'verdict')  # with the baseline, for each metric


def judge(rows, baselines, label, words):
    """Correct the p-values of all rows, and give each row that is compared its verdict. words: above 0, and below."""
    corrected = statistics.holm([row[f'{label}p'] for row in rows])
    for row, baseline, p in zip(rows, baselines, corrected):
        if baseline:
            row[f'{label}p (Holm)'] = TOO_FEW if p is None else p
            row[f'{label}verdict'] = statistics.verdict(row[f'{label}paired difference'], p, *words)


def values_of(runs, metric, args):
    """seed -> the result of the run."""
    return {one.seed: turned(args.metrics[metric], one.values[metric], args) for one in runs}


def turned(metric, value, args):
    """An accuracy, or with --error what it lacks to 100."""
    return 100 - value if args.error and metric.accuracy else value


def prefix(metric, args):
    """What stands before the names of a metric's columns, where there are several metrics."""
    return f'{args.metrics[metric].column} ' if len(args.metrics) > 1 else ''
