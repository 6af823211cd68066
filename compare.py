"""Compare runs of cifar.py, or of imagenet.py: one row per setting, over all of its seeds.

    python compare.py checkpoints/*
    python compare.py checkpoints --metric top1 loss ece --markdown     # every run below checkpoints/
    python compare.py checkpoints --measured "angular margin"           # once measure_margins.py has measured each run
    python compare.py checkpoints --baseline '--method amp' --plot curves.png
    python compare.py results/search/*/table --grid                     # a row for each DIR, a column for each method
"""
import collections
import csv
import os
import sys

from utils.errors import UserError, shown
from utils.files import open_text
from utils.flags import Parser, file_path
from utils.lab import statistics
from utils.lab.measured import STATISTICS, add_measured, of_measured
from utils.lab.rows import (TOO_FEW, Spread, find_baselines, in_order, name_settings, prefix, summarise,
                            with_metrics)
from utils.lab.runs import ENVIRONMENT, METRICS, Flags, find_runs, read_runs, script_of
from utils.metrics import plus_minus
from utils.script import run_script


def parse_arguments():
    parser = Parser(prog='compare.py', usage='python compare.py checkpoints/* [flags]',
                    description='One row per setting, over all of its seeds, from the folders that cifar.py and '
                                'imagenet.py write.')
    parser.add_argument('folders', nargs='*', type=file_path, metavar='DIR',
                        help='runs, or folders with runs somewhere below them')
    parser.add_argument('--metric', nargs='+', choices=METRICS, metavar='NAME',
                        help=f'one or several of {", ".join(METRICS)} (top1; none with --measured)')
    parser.add_argument('--measured', nargs='+', default=[], metavar='NAME',
                        help='numbers that measure_margins.py or measure_sharpness.py has left in the folders of the '
                             'runs, such as "angular margin" or "ball"')
    parser.add_argument('--statistic', choices=STATISTICS, default='mean',
                        help='over the images, of what --measured has for each image (mean)')
    parser.add_argument('--error', action='store_true', help='100 minus each accuracy')
    parser.add_argument('--grid', action='store_true',
                        help='a row for each DIR, such as a condition, named by DIR/condition.txt if that is there, '
                             'and a column for each folder in it, such as a method, in a table for each metric; '
                             'p-values are corrected within a row')
    parser.add_argument('--baseline', metavar='FLAGS',
                        help='compare with this row, such as "(none)" (each row with its own flags without a method); '
                             'with --grid a column (none)')
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--markdown', action='store_true', help='print a Markdown table')
    group.add_argument('--csv', action='store_true', help='print CSV with every digit; what is said below it goes to '
                                                          'stderr')
    parser.add_argument('--plot', type=file_path, metavar='FILE',
                        help='draw into a .png or .pdf: top-1 accuracy over epochs, of runs that were tested once the '
                             'differences with their intervals, or with --grid that of the first metric, in colours')
    args = parser.parse_args()
    if not args.folders:
        parser.error('name the folders of the runs to compare, such as checkpoints/*')
    if 'statistic' in args.given and not args.measured:
        parser.error('--statistic is of --measured, which is not given')
    names = dict.fromkeys([*(args.metric or ['top1'] * (not args.measured)), *args.measured])
    args.metrics = {name: METRICS[name] if name in METRICS else of_measured(name, args.statistic) for name in names}
    if args.error and not any(metric.accuracy for metric in args.metrics.values()):
        parser.error(f'--error turns accuracies around, and --metric {" ".join(names)} names none')
    if args.grid and args.csv:
        parser.error('--grid has a result and a difference in each cell, which --csv does not write')
    if args.grid and args.baseline is None:
        args.baseline = 'none'
    if args.plot and not args.plot.lower().endswith(('.png', '.pdf')):
        parser.error(f'--plot must end in .png or .pdf, was given {args.plot}')
    if args.plot and not os.path.isdir(os.path.dirname(args.plot) or '.'):
        parser.error(f'--plot {args.plot} is in a folder that is not there; make it first')
    return args


