"""Draw how loss and accuracy change around checkpoints, on the training and the test images.

    python visualize_sharpness.py FIRST SECOND               along (1 - alpha) FIRST + alpha SECOND
    python visualize_sharpness.py FILE --directions 5        along random filter-normalised directions, FILE at alpha 0
    python visualize_sharpness.py FILE --surface             over the plane of two such directions
    python visualize_sharpness.py FILE FILE ... --compare    the directions of several checkpoints in one figure

Writes a table (CSV) that grows point by point, its settings (JSON), and pictures (PNG, PDF). A scan that was broken
off goes on with the same command. The checkpoints are never changed.

The line is figure 3 of Keskar et al. (ICLR 2017, arXiv 1609.04836); --path sin runs through the same weights at the
pace of the SmoothOut code, alpha -> (1 + sin(pi alpha - pi / 2)) / 2. Directions and surface are those of Li et al.
(NeurIPS 2018, arXiv 1712.09913), section 4: normal noise, each filter of it as long as that of the network.
"""
import argparse
import decimal
import functools
import math
import os

import numpy as np
import torch

import smoothout
from utils import metrics
from utils.bar import ProgressLine
from utils.batches import seeded_generator
from utils.errors import Stopped, UserError
from utils.eval import quantities
from utils.files import drawn, save_figure
from utils.flags import FLOAT32, Parser, bounded, file_path
from utils.lab import checkpoints
from utils.lab.scan import Scan
from utils.script import run_script

AXES = {'line': ['alpha'], 'directions': ['direction', 'alpha'], 'surface': ['alpha', 'beta']}
ALPHA = {'line': '-1:0.1:2', 'directions': '-0.3:0.02:0.31', 'surface': '-1:0.1:1'}
MOST_POINTS = 1000000  # a table and a picture of more would fill the memory


def alphas(text):
    """An argparse type: START:STEP:STOP -> a list of numbers. STOP is one of them if the steps meet it."""
    try:
        start, step, stop = (decimal.Decimal(word) for word in text.split(':'))
        steps = (stop - start) / step
        if not all(value.is_finite() for value in (start, step, stop)):
            raise ValueError('not a number')
    except (ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f'must be START:STEP:STOP, such as -1:0.1:2, was given {text}') from error
    if not 0 <= steps < MOST_POINTS or max(abs(start), abs(stop)) > FLOAT32[0] or abs(step) < FLOAT32[1]:
        raise argparse.ArgumentTypeError(f'is an empty range, or one without end: steps of {step} do not lead from '
                                         f'{start} to {stop}')
    return [float(start + index * step) for index in range(int(steps) + 1)]


def parse_arguments(prog='visualize_sharpness.py', at_most=None):
    """(flags, with `kind` of scan; the checkpoints, `at_most` so many)."""
    parser = Parser(prog=prog, usage=f'python {prog} FILE {"" if at_most == 1 else "[FILE ...] "}[flags]',
                    description='Draw how loss and accuracy change around checkpoints, on the training and the test '
                                'images.')
    checkpoints.add_arguments(parser, modes='+', default_modes=['train', 'test'])
    parser.add_argument('--slave-evaluate', type=file_path, metavar='FILE', help='the same as a second FILE')
    parser.add_argument('--no-visualize-train', action='store_true', help='the same as --mode test')
    group = parser.add_argument_group('what is drawn')
    group.add_argument('--alpha', type=alphas, metavar='A:B:C', help='from A in steps of B to C: a share of the way '
                                                                     'to the second '
                       f'checkpoint ({ALPHA["line"]}), or lengths in a random direction ({ALPHA["directions"]}; '
                       '--surface '
                       f'{ALPHA["surface"]})')
    group.add_argument('--path', choices=('linear', 'sin'), default='linear', help='of two checkpoints (linear)')
    group.add_argument('--directions', type=bounded(int, 1), default=1, metavar='N',
                       help='random ones, drawn as mean and band (1)')
    group.add_argument('--surface', action='store_true', help='over the plane of two random directions')
    group.add_argument('--compare', action='store_true', help='several checkpoints, each along random directions of '
                                                              'the same seed')
    group.add_argument('--perturb-batch-norm', action='store_true',
                       help='random directions move the BatchNorm parameters too')
    group.add_argument('--update-bn', action='store_true', help='estimate BatchNorm statistics again at each point, '
                                                                'over the '
                       'training images; otherwise they are those of the checkpoint, or in between those of two')
    group.add_argument('--overwrite', action='store_true', help='replace an earlier scan')
    args = parser.parse_args()
    files = checkpoints.files_of(args, parser, at_most)
    if args.no_visualize_train and 'mode' in args.given:
        parser.error('--no-visualize-train is the same as --mode test; use one of them')
    args.mode = ['test'] if args.no_visualize_train else list(dict.fromkeys(args.mode))
    if args.compare and len(files) < 2:
        parser.error('--compare needs at least two checkpoints')
    if not args.compare and len(files) > 2:
        parser.error(f'{len(files)} checkpoints were given; one or two can be drawn, or more with --compare')
    if args.surface and len(files) > 1:
        parser.error(f'--surface is around one checkpoint, and {len(files)} were given')
    args.kind = 'surface' if args.surface else 'line' if len(files) == 2 and not args.compare else 'directions'
    for flag, kinds, what in (('path', ['line'], 'two checkpoints'),
                              ('directions', ['directions'], 'random directions around a checkpoint'),
                              ('perturb_batch_norm', ['directions', 'surface'], 'random directions')):
        if flag in args.given and args.kind not in kinds:
            parser.error(f'--{flag.replace("_", "-")} is for {what}, which are not drawn here')
    if args.surface and args.alpha and len(args.alpha) < 2:
        parser.error('--surface needs at least two values of --alpha')
    args.alpha = args.alpha or alphas(ALPHA[args.kind])
    number = len(args.alpha) * {'line': 1, 'directions': args.directions, 'surface': len(args.alpha)}[args.kind]
    if number > MOST_POINTS:
        parser.error(f'--alpha{" and --directions" * (args.directions > 1)} make {number} points, and at most '
                     f'{MOST_POINTS} can be drawn')
    subjects = [checkpoints.open_checkpoint(path, args, parser) for path in files]
    if args.update_bn and not any(smoothout.batch_norm_parameters(subject.model) for subject in subjects):
        parser.error('--update-bn is not used by networks without BatchNorm')
    return args, subjects


