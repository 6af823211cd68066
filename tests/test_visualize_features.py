"""Features in a plane and histograms of margins: regions, rays, projections, pictures, and what is refused."""
import json
import types

import matplotlib.figure  # noqa: F401
import numpy as np
import pytest
import torch
from helpers import Fixed, call, contents, refused, toy_runs
from PIL import Image
from torch import nn

import visualize_features as visual
from models.base import ImageClassifier
from utils.errors import UserError
from utils.lab import margins
from utils.lab.view import View

runs = toy_runs(two='-a mlp --feature-dim 2 --method lsoftmax', wide='-a mlp --method dma')


def file(runs, *names):
    return ' '.join(f'{runs}/{name}/checkpoint.pth.tar' for name in names)


def numbers(path):
    with np.load(path) as held:
        return {name: held[name] for name in held.files}


def is_picture(path):
    with Image.open(path) as picture:
        picture.load()
        return min(picture.size) > 300 and len(picture.convert('L').getcolors()) > 5


class Two(ImageClassifier):
    """Its features are the first two values of an image."""

    def __init__(self, classifier=nn.Linear):
        super().__init__()
        self.set_head(2, 3, classifier)

    def features(self, x):
        return x.flatten(1)[:, :2]


def view_of(model, number=40):
    torch.manual_seed(0)
    args = types.SimpleNamespace(precision='fp32')
    subject = types.SimpleNamespace(model=model.eval(), path='FILE', args=args, device='cpu')
    view = View(subject, ['input'])
    view.batches = Fixed([(torch.randn(number // 2, 3, 2, 2), torch.arange(number // 2) % 3) for _ in range(2)], 3)
    return view


def test_the_regions_are_the_argmax_of_the_head():
    torch.manual_seed(0)
    view = view_of(Two())
    x, y = np.linspace(-3, 2, 7), np.linspace(-1, 4, 5)
    found, weight, bias = visual.regions(view, x, y), view.model.head.weight, view.model.head.bias
    assert found.shape == (5, 7) and len(np.unique(found)) > 1
    for row, b in enumerate(y):
        for column, a in enumerate(x):
            logits = [w[0].item() * a + w[1].item() * b + c.item() for w, c in zip(weight, bias)]
            assert found[row, column] == np.argmax(logits)


def test_two_features_are_drawn_as_they_are_with_the_class_weights(monkeypatch, tmp_path):
    view, rays, scatter = view_of(Two()), [], []
    shown = view.outputs[2] != 1
    held = visual.plane(None, view, shown)
    assert np.array_equal(held['points'], view.outputs[0][shown].double().numpy())
    assert np.array_equal(held['weight'], view.model.head.weight.detach().double().numpy())
    middle, half = visual.frame(held['points'])
    assert np.all(np.abs(np.vstack([held['points'], [[0, 0]]]) - middle) < half)
    monkeypatch.setattr('matplotlib.axes.Axes.plot', lambda axes, x, y, **options: rays.append((x, y)))
    monkeypatch.setattr('matplotlib.axes.Axes.scatter', lambda axes, x, y, **options: scatter.append((x, y)))
    visual.draw_planes({'FILE': held}, ['a', '$b', '_c'], [0, 2], 'pca', tmp_path / 'a.png')
    for index, (x, y) in zip((0, 2), rays, strict=True):
        assert x[0] == y[0] == 0
        assert np.allclose(np.array((x[1], y[1])) / np.hypot(x[1], y[1]),
                           held['weight'][index] / np.linalg.norm(held['weight'][index]))
    assert np.array_equal(np.stack(scatter[0], axis=1), held['points']) and (tmp_path / 'a.png').exists()


def test_pca_is_the_singular_value_decomposition():
    points = np.random.default_rng(0).standard_normal((50, 6)) * [1, 5, 2, 3, 1, 1] + 4
    found, shares = visual.project(points, np.arange(50) % 3, 'pca')
    centred = points - points.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(found), np.abs(centred @ axes[:2].T))
    assert np.allclose(shares, values[:2] ** 2 / (values ** 2).sum())


def test_lda_finds_the_axes_that_differ_between_classes():
    random, targets = np.random.default_rng(0), np.arange(60) % 3
    points = random.standard_normal((60, 5)) * [1, 1, 50, 1, 1]
    points[:, :2] += 20 * np.array([(0, 0), (1, 0), (0, 1)])[targets]
    found, shares = visual.project(points, targets, 'lda')
    means = np.array([found[targets == c].mean(axis=0) for c in range(3)])
    spread = max(np.abs(found[targets == c] - means[c]).max() for c in range(3))
    gaps = [np.linalg.norm(means[a] - means[b]) for a in range(3) for b in range(a)]
    assert found.shape == (60, 2) and min(gaps) > 3 * spread and shares.sum() == pytest.approx(1)


@pytest.mark.parametrize('points, targets, projection, sentence', [
    (np.ones((5, 4)), np.arange(5), 'pca', 'the features of all images are equal'),
    (np.eye(4), np.arange(4) % 2, 'lda', 'needs at least 3 classes, and more images than classes; there are 2 and 4'),
    (np.eye(4), np.arange(4), 'lda', 'there are 4 and 4'),
    (np.outer(np.arange(9) % 3 + np.arange(9) / 90, [1, 0, 0]), np.arange(9) % 3, 'lda', 'lie on a line'),
])
def test_what_has_no_plane_is_refused(points, targets, projection, sentence):
    with pytest.raises(ValueError, match=sentence):
        visual.project(points.astype(float), targets, projection)


def test_bins():
    edges, width = visual.bins(np.linspace(-1, 3, 2001), wide=False)
    assert width is None and len(edges) == visual.BINS + 1 and np.allclose(np.diff(edges), np.diff(edges)[0])
    assert edges[0] == pytest.approx(-0.996) and edges[-1] == pytest.approx(2.996)
    values = np.concatenate([-np.ones(9), np.logspace(-2, 4, 100)])
    edges, width = visual.bins(values, wide=True)
    assert width == np.median(np.abs(values)) and np.allclose(np.diff(np.arcsinh(edges / width), 2), 0)
    for odd in ([], [2.0, 2.0], [0.0]):
        edges, _ = visual.bins(np.array(odd), wide=True)
        assert np.all(np.diff(edges) > 0)


def test_histograms_show_each_image_of_the_classes(monkeypatch):
    view, args = view_of(Two()), types.SimpleNamespace(distances=True)
    features, logits, targets = view.outputs
    shown = targets == 2
    found = visual.of_images(args, view, shown)
    angles = margins.angles_of_images(features[shown], targets[shown], view.model.head.weight.detach())
    assert list(found) == list(visual.UNITS) and {len(values) for values in found.values()} == {int(shown.sum())}
    assert np.array_equal(found['angular margin'], angles['angular margin'].numpy())
    right = logits[shown].argmax(dim=1).numpy() == 2
    for name in ('logit margin', 'distance at the input'):
        assert np.array_equal(found[name] > 0, right)
    images = torch.cat([inputs for inputs, _ in view.batches])[shown]
    expected = view.first_order(images, targets[shown], 2, norms=('2',))['input', '2']
    np.testing.assert_allclose(found['distance at the input'], expected.numpy(), rtol=1e-5)


# The script

def test_several_checkpoints_in_one_figure(runs, monkeypatch, capsys, tmp_path):
    before = {name: contents(runs / name) for name in ('two', 'wide')}
    call(monkeypatch, visual, f'{file(runs, *before)} --projection lda --images 50 -o {tmp_path}')
    assert {f'compare-features.{ending}' for ending in ('png', 'pdf', 'npz')} == set(contents(tmp_path))
    assert is_picture(tmp_path / 'compare-features.png') and 'compare-features.pdf' in capsys.readouterr().out
    found = numbers(tmp_path / 'compare-features.npz')
    settings = json.loads(str(found['settings']))
    assert len(settings['checkpoints']) == 2 and settings['images']['number'] == 50
    for name in before:
        assert found[f'{name}/checkpoint/points'].shape == (50, 2)
        assert (f'{name}/checkpoint/regions' in found) == (name != 'wide')
        assert contents(runs / name) == before[name]
    assert 'wide/checkpoint/shares' in found


def test_histograms_of_several_checkpoints(runs, monkeypatch, tmp_path):
    call(monkeypatch, visual, f'{file(runs, "two", "wide")} --histograms --distances --images 30 -b 7 -o {tmp_path}')
    found = numbers(tmp_path / 'compare-histograms.npz')
    names = [f'{name}/checkpoint/{what}' for name in ('two', 'wide') for what in visual.UNITS]
    assert set(found) == {'settings', *names}
    assert all(len(values) == 30 and np.isfinite(values).all() for name, values in found.items() if name != 'settings')
    assert is_picture(tmp_path / 'compare-histograms.png')


def test_only_these_classes(runs, monkeypatch, tmp_path):
    call(monkeypatch, visual, f'{file(runs, "two")} --classes 7 1 7 --mode train --no-augment -o {tmp_path}')
    found = numbers(tmp_path / 'two-checkpoint-features.npz')
    assert set(found['two/checkpoint/targets']) == {1, 7}
    assert is_picture(tmp_path / 'two-checkpoint-features.png')


@pytest.mark.parametrize('flags, sentence', [
    ('', 'a checkpoint is required: FILE'),
    ('{two} --distances', '--distances is drawn by --histograms, which is not asked for'),
    ('{two} --histograms --projection lda', '--projection is of the plane, which --histograms does not draw'),
    ('{two} --projection lda', '--projection is for more than 2 features, and 2 are drawn as they are'),
    ('{two} --projection tsne', "invalid choice: 'tsne'"),
    ('{two} --classes 3 cat', '--classes cat is not a class of '),
    ('{two} --classes 3 cat', 'which has 0 1 2 3 4 5 6 7 8 9'),
    ('{two} -o /dev/null/new', 'results cannot be written to /dev/null/new, as /dev/null is not a folder'),
])
def test_a_mistake_is_one_sentence_before_any_data_is_read(flags, sentence, runs, monkeypatch, tmp_path, capsys):
    flags = flags.format(**{name: file(runs, name) for name in ('two', 'wide')})
    assert sentence in refused(monkeypatch, capsys, tmp_path, flags, visual) and contents(tmp_path) == {}


def test_images_without_the_classes_and_heads_without_weights_are_refused(runs, monkeypatch, tmp_path):
    with pytest.raises(UserError, match='none of the 1 test images is of --classes'):
        for name in '01':
            call(monkeypatch, visual, f'{file(runs, "two")} --images 1 --classes {name} -o {tmp_path}')
    deep = Two(classifier=lambda size, classes: nn.Sequential(nn.Linear(size, 4), nn.Linear(4, classes)))
    args = types.SimpleNamespace(histograms=False)
    with pytest.raises(UserError, match='the class weights that are drawn need a head with a weight of 3 classes x 2'):
        visual.check(args, view_of(deep))