def main():
    args = parse_arguments()
    folders, without = find_runs(args.folders)
    flags = Flags(next(filter(None, map(script_of, folders)), 'cifar.py'))
    runs, others = read_runs(folders, flags, list(map(os.path.normpath, args.folders)) if args.grid else ())
    if args.measured:
        others += add_measured(runs, args.measured, args.statistic)
    runs, lacking = with_metrics(runs, args.metrics)
    others += lacking + without
    notes, between = sys.stderr if args.csv else sys.stdout, '\n\n' if args.markdown else '\n'
    if not runs:
        print(*others, sep='\n', file=notes, flush=True)
        raise UserError(f'none of the {len(folders)} runs can be compared')
    if args.grid:
        rows = rows_of_grid(args, runs, flags, others)
        for metric in args.metrics:
            print(*in_columns(list(cells_of_grid(args, rows, metric)), args.markdown), sep='\n', end='\n\n')
            print(told_of_metrics(args, runs, [metric]), end=between)
        print(*explained_grid(args, rows), sep=between, end=between)
        if args.plot:
            from utils.lab import plots  # a second of import time that a table should not pay

            plots.grid(args.plot, rows, columns_of_grid(args, rows), args)
    else:
        compare(args, runs, flags, between)
    used = (', '.join(sorted({word for one in runs for word in one.environment[key].split(', ')}))
            for key in ENVIRONMENT)  # evaluate.py --as-run joins two with a comma
    print('Commit {}; PyTorch {}; device {}.'.format(*used), *others, sep=between, file=notes)


def compare(args, runs, flags, between):
    """Print, and with --plot draw, a row for each setting."""
    settings = in_order(runs, flags)
    shared, names, differing = name_settings([own[0].setting for own in settings], flags)
    baselines = find_baselines(args.baseline, settings, names, differing, flags)
    rows = summarise(settings, names, baselines, args)
    columns = {name: form for name, form in columns_of(args).items() if any(row[name] is not None for row in rows)}
    if all(row['pairs'] in (None, row['n']) for row in rows):
        columns.pop('pairs', None)
    if args.csv:
        write_csv(rows, columns, shared)
    else:
        print_table(rows, columns, shared, args.markdown)
        print(*explained(args, runs, rows), sep=between, end=between)
    if args.plot:
        from utils.lab import plots  # as above

        compared = any(row[f'{prefix(metric, args)}paired difference'] for row in rows for metric in args.metrics)
        if compared and all(len(one.curve) == 1 for one in runs):
            plots.differences(args.plot, rows, args)
        else:
            plots.curves(args.plot, settings, names, shared)


def rows_of_grid(args, runs, flags, others):
    """A name for each folder of the command line that has runs -> {the name of a folder in it: its row of `summarise`}.

    others: lines about what is left out, to which this adds.
    """
    rows = {}
    for folder in dict.fromkeys(map(os.path.normpath, args.folders)):
        settings = in_order([one for one in runs if one.folder.startswith(os.path.join(folder, ''))], flags)
        if not settings:
            others.append(shown(f'left out: {folder} (it is a run, its runs are not finished, or another folder has '
                                'the same)'))
            continue
        places = [{os.path.relpath(one.folder, folder).split(os.sep)[0] for one in own} for own in settings]
        columns = [min(names) for names in places]
        if repeated := [name for name, times in collections.Counter(columns).items() if times > 1]:
            raise UserError(f'{os.path.join(folder, repeated[0])} holds runs with different flags, and --grid has one '
                            'cell for them; compare.py without --grid shows them')
        if several := [sorted(names) for names in places if len(names) > 1]:
            raise UserError(f'{several[0][0]} and {several[0][1]} in {folder} hold runs with the same flags; --grid '
                            'needs folders that hold one folder for each method, and in it one run for each seed')
        plain = dict(zip(columns, settings)).get(args.baseline)
        baselines = [None if own is plain else plain for own in settings]
        rows[folder] = dict(zip(columns, summarise(settings, columns, baselines, args)))
    if not any(args.baseline in row for row in rows.values()):
        known = ' '.join(dict.fromkeys(column for row in rows.values() for column in row))
        raise UserError(f'no folder has a folder {args.baseline} to compare with; --baseline can be one of: {known}'
                        if known else 'no folder has a folder for each method, as --grid needs')
    return dict(zip(names_of_rows(list(rows)), rows.values()))