def main(**script):
    args, subjects = parse_arguments(**script)
    checkpoints.check_alike(subjects)
    if args.kind == 'line':
        check_line(*subjects)
    images = {part: checkpoints.images_of(subjects[0], part, args) for part in args.mode}
    if args.update_bn:
        args.training_images = images.get('train') or checkpoints.images_of(subjects[0], 'train', args)
        if len(args.training_images.labels) < 2:
            raise UserError('--update-bn needs at least two training images')
    groups = [subjects] if args.kind == 'line' else [[subject] for subject in subjects]
    names = checkpoints.names_of([subject.path for subject in subjects])
    names = [' to '.join(names)] if args.kind == 'line' else names
    tables = [scan(args, group, images, name) for group, name in zip(groups, names)]
    stem = tables[0].path.removesuffix('.csv')
    if args.compare:
        stem = os.path.join(os.path.dirname(stem), 'compare-directions' + '-update-bn' * args.update_bn)
    (draw_surface if args.surface else draw_curves)(args, dict(zip(names, tables)), f'{stem}.png', f'{stem}.pdf')
    print('tables  ', *(table.path for table in tables))
    print('pictures', f'{stem}.png', f'{stem}.pdf')


def check_line(first, second):
    """UserError unless the networks have the same parameters."""
    shapes = [{name: list(p.shape) for name, p in one.model.named_parameters()} for one in (first, second)]
    if shapes[0] != shapes[1]:
        name = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        held = [f'{one.path} ({one.state["network"]["arch"]}) '
                f'{own.get(name, "none")}' for one, own in zip((first, second), shapes)]
        raise UserError(f'there is no line between different networks, and of {name} the shapes are: '
                        f'{", ".join(held)}; '
                        '--compare draws them in one figure')


def scan(args, group, images, title):
    """Measure what is missing in the table of one checkpoint, or of the line between two; returns the table."""
    landscapes = [checkpoints.landscape(group[0], batches) for batches in images.values()]
    if args.kind == 'line':
        place = functools.partial(on_line, landscapes[0], checkpoints.landscape(group[1], landscapes[0].batches),
                                  args.path)
        kind, name = {'path': args.path}, f'to-{checkpoints.names_of([group[1].path])[0].replace("/", "-")}-{args.path}'
    else:
        place = around(landscapes[0], args)
        kind, name = {'seed': args.seed, 'perturb_batch_norm': args.perturb_batch_norm}, args.kind
    settings = {'kind': args.kind, 'checkpoints': [checkpoints.description(subject) for subject in group], **kind,
                'update_bn': args.update_bn,
                'precision': group[0].args.precision, 'images': {part: checkpoints.describe_images(batches) for part,
                                                                 batches in images.items()}}
    columns = [f'{part} {quantity}'.lower() for part in images
               for quantity in quantities(len(group[0].state['classes']))]
    if args.update_bn:
        settings['training images'] = checkpoints.describe_images(args.training_images)
    stem = f'{checkpoints.stem(args, group[0].path)}-{name}{"-update-bn" * args.update_bn}'
    table = Scan(stem, settings, AXES[args.kind] + columns, len(AXES[args.kind]), args.overwrite)
    missing = [point for point in points(args) if point not in table.rows]
    try:
        with ProgressLine(title, len(missing), unit='point') as bar:
            for point in missing:
                weights, buffers = place(*point)
                if args.update_bn:
                    buffers = landscapes[0].estimated_buffers(args.training_images, weights)
                values = [value for landscape in landscapes for value in landscape.measure(weights, buffers).values()]
                table.append(point, values)
                bar.advance(f'{columns[0]} {values[0]:.4g}')
    except Stopped as stop:
        done = sum(point in table.rows for point in points(args))
        stop.sentence = f'Stopped; {done} of {len(points(args))} points are in {table.path}. The same command goes on.'
        raise
    return table


