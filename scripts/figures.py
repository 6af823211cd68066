"""Draw the small figures of README's methods, docs/figures/METHOD.png, from the measurements in results/figures/.

    python scripts/figures.py [FOLDER]           # into docs/figures, or another folder that is there

scripts/figures.sh trains and measures what they show. The background is transparent and the text grey, so that they
can be seen on a light page and on a dark one.
"""
import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from utils.files import save_figure  # noqa: E402
from visualize_features import COLORS  # noqa: E402

KEPT = ROOT / 'results/figures'
GREY, PLAIN, METHOD = '#808080', '#e76300', '#3f90da'
SIZE = (3.2, 2.4)  # inches


def entries(path, measure):
    return [entry for entry in json.loads(path.read_text(encoding='utf-8')) if entry['measure'] == measure]


def axes_of(figure, *place):
    """A panel in grey, without a frame above and on the right."""
    axes = figure.add_subplot(*place)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.xaxis.label.set(color=GREY, size=9)
    axes.yaxis.label.set(color=GREY, size=9)
    axes.spines[:].set_color(GREY)
    axes.spines[['top', 'right']].set_visible(False)
    return axes


def legend(axes):
    axes.legend(fontsize=8, labelcolor=GREY, frameon=False)


def curves(figure, of, method, **labels):
    """Two lines: `of`, run -> [(x, y)], of the plain network and of a method."""
    axes = axes_of(figure)
    for name, color, label in (('none', PLAIN, 'plain'), (method, METHOD, method)):
        axes.plot(*zip(*sorted(of(name))), marker='.', color=color, label=label)
    axes.set(**labels)
    legend(axes)


def dma(figure):
    """The mean angle to the nearest class weight after each epoch."""
    def angles(run):
        for path in (KEPT / run).glob('epoch*-margins.json'):
            entry, = entries(path, 'angles')
            yield (entry['settings']['checkpoint']['epoch'],
                   entry['result']['angle to the nearest class weight']['mean'])

    curves(figure, angles, 'dma', xlabel='epoch', ylabel='angle to nearest weight (°)')


def lsoftmax(figure):
    """Two-dimensional features of networks with the margins 1 to 4, each class a colour."""
    held = np.load(KEPT / 'compare-features.npz')
    names = sorted({name.rpartition('/')[0] for name in held.files if name != 'settings'})
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(2, 2, number)
        points, targets = held[f'{name}/points'], held[f'{name}/targets']
        axes.scatter(*points.T, s=1.5, linewidths=0, c=np.array(COLORS)[targets % len(COLORS)])
        axes.set_title(f'm = {number}', color=GREY, size=9, pad=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(GREY)


def sharpness(run, measure, setting):
    for entry in entries(KEPT / run / 'checkpoint-sharpness.json', measure):
        yield entry['settings'][setting], entry['result']['rise']


def amp(figure):
    """The highest loss that was found around the weights, against the radius."""
    curves(figure, lambda run: sharpness(run, 'ball', 'ball_epsilon'), 'amp', xlabel='radius of the ball',
           ylabel='highest rise of the loss')


def smoothout(figure):
    """The mean loss under noise on the weights, against its size."""
    curves(figure, lambda run: sharpness(run, 'noise', 'ss'), 'smoothout', xlabel='size of the noise',
           ylabel='mean rise of the loss')


def large_margin(figure):
    """Histograms of the first-order distance to the decision boundary at the input; the outermost bins hold the rest.
    """
    held, axes = np.load(KEPT / 'compare-histograms.npz'), axes_of(figure)
    of = {run: held[f'{run}/checkpoint/distance at the input'] for run in ('none', 'large_margin')}
    edges = np.geomspace(0.1, 1e5, 25)
    for run, color, label in (('none', PLAIN, 'plain'), ('large_margin', METHOD, 'large_margin')):
        counts, _ = np.histogram(of[run].clip(edges[0], edges[-1]), edges)
        axes.stairs(100 * counts / len(of[run]), edges, color=color, linewidth=1.5, label=label)
    axes.set(xscale='log', xlabel='estimated distance to boundary', ylabel='images (%)')
    legend(axes)


FIGURES = (dma, lsoftmax, amp, smoothout, large_margin)


def main():
    from matplotlib.figure import Figure

    folder = pathlib.Path(*sys.argv[1:2] or [ROOT / 'docs/figures'])
    for draw in FIGURES:
        figure = Figure(figsize=SIZE, layout='constrained')
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        save_figure(figure, str(folder / f'{draw.__name__}.png'), dpi=150)


if __name__ == '__main__':
    main()
