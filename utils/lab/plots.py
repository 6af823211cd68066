"""What compare.py draws: curves over epochs, differences with their intervals, and a grid of conditions and methods."""
import textwrap

from matplotlib import colormaps
from matplotlib.figure import Figure

from utils.files import drawn, save_figure
from utils.lab.rows import prefix
from utils.metrics import spread


def curves(path, settings, names, shared):
    """Draw the mean over seeds of top-1 against the epochs that all of them have, with a band of one standard
    deviation.
    """
    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    for index, (name, runs) in enumerate(zip(names, settings)):
        epochs = sorted(set.intersection(*(set(one.curve) for one in runs)))
        means, deviations = zip(*(spread([one.curve[epoch] for one in runs]) for epoch in epochs))
        line, = axes.plot(epochs, means, label=wrapped(f'{name}, n = {len(runs)}', 110),
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


def differences(path, rows, args):
    """Draw each row's paired difference with its interval, one panel for each metric; filled where it is a verdict."""
    compared = [row for row in rows if row['pairs'] is not None]
    names = [wrapped(row['setting'], 60) for row in reversed(compared)]
    height = 1.5 + sum(0.3 + 0.2 * (name.count('\n') + 1) for name in names)
    figure = Figure(figsize=(4 + 4 * len(args.metrics), height), layout='constrained')
    panels = figure.subplots(1, len(args.metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, args.metrics):
        label = prefix(metric, args)
        for height, row in enumerate(reversed(compared)):
            if interval := row[f'{label}paired difference']:
                mean, low, high = interval
                filled = row[f'{label}verdict'] != 'not shown'
                axes.errorbar(mean, height, xerr=[[mean - low], [high - mean]], fmt='o', capsize=4, color='C0',
                              markerfacecolor='C0' if filled else 'white')
        axes.axvline(0, color='grey', linewidth=1)
        axes.set_yticks(range(len(compared)), names, fontsize='small')
        axes.set_xlabel(f'difference in {shown_name(args.metrics[metric], args)}')
        axes.grid(axis='x', alpha=0.3)
    save_figure(figure, path)


def wrapped(name, width):
    """A name in lines of at most `width` letters, whole, as Matplotlib draws it."""
    return '\n'.join(map(drawn, textwrap.wrap(name, width, break_on_hyphens=False))) or drawn(name)


def shown_name(metric, args):
    return f'{metric.column} error' if args.error and metric.accuracy else metric.column


def grid(path, rows, columns, args):
    """Draw the mean paired difference of each condition and method in the first metric: blue where it is shown to be
    better, or higher, red where it is worse, the darker the larger; grey where nothing is shown. The column of the
    baseline has its result.

    rows: {condition: {column: its row of `summarise`}}. columns: what stands from left to right.
    """
    name, metric = next(iter(args.metrics.items()))
    label = prefix(name, args)
    figure = Figure(figsize=(2.5 + 0.75 * len(columns), 1.6 + 0.4 * len(rows)), layout='constrained')
    axes, colours = figure.subplots(), colormaps['RdBu']
    cells = {(x, y): rows[condition][column] for y, condition in enumerate(rows) for x, column in enumerate(columns)
             if column in rows[condition] and rows[condition][column][f'{label}paired difference']}
    means = {place: cell[f'{label}paired difference'].mean for place, cell in cells.items()}
    largest = max(map(abs, means.values()), default=0) or 1
    for (x, y), cell in cells.items():
        good = {'better': 1, 'higher': 1, 'worse': -1, 'lower': -1}.get(cell[f'{label}verdict'], 0)
        strength = good * (0.3 + 0.7 * abs(means[x, y]) / largest)
        axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5],
                  color=colours(0.5 + 0.5 * strength) if good else '0.93', linewidth=0)
        axes.text(x, y, f'{means[x, y]:+{metric.form}}', ha='center', va='center', fontsize='small',
                  fontweight='bold' if good else None,
                  color='white' if abs(strength) > 0.7 else 'black' if good else '0.45')
    for y, condition in enumerate(rows):
        if base := rows[condition].get(args.baseline):
            axes.text(columns.index(args.baseline), y, f'{base[metric.column].mean:{metric.form}}', ha='center',
                      va='center', fontsize='small')
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), map(drawn, columns), rotation=40, ha='left', fontsize='small')
    axes.set_yticks(range(len(rows)), map(drawn, rows), fontsize='small')
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xlabel(drawn(f'{shown_name(metric, args)}: difference to {args.baseline}; grey: not shown'),
                    fontsize='small')
    save_figure(figure, path)