def points(args):
    if args.kind == 'line':
        return [(alpha,) for alpha in args.alpha]
    return [(one, alpha) for one in (args.alpha if args.surface else range(args.directions)) for alpha in args.alpha]


def on_line(first, second, path, alpha):
    """(weights, buffers) on the way from one Landscape to another."""
    share = alpha if path == 'linear' else (1 + math.sin(math.pi * alpha - math.pi / 2)) / 2
    buffers = {name: torch.lerp(own, second.buffers[name], share) if own.is_floating_point() and name in second.buffers
               else own
               for name, own in first.buffers.items()}
    for name in buffers:
        if name.endswith('running_var'):
            buffers[name] = buffers[name].clamp(min=0)  # beyond the two a variance can fall below 0
    return torch.lerp(first.weights, second.weights, share), buffers


def around(landscape, args):
    """A function of a point that gives (weights, None): along one of several random directions, or on the plane of
    two.
    """
    @functools.lru_cache(maxsize=2)
    def direction(number):
        generator = seeded_generator(args.seed, number, device=landscape.weights.device)
        return landscape.noise(generator, 'normal', 'filter', args.perturb_batch_norm)

    if args.surface:
        return lambda alpha, beta: (landscape.weights + alpha * direction(0) + beta * direction(1), None)
    return lambda number, alpha: (landscape.weights + alpha * direction(number), None)


def draw_curves(args, scans, *pictures):
    """Loss, on a logarithmic scale, and accuracy over alpha; of several directions the mean and a band of one
    deviation.
    """
    from matplotlib.figure import Figure  # a second of import time that a mistake in the flags should not pay

    figure = Figure(figsize=(11, 4.5), layout='constrained')
    for axes, quantity in zip(figure.subplots(1, 2), ('loss', 'top-1')):
        for color, (label, table) in enumerate(scans.items()):
            for part, style in zip(args.mode, ('-', '--', ':')):
                curves = [column(table, args, f'{part} {quantity}', index) for index in range(args.directions)]
                means, deviations = zip(*(metrics.spread(values) for values in zip(*curves)))
                axes.plot(args.alpha, np.array(means), style, color=f'C{color}', label=drawn(f'{label} {part}'.strip()))
                if len(curves) > 1:
                    low, high = ([mean + sign * deviation for mean, deviation in zip(means, deviations)]
                                 for sign in (-1, 1))
                    if quantity == 'loss':  # on a logarithmic scale a band that reaches 0 has no end
                        low = [max(value, min(one)) for value, one in zip(low, zip(*curves))]
                    axes.fill_between(args.alpha, low, high, color=f'C{color}', alpha=0.2, linewidth=0)
        axes.set(xlabel='alpha', ylabel='loss' if quantity == 'loss' else 'top-1 accuracy (%)')
        # without a number there is no scale
        if quantity == 'loss' and any((line.get_ydata() > 0).any() for line in axes.lines):
            axes.set_yscale('log')
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize='small')
    save_figure(figure, *pictures)


def column(table, args, name, index=0):
    """One measured quantity over the alphas (of one direction), or as rows over the plane; infinite losses as NaN."""
    chosen = [point for point in points(args) if args.kind != 'directions' or point[0] == index]
    return [value if math.isfinite(value) else math.nan for value in table.column(name, chosen)]


def draw_surface(args, scans, *pictures):
    """The loss over the plane, as contours and in three dimensions, on a logarithmic scale."""
    from matplotlib.figure import Figure

    (label, table), = scans.items()
    figure, number = Figure(figsize=(11, 4.8 * len(args.mode)), layout='constrained'), len(args.alpha)
    for row, part in enumerate(args.mode):
        losses = np.array(column(table, args, f'{part} loss')).reshape(number, number).T  # beta down, alpha across
        height = np.log10(losses.clip(min=1e-10))
        flat = figure.add_subplot(len(args.mode), 2, 2 * row + 1)
        flat.plot(0, 0, 'r+')
        flat.set(xlabel='alpha', ylabel='beta', title=drawn(f'{label} {part}'), aspect='equal')
        solid = figure.add_subplot(len(args.mode), 2, 2 * row + 2, projection='3d')
        solid.set(xlabel='alpha', ylabel='beta')
        solid.locator_params(nbins=5)
        if np.nanmax(height, initial=-np.inf) > np.nanmin(height, initial=np.inf):  # otherwise there is nothing to see
            filled = flat.contourf(args.alpha, args.alpha, height, levels=30, cmap='viridis')
            flat.contour(args.alpha, args.alpha, height, levels=filled.levels[::3], colors='white', linewidths=0.5)
            figure.colorbar(filled, ax=flat, label='log10 of the loss')
            solid.plot_surface(*np.meshgrid(args.alpha, args.alpha), height, cmap='viridis', linewidth=0)
    save_figure(figure, *pictures)


if __name__ == '__main__':
    run_script(main)
