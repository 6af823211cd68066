"""Draw the features of checkpoints in a plane, or histograms of their angles, margins and distances.

    python visualize_features.py FILE [FILE ...]                  the features, one panel a checkpoint
    python visualize_features.py FILE [FILE ...] --histograms     angles and margins, the checkpoints in one figure

Features are what goes into the head. Two of them (cifar.py --feature-dim 2) are drawn as they are, as in figure 2 of
Large-Margin Softmax (arXiv 1612.02295), with the class weights as rays, and behind them, pale, the class that the head
predicts. More are projected to two axes: those of the largest variance (pca), or those that tell the classes apart best
(lda), which shows less overlap than there is in all dimensions. Each panel has a scale of its own. Colours repeat after
ten classes, so name some with --classes where there are more.

--histograms shows, over the images, the angle to the target's class weight; the angular margin, the angle to the
nearest other class weight minus that; the logit margin, the target's minus the best other one; and with --distances the
distance to the decision boundary at the input, in norm 2, as measure_margins.py has it to first order. The outermost
bins hold what lies beyond them.

Writes pictures (PNG, PDF) and what is drawn in them (NPZ), beside the first checkpoint or into --out; earlier ones of
the same name are replaced. The checkpoints are never changed.
"""
import json
import os

import numpy as np
import torch

from utils.errors import UserError
from utils.eval import logits_of
from utils.files import drawn, replacing, save_figure
from utils.flags import Parser
from utils.lab import checkpoints, margins
from utils.lab.view import View
from utils.script import run_script

# Petroff, arXiv 2107.02270: ten colours that people with colour vision deficiencies can tell apart.
COLORS = ['#3f90da', '#ffa90e', '#bd1f01', '#94a4a2', '#832db6', '#a96b59', '#e76300', '#b9ac70', '#717581', '#92dadd']
PALE = 0.25  # the share of the colour in a decision region, the rest is white
GRID = 400  # points of a decision region along each axis
BINS = 60
TOP_K = 9  # other classes whose boundaries count for a distance, the most probable
UNITS = {'angle to the target': 'degrees', 'angular margin': 'degrees', 'logit margin': 'logits',
         'distance at the input': 'normalised images'}


def parse_arguments():
    """(flags; the checkpoints)."""
    parser = Parser(prog='visualize_features.py', usage='python visualize_features.py FILE [FILE ...] [flags]',
                    description='Draw the features of checkpoints in a plane, or histograms of their angles, margins '
                                'and distances.')
    checkpoints.add_arguments(parser, modes=None, default_modes='test', precision='fp32')
    group = parser.add_argument_group('what is drawn')
    group.add_argument('--classes', nargs='+', metavar='NAME', help='only images of these classes (all)')
    group.add_argument('--projection', choices=('pca', 'lda'), default='pca',
                       help='of more than two features to a plane (pca)')
    group.add_argument('--histograms', action='store_true', help='of angles and margins, instead of the plane')
    group.add_argument('--distances', action='store_true', help='also of distances to the decision boundary')
    args = parser.parse_args()
    if args.distances and not args.histograms:
        parser.error('--distances is drawn by --histograms, which is not asked for')
    if args.histograms and 'projection' in args.given:
        parser.error('--projection is of the plane, which --histograms does not draw')
    return args, [checkpoints.open_checkpoint(path, args, parser) for path in checkpoints.files_of(args, parser)]


def main():
    args, subjects = parse_arguments()
    checkpoints.check_alike(subjects)
    torch.backends.cudnn.allow_tf32 = False  # as in measure_margins.py
    views = [View(subject, ['input']) for subject in subjects]
    names = checkpoints.names_of([subject.path for subject in subjects])
    chosen = chosen_classes(args, subjects[0])
    for view in views:
        check(args, view)
    if 'projection' in args.given and all(view.model.in_features == 2 for view in views):
        raise UserError('--projection is for more than 2 features, and 2 are drawn as they are')
    batches = checkpoints.images_of(subjects[0], args.mode, args)
    values = {}
    for view, name in zip(views, names):
        view.batches = batches
        shown = torch.isin(view.outputs[2], torch.tensor(chosen))
        if not shown.any():
            raise UserError(f'none of the {len(shown)} {args.mode} images is of --classes {" ".join(args.classes)}')
        values[name] = (of_images if args.histograms else plane)(args, view, shown)
        view.__dict__.pop('outputs')  # those of one checkpoint at a time
    what = 'histograms' if args.histograms else 'features'
    stem = f'{checkpoints.stem(args, subjects[0].path)}-{what}'
    if len(subjects) > 1:
        stem = os.path.join(os.path.dirname(stem), f'compare-{what}')
    settings = {'checkpoints': [checkpoints.description(subject) for subject in subjects], 'precision': args.precision,
                'images': {'mode': args.mode, **checkpoints.describe_images(batches)}, 'classes': args.classes,
                'projection': None if args.histograms else args.projection}
    os.makedirs(os.path.dirname(stem) or '.', exist_ok=True)
    save(f'{stem}.npz', settings, values)
    pictures = f'{stem}.png', f'{stem}.pdf'
    if args.histograms:
        draw_histograms(values, *pictures)
    else:
        draw_planes(values, subjects[0].state['classes'], chosen, args.projection, *pictures)
    print('numbers ', f'{stem}.npz')
    print('pictures', *pictures)