def cells_of_grid(args, rows, metric):
    """Lines of words, the header first: a condition, its numbers of seeds, its cells."""
    columns = columns_of_grid(args, rows)
    yield ['condition', 'n', *columns]
    for label, row in rows.items():
        seeds = {min(cell['n'] for cell in row.values()), max(cell['n'] for cell in row.values())}
        yield [label, '-'.join(map(str, sorted(seeds))),
               *(as_cell(row[name], args, metric) if name in row else '' for name in columns)]


def columns_of_grid(args, rows):
    return list(dict.fromkeys([args.baseline, *(column for row in rows.values() for column in row)]))


def explained_grid(args, rows):
    """What the cells are, in sentences."""
    words = dict.fromkeys(word for metric in args.metrics.values() for word in (metric.higher, metric.lower))
    yield (f'A cell: verdict, mean difference to `{args.baseline}` over the seeds that both have, with its 95% BCa '
           f'bootstrap interval; after the semicolon the result. {" or ".join(words).capitalize()}: the interval '
           'excludes 0, and p is at most 0.05, two-sided, among all changes of the signs of these differences (drawn '
           'ones above 16 pairs), corrected for the cells of the row (Holm).')
    for label, row in rows.items():
        pairs = [cell['pairs'] for cell in row.values() if cell['pairs'] is not None]
        if args.baseline not in row:
            yield f'{label}: has no `{args.baseline}`, so nothing is compared.'
        elif needed := statistics.needed(pairs):
            yield (f'{label}: {max(pairs)} shared seed{"s" * (max(pairs) > 1)} cannot show anything in {len(pairs)} '
                   f'comparison{"s" * (len(pairs) > 1)}, however large the difference; it takes {needed}.')


def names_of_rows(folders):
    """The first line of condition.txt in each folder, or what its path differs in; UserError if two have the same."""
    names = without_shared_parts(folders)
    for index, folder in enumerate(folders):
        path = os.path.join(folder, 'condition.txt')
        if os.path.lexists(path):
            with open_text(path) as file:
                names[index] = shown(file.readline().strip()) or names[index]
    for index, name in enumerate(names):
        if (first := names.index(name)) < index:
            raise UserError(f'{folders[first]} and {folders[index]} both have the name {name}, by their condition.txt; '
                            'each row of --grid needs a name of its own')
    return names