def chosen_classes(args, subject):
    """The indices of --classes. UserError for an unknown name."""
    known = subject.state['classes']
    for name in args.classes or ():
        if name not in known:
            raise UserError(f'--classes {name} is not a class of {subject.path}, which has {" ".join(known[:20])}'
                            + ' ...' * (len(known) > 20))
    return [known.index(name) for name in dict.fromkeys(args.classes or known)]


def check(args, view):
    """UserError if the network has nothing of what is asked for."""
    if args.histograms and view.model.num_classes < 2:
        raise UserError(f'{view.subject.path} knows one class, and a margin is between two')
    if args.histograms or view.model.in_features == 2:
        view.weight('the class weights that are drawn need')


# The plane

def plane(args, view, shown):
    """What is drawn of one checkpoint: {'points': (N, 2), 'targets': (N,)} and, of two features, the 'weight' of the
    head and the class 'regions' (y, x) that it predicts at 'x' and 'y'; of more features, the 'shares' of the variance.
    """
    features, _, targets = (tensor[shown] for tensor in view.outputs)
    points, targets = features.double().numpy(), targets.numpy()
    if points.shape[1] > 2:
        try:
            points, shares = project(points, targets, args.projection)
        except ValueError as error:
            raise UserError(f'{view.subject.path}: {error}') from error
        return {'points': points, 'targets': targets, 'shares': shares}
    middle, half = frame(points)
    x, y = (np.linspace(center - half, center + half, GRID) for center in middle)
    return {'points': points, 'targets': targets, 'x': x, 'y': y, 'regions': regions(view, x, y),
            'weight': view.weight('the class weights that are drawn need').double().numpy()}


def frame(points):
    """(middle (2,), half of the side) of the square around the points (N, 2) and the origin, a little larger."""
    low, high = points.min(axis=0).clip(max=0), points.max(axis=0).clip(min=0)
    return (low + high) / 2, 0.55 * ((high - low).max() or 1)


def project(points, targets, projection):
    """(points (N, 2), their shares (2,) of the variance, of lda that between classes). ValueError if there are none."""
    # Seconds of import time that a mistake in the flags should not pay.
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    classes = len(np.unique(targets))
    if np.ptp(points, axis=0).max() == 0:
        raise ValueError('the features of all images are equal, so there is no plane to project them to')
    if projection == 'lda' and not 2 < classes < len(targets):
        raise ValueError('--projection lda needs at least 3 classes, and more images than classes; there are '
                         f'{classes} and {len(targets)}')
    model = PCA(2, svd_solver='full') if projection == 'pca' else LinearDiscriminantAnalysis(n_components=2)
    found = model.fit_transform(points, targets)
    if found.shape[1] < 2:
        raise ValueError('the means of the features lie on a line, so there is no plane for --projection lda')
    return found, model.explained_variance_ratio_


@torch.no_grad()
def regions(view, x, y):
    """The class (len(y), len(x)) that the head predicts for two features."""
    grid = torch.tensor(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2), dtype=view.dtype)
    predicted = [logits_of(view.model.classify(part.to(view.subject.device))).argmax(dim=1).cpu()
                 for part in grid.split(10000)]
    return torch.cat(predicted).view(len(y), len(x)).numpy()


def draw_planes(values, classes, chosen, projection, *pictures):
    """One panel a checkpoint; a name of a class is where the median of its points is."""
    from matplotlib import colors, patheffects
    from matplotlib.figure import Figure

    columns = min(len(values), 3)
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(5 * columns, 5 * rows), layout='constrained')
    palette = np.ones((len(classes), 3))  # white where a class is not shown
    palette[chosen] = [colors.to_rgb(COLORS[index % len(COLORS)]) for index in range(len(chosen))]
    for number, (name, held) in enumerate(values.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        points, targets = held['points'], held['targets']
        if 'regions' in held:
            x, y, reach = held['x'], held['y'], np.ptp(held['x']) + np.ptp(held['y'])
            pale = 1 - PALE * (1 - palette)
            axes.imshow(pale[held['regions']], extent=(x[0], x[-1], y[0], y[-1]), origin='lower',
                        interpolation='nearest')
            for index in chosen:
                direction = held['weight'][index] / (np.linalg.norm(held['weight'][index]) or 1)
                axes.plot(*zip((0, 0), reach * direction), color=palette[index], linewidth=1.5)
            axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel='feature 1', ylabel='feature 2')
        else:
            of = 'variance' if projection == 'pca' else 'variance between classes'
            first, second = (f'{projection} {axis} ({100 * share:.0f}% of the {of})' for axis, share
                             in enumerate(held['shares'], start=1))
            axes.set(xlabel=first, ylabel=second)
            axes.set_aspect('equal', adjustable='datalim')
        axes.scatter(*points.T, s=5, c=palette[targets], linewidths=0, alpha=0.7, rasterized=True)
        for index in np.unique(targets):
            axes.annotate(drawn(classes[index]), np.median(points[targets == index], axis=0), ha='center', va='center',
                          weight='bold', path_effects=[patheffects.withStroke(linewidth=3, foreground='white')])
        axes.set_title(drawn(name), fontsize='medium')
    save_figure(figure, *pictures, dpi=150)


# Histograms

def of_images(args, view, shown):
    """{what it is: (N,)} of one checkpoint."""
    features, logits, targets = (tensor[shown] for tensor in view.outputs)
    angles = margins.angles_of_images(features, targets, view.weight('the class weights that are drawn need'))
    found = {name: angles[name] for name in ('angle to the target', 'angular margin')}
    found['logit margin'], _ = margins.margins(logits, targets)
    if args.distances:
        found['distance at the input'] = distances(view, shown)
    return {name: values.double().numpy() for name, values in found.items()}


def distances(view, shown):
    """(N,), to first order, in norm 2."""
    parts, place, top_k = [], 0, min(TOP_K, view.model.num_classes - 1)
    for inputs, targets in view.batches:
        kept = shown[place:place + len(targets)].to(targets.device)
        place += len(targets)
        if kept.any():
            found = view.first_order(inputs[kept], targets[kept], top_k, norms=('2',))
            parts.append(found['input', '2'].cpu())
    return torch.cat(parts)


def draw_histograms(values, *pictures):
    """Shares of the images in bins that all checkpoints have in common; right of the line at 0 the target is ahead."""
    from matplotlib.figure import Figure

    quantities = list(next(iter(values.values())))
    figure = Figure(figsize=(5.5 * 2, 4 * -(-len(quantities) // 2)), layout='constrained')
    for number, quantity in enumerate(quantities, start=1):
        axes = figure.add_subplot(-(-len(quantities) // 2), 2, number)
        of_all = {name: held[quantity][np.isfinite(held[quantity])] for name, held in values.items()}
        edges, width = bins(np.concatenate(list(of_all.values())), quantity == 'distance at the input')
        if width:
            axes.set_xscale('asinh', linear_width=width)
        for index, (name, finite) in enumerate(of_all.items()):
            counts, _ = np.histogram(finite.clip(edges[0], edges[-1]), edges)
            axes.stairs(100 * counts / max(len(finite), 1), edges, color=COLORS[index % len(COLORS)], linewidth=1.5,
                        linestyle=('-', '--', ':')[index // len(COLORS) % 3], label=drawn(name))
        if quantity != 'angle to the target':
            axes.axvline(0, color='black', linewidth=0.8, linestyle=':')
        axes.set(xlabel=f'{quantity} ({UNITS[quantity]})', ylabel='images (%)')
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize='small')
    save_figure(figure, *pictures, dpi=150)


def bins(values, wide):
    """(edges, None), from the 0.1% to the 99.9% quantile; of values over several magnitudes, `wide`, of equal width in
    asinh(value / width), and that width.
    """
    low, high = np.quantile(values, (0.001, 0.999)) if len(values) else (0, 0)
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    width = float(np.median(np.abs(values))) if wide and len(values) else 0
    if not width:
        return np.linspace(low, high, BINS + 1), None
    return width * np.sinh(np.linspace(*np.arcsinh((low / width, high / width)), BINS + 1)), width


def save(path, settings, values):
    """All arrays, as CHECKPOINT/NAME, and the settings as JSON, for numpy.load."""
    arrays = {f'{name}/{what}': array for name, held in values.items() for what, array in held.items()}
    with replacing(path) as temporary:
        np.savez_compressed(temporary, settings=json.dumps(settings), **arrays)


if __name__ == '__main__':
    run_script(main)