def without_shared_parts(paths):
    """The paths without the folders with which all of them begin or end."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    while len(paths) > 1 and min(map(len, parts)) > 1:
        end = next((end for end in (0, -1) if len({each[end] for each in parts}) == 1), None)
        if end is None:
            break
        for each in parts:
            each.pop(end)
    return [shown(os.sep.join(each)) for each in parts]


def as_cell(row, args, name):
    """A result, and behind it the paired difference with its verdict, in bold if it is one of the two that show."""
    metric, label = args.metrics[name], prefix(name, args)
    value, difference, verdict = as_text(row[metric.column], metric.form), *(
        row[label + column] for column in ('paired difference', 'verdict'))
    if verdict is None:
        return value
    if difference is None:
        return f'{TOO_FEW}; {value}'
    word = f'**{verdict}**' if args.markdown and verdict in (metric.higher, metric.lower) else verdict
    return f'{word} {as_text(difference, f"+{metric.form}")}; {value}'


def in_columns(lines, markdown):
    """Lines of cells as text: a Markdown table, or columns of one width, the first line being the header."""
    if markdown:
        lines = [[cell.replace('|', '\\|') for cell in line] for line in lines]
        return [f'| {" | ".join(line)} |' for line in (lines[0], ['---'] * len(lines[0]), *lines[1:])]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ['   '.join(map(str.ljust, line, widths)).rstrip() for line in lines]


def columns_of(args):
    """Each column that a table can have -> the format of its numbers."""
    columns = {'setting': '', 'n': 'd'}
    for metric in args.metrics:
        form, label = args.metrics[metric].form, prefix(metric, args)
        if list(args.metrics) == ['top1']:
            columns |= dict.fromkeys(['last epoch', 'chosen by validation', 'best, chosen by test set'], form)
            columns['at epoch'] = '.1f'
        else:
            columns[args.metrics[metric].column] = form
        columns |= {f'{label}difference': f'+{form}', f'{label}paired difference': f'+{form}',
                    f'{label}p': '.2g' if args.csv else None, f'{label}p (Holm)': '.2g', f'{label}verdict': ''}
    columns |= {'pairs': 'd', 'parameters (M)': '.2f', 'seconds per epoch': '.1f'}
    return {name: form for name, form in columns.items() if form is not None}


def print_table(rows, columns, shared, markdown):
    cells = [[as_text(row[column], form) for column, form in columns.items()] for row in rows]
    if markdown:
        cells = [[f'`{row[0]}`', *row[1:]] for row in cells]
        shared = f'`{shared}`'
    print(f'all: {shared}\n', *in_columns([list(columns), *cells], markdown), sep='\n', end='\n\n')


def as_text(value, form):
    if value is None or isinstance(value, str):
        return value or ''
    if isinstance(value, Spread):
        return plus_minus(*value, form)
    if isinstance(value, statistics.Interval):
        return '{:{form}} [{:{form}}, {:{form}}]'.format(*value, form=form)
    return f'{value:{form}}'


def explained(args, runs, rows):
    """What the columns are, in sentences."""
    yield told_of_metrics(args, runs, args.metrics)
    compared = [row['pairs'] for row in rows if row['pairs'] is not None]
    if not compared:
        return
    other = f'`{args.baseline}`' if args.baseline is not None else 'the same flags without a method'
    yield (f'Difference: to {other}, with Welch\'s 95% interval; paired difference: the mean over the seeds that both '
           'have, with a 95% BCa bootstrap interval; p: two-sided, among all changes of the signs of these '
           'differences (drawn ones above 16 pairs), corrected for the rows of the table (Holm); verdict: where the '
           'second interval excludes 0 and p is at most 0.05.')
    if needed := statistics.needed(compared):
        yield (f'With {max(compared)} seeds that both have, nothing can be shown for {len(compared)} '
               f'row{"s" * (len(compared) > 1)}, however large the difference; it takes {needed} seeds.')


def told_of_metrics(args, runs, names):
    """What the numbers of these metrics are, and of which epochs, in a sentence."""
    told = '; '.join(metric.meaning.replace('accuracy', 'error') if args.error and metric.accuracy else metric.meaning
                     for metric in map(args.metrics.get, names))
    epochs = {'of the epoch chosen by validation' if one.chosen else 'of the last epoch' for one in runs}
    return (f'{told[0].upper()}{told[1:]}; {" or ".join(sorted(epochs, reverse=True))}: mean +- standard deviation '
            'over n seeds.')


def write_csv(rows, columns, shared):
    """With every digit; the flags that all settings share are a column of their own."""
    table = {'all': [shared] * len(rows)}
    for column in columns:
        cells = [None if row[column] == TOO_FEW else row[column] for row in rows]  # a column of numbers alone
        parts = (statistics.Interval._fields if column.endswith('difference') else
                 Spread._fields if any(isinstance(cell, Spread) for cell in cells) else [''])
        for index, part in enumerate(parts):
            values = [cell[index] if isinstance(cell, tuple) else cell if index == 0 else None for cell in cells]
            table[f'{column} {part}'.removesuffix(' ')] = values
    table = {name: values for name, values in table.items() if any(value is not None for value in values)}
    csv.writer(sys.stdout, lineterminator='\n').writerows([table, *zip(*table.values())])


if __name__ == '__main__':
    run_script(main)
