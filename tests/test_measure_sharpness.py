"""The measures of sharpness: against closed forms, the dense Hessian and recorded values; then the script."""
import json
import math
import shutil
import signal

import numpy as np
import pytest
import scipy.optimize
import torch
from helpers import call, contents, refused, sharpness_golden, toy_runs
from hypothesis import given, settings
from hypothesis import strategies as st

import measure_margins
import measure_sharpness as sharp
from utils.batches import seeded_generator
from utils.errors import Stopped, UserError
from utils.lab import checkpoints

GOLDEN, landscape_of = sharpness_golden()
runs = toy_runs(plain='-a resnet --depth 8', method='-a resnet --depth 8 --method dma amp',
                half='-a resnet --depth 8 --train-fraction 0.5',
                other_half='-a resnet --depth 8 --train-fraction 0.5 --manualSeed 3')


class Quadratic:
    """c + b.w + w.Aw / 2 as a Landscape; `sizes` are those of its parameter tensors."""

    def __init__(self, w, b, A, c=0.5, sizes=None):
        self.weights, self.b, self.A, self.c = (torch.as_tensor(np.asarray(value, dtype=np.float64)) for value
                                                in (w, b, A, c))
        self.sizes = sizes or [len(self.weights)]

    def at(self, w):
        return self.c + self.b @ w + w @ self.A @ w / 2

    def measure(self, weights=None):
        return {'Loss': self.at(self.weights if weights is None else weights).item()}

    def loss_and_gradient(self, w):
        return self.at(w), self.b + self.A @ w

    def hessian_product(self, v):
        return self.A @ v

    def tensors(self, vector):
        return dict(enumerate(vector.split(self.sizes)))

    def noise(self, generator, noise, adapt, batch_norm):
        return torch.rand(len(self.weights), generator=generator, dtype=torch.float64) * 2 - 1


# Keskar's sharpness

@pytest.mark.parametrize('name', ['master', 'slave'])
@pytest.mark.parametrize('epsilon', [0.0005, 0.001])
@pytest.mark.parametrize('space', ['full', 'manifold5'])
def test_golden_box(name, epsilon, space):
    golden = {key: GOLDEN[f'{name}/eps{epsilon}/{space}/{key}'] for key
              in ('fixed/sharpness', 'fixed/f_max', 'asis/sharpness')}
    found = sharp.box_sharpness(landscape_of(name), epsilon, 10, torch.tensor(GOLDEN['manifold/A_plus_raw'])
                                if space != 'full' else None)
    assert found['sharpness'] == pytest.approx(float(golden['fixed/sharpness']), abs=1e-9)
    assert found['worst loss'] == pytest.approx(float(golden['fixed/f_max']), abs=1e-12)
    assert abs(golden['asis/sharpness']) < 1e-12 < 1e-4 < found['sharpness']  # the original's search found nothing
    if space == 'full':
        first_order, corner = (float(GOLDEN[f'{name}/eps{epsilon}/full/{key}']) for key
                               in ('first_order', 'corner_sharpness'))
        assert first_order < found['sharpness'] <= corner + 1e-12


def box_by_loop(quadratic, epsilon):
    """For a diagonal Hessian: in every coordinate the better end of its interval."""
    rise = 0.0
    for w, b, a in zip(quadratic.weights.tolist(), quadratic.b.tolist(), quadratic.A.diagonal().tolist()):
        reach = epsilon * (abs(w) + 1)
        rise += max(b * z + a * (2 * w * z + z * z) / 2 for z in (-reach, reach))
    before = quadratic.at(quadratic.weights).item()
    return 100 * rise / (1 + before)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10 ** 6), size=st.integers(1, 8), epsilon=st.sampled_from([1e-4, 1e-3, 0.1]),
       scale=st.sampled_from([1e-7, 1.0, 100.0]))
def test_box_of_a_quadratic_in_closed_form(seed, size, epsilon, scale):
    random = np.random.default_rng(seed)
    w = random.standard_normal(size)
    a = scale * random.uniform(0.1, 2, size)
    b = -a * w + scale * random.choice([-1, 1], size) * random.uniform(0.5, 2, size)  # no slope of zero
    quadratic = Quadratic(w, b, np.diag(a), c=scale + abs(b @ w) + a @ w ** 2)
    found = sharp.box_sharpness(quadratic, epsilon)
    assert found['sharpness'] > 0 and found['sharpness'] == pytest.approx(box_by_loop(quadratic, epsilon), rel=1e-6)


def test_the_widely_copied_sign_error_finds_nothing_on_the_same_quadratic():
    """(-L, +dL), as the original hands it to SciPy: the search walks downhill, sees L fall, and gives up."""
    quadratic = Quadratic([1.0, -2.0], [3.0, 2.0], np.diag([2.0, 0.5]), c=5)
    w, reach = quadratic.weights.numpy(), 1e-3 * (quadratic.weights.abs().numpy() + 1)

    def wrong(y):
        loss, gradient = quadratic.loss_and_gradient(torch.tensor(y))
        return -loss.item(), gradient.numpy()

    best = -scipy.optimize.fmin_l_bfgs_b(wrong, w, bounds=list(zip(w - reach, w + reach)), maxiter=10)[1]
    before, right = quadratic.at(quadratic.weights).item(), sharp.box_sharpness(quadratic)
    assert best <= before + 1e-12 and right['worst loss'] > before + 1e-3
    assert right['sharpness'] == pytest.approx(box_by_loop(quadratic, 1e-3), rel=1e-9)


@pytest.mark.parametrize('size', [5, 200])
def test_corners_find_what_ten_iterations_of_the_search_do_not(size):
    random = np.random.default_rng(0)
    w, a = random.standard_normal(size), random.uniform(0.1, 2, size)
    quadratic = Quadratic(w, -a * w + random.choice([-1, 1], size) * random.uniform(0.5, 2, size), np.diag(a), c=300)
    found, expected = sharp.box(quadratic, 0, 0.01, 10, None, 1), box_by_loop(quadratic, 0.01)
    assert found['corners']['sharpness'] == pytest.approx(expected,
                                                          rel=1e-9) and len(found['corners']['each step']) == 10
    assert found['sharpness'] <= expected * (1 + 1e-9) and (found['sharpness'] > 0.999 * expected or size == 200)


def test_a_maximum_is_at_least_the_rise_of_not_moving():
    inside = Quadratic([1.0, 2.0], [0.0, 0.0], -np.eye(2))  # w at a slope of a maximum at 0: every step overshoots
    found = sharp.ball(inside, 0, 50.0, 3)
    assert max(found['each step']) < 0 == found['rise'] and math.isnan(sharp.highest([1.0, math.nan]))


@pytest.mark.parametrize('slope', [1e-23, 1e-40])
def test_small_slopes_do_not_leave_the_ball(slope):
    landscape = landscape_of('slave')
    landscape.weights = landscape.weights.float()
    points = []
    landscape.loss_and_gradient = lambda w: (None, torch.full_like(w, slope))
    landscape.measure = lambda w=None: points.append(w) or {'Loss': 1.0}
    sharp.ball(landscape, 0, 0.5, 1)
    for piece in landscape.tensors(points[1] - landscape.weights).values():
        assert piece.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_what_cannot_be_measured_is_one_sentence():
    with pytest.raises(UserError, match='--manifolds must be at most the number of parameters, 51, was given 60'):
        sharp.box(landscape_of('slave'), 0, 1e-3, 10, 60, 1)
    with pytest.raises(UserError, match='the eigenvalues were not found after .* try a larger --eigenvalue-tolerance'):
        sharp.eigenvalues(Quadratic(np.zeros(30), np.zeros(30), np.full((30, 30), math.nan)), 0, 1, 1e-3)


def test_a_manifold_of_one_dimension_in_closed_form():
    quadratic = Quadratic([1.0, -2.0, 0.5], [3.0, 1.0, -1.0], np.diag([2.0, 0.5, 1.0]))
    row = np.array([3.0, 0.0, 4.0])
    a = row / 5  # A^+ is a^T, so A = a, and y is what is along it
    reach = 0.01 * (abs(a @ quadratic.weights.numpy()) + 1)
    slope, curvature = a @ (quadratic.b + quadratic.A @ quadratic.weights).numpy(), a @ quadratic.A.numpy() @ a
    rise = max(slope * y + curvature * y * y / 2 for y in (-reach, reach))
    found = sharp.box_sharpness(quadratic, 0.01, manifold=torch.tensor(row)[None])
    assert found['sharpness'] == pytest.approx(100 * rise / (1 + quadratic.at(quadratic.weights).item()), rel=1e-9)


def test_manifolds_are_drawn_anew_and_their_spread_is_reported():
    found = sharp.box(landscape_of('slave'), 7, 1e-3, 10, 5, 4)
    each = [one['sharpness'] for one in found['each']]
    assert len(set(each)) == 4 and found['sharpness'] == pytest.approx(np.mean(each))
    assert found['deviation'] == pytest.approx(np.std(each, ddof=1))
    assert sharp.box(landscape_of('slave'), 7, 1e-3, 10, 5, 4) == found != sharp.box(landscape_of('slave'), 8, 1e-3, 10,
                                                                                     5, 4)
    assert sharp.box(landscape_of('slave'), 7, 1e-3, 10, 5, 1)['deviation'] is None


# AMP's ball and SmoothOut's noise

def test_the_ball_of_a_linear_loss_in_closed_form():
    b = np.array([3.0, 4.0, 0.0, 0.0, 12.0, 5.0])
    linear = Quadratic(np.ones(6), b, np.zeros((6, 6)), sizes=[2, 2, 2])
    found = sharp.ball(linear, 0, 0.3, 1)
    assert found['rise'] == pytest.approx(0.3 * (5 + 0 + 13), rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_the_ball_around_a_minimum_is_the_largest_curvature_of_each_tensor(seed, sizes):
    random, blocks = np.random.default_rng(seed), []
    for size in sizes:
        basis = np.linalg.qr(random.standard_normal((size, size)))[0]
        blocks.append(basis @ np.diag([2.0] + [0.3] * (size - 1)) @ basis.T)
    A = torch.block_diag(*(torch.tensor(block) for block in blocks)).numpy()
    w = random.standard_normal(sum(sizes))
    found = sharp.ball(Quadratic(w, -A @ w, A, c=9.0, sizes=sizes), seed, 0.2, 10)
    assert found['rise'] == pytest.approx(len(sizes) * 2.0 * 0.2 ** 2 / 2, rel=1e-3)


def test_every_tensor_is_at_its_radius_and_the_best_step_counts():
    landscape = landscape_of('slave')
    found = sharp.ball(landscape, 0, 0.1, 6)
    assert len(found['each step']) == 6 and found['rise'] == max(found['each step'])
    gradient = landscape.tensors(landscape.loss_and_gradient(landscape.weights)[1])
    linear = 0.1 * sum(piece.norm().item() for piece in gradient.values())
    assert 0.5 * linear < found['each step'][0] and found['rise'] >= found['each step'][0]


def test_noise_by_loop():
    quadratic = Quadratic([1.0, -2.0, 0.5], [3.0, 1.0, -1.0], np.diag([2.0, 0.5, 1.0]))
    found, generator = sharp.noise(quadratic, 5, 0.1, 'uniform', 'none', False, 6), seeded_generator(5)
    rises = [(quadratic.at(quadratic.weights + 0.1 * quadratic.noise(generator, None, None,
                                                                     None)) - quadratic.at(quadratic.weights)).item()
             for _ in range(6)]
    assert found['rise'] == pytest.approx(np.mean(rises)) and found['deviation'] == pytest.approx(np.std(rises, ddof=1))
    assert sharp.noise(quadratic, 5, 0.1, 'uniform', 'none', False, 1)['deviation'] is None
    nothing = sharp.noise(landscape_of('slave'), 0, 0.0, 'normal', 'filter', False, 3)
    assert nothing == {'rise': 0, 'deviation': 0}


# The Hessian

def dense_hessian(landscape):
    """One column after the other."""
    return torch.stack([landscape.hessian_product(column) for column
                        in torch.eye(len(landscape.weights), dtype=torch.float64)])


@pytest.mark.parametrize('name', ['master', 'slave'])
def test_eigenvalues_and_trace_of_the_dense_hessian(name):
    landscape = landscape_of(name)
    inputs, targets = landscape.batches[0]

    def loss(weights):
        first, second = (torch.split(weights, [24, 6, 18, 3])[i:i + 2] for i in (0, 2))
        hidden = torch.tanh(inputs @ first[0].view(6, 4).T + first[1])
        logits = hidden @ second[0].view(3, 6).T + second[1]
        return (logits.logsumexp(dim=1) - logits[range(40), targets]).mean()

    dense = torch.autograd.functional.hessian(loss, landscape.weights)
    torch.testing.assert_close(dense_hessian(landscape), dense, rtol=1e-9, atol=1e-12)
    expected = torch.linalg.eigvalsh(dense).flip(0)
    found = sharp.eigenvalues(landscape, 0, 4, 1e-6)
    assert found['largest'] == pytest.approx(expected[:4].tolist(), rel=1e-6) and found['products'] >= 4
    estimate = sharp.trace(landscape, 0, 400)
    assert abs(estimate['trace'] - dense.trace().item()) < 4 * estimate['standard error'] < 0.5 * dense.trace().item()


def test_the_largest_eigenvalue_is_not_the_one_of_largest_magnitude():
    found = sharp.eigenvalues(Quadratic(np.zeros(6), np.zeros(6), np.diag([-9.0, 1.0, 2.0, -3.0, 0.5, 0.0])), 0, 2, 0)
    assert found['largest'] == pytest.approx([2, 1])


def test_the_trace_of_a_diagonal_hessian_needs_one_probe():
    found = sharp.trace(Quadratic(np.zeros(4), np.zeros(4), np.diag([-9.0, 1.0, 2.0, 0.25])), 3, 1)
    assert found['trace'] == pytest.approx(-5.75) and found['standard error'] is None


def test_more_eigenvalues_than_parameters_are_refused():
    with pytest.raises(UserError, match='--eigenvalue-count must be less than the number of parameters, 2, was given '
                                        '2'):
        sharp.eigenvalues(Quadratic([0, 0], [0, 0], np.eye(2)), 0, 2, 1e-3)


# The script

SHORT = '--images 12 -b 6 --draws 2 --probes 2 --ball-steps 2 --box-iterations 2 --eigenvalue-tolerance 0.1'


def test_all_measures_of_several_checkpoints_in_a_table_and_in_json(runs, monkeypatch, capsys, tmp_path):
    files = [f'{runs}/{name}/checkpoint.pth.tar' for name in ('plain', 'method')]
    before = {name: contents(runs / name) for name in ('plain', 'method')}
    call(monkeypatch, sharp, f'{" ".join(files)} --all {SHORT} -o {tmp_path}')
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith('|')]
    assert [line.split('|')[1].strip() for line in table] == ['checkpoint', '---',
                                                              *(f'{name}/checkpoint' for name in before)]
    assert len({line.count('|') for line in table}) == 1 and 'nan' not in printed
    for name in before:
        entries = json.loads((tmp_path / f'{name}-checkpoint-sharpness.json').read_text())
        assert [entry['measure'] for entry in entries] == list(sharp.MEASURES)
        results = {entry['measure']: entry['result'] for entry in entries}
        assert results['ball']['rise'] > results['noise']['rise'] and results['box']['sharpness'] > 0
        settings = entries[1]['settings']
        assert settings['images']['mode'] == 'train'
        assert settings['images']['number'] == 12 and settings['box_epsilon'] == 0.001
        assert set(entries[0]['environment']) == {'commit', 'device',
                                                  'torch'} and entries[0]['settings']['precision'] == 'fp32'
        assert contents(runs / name) == before[name]


@pytest.mark.parametrize('script, flags', [(sharp, '--noise --draws 1'), (measure_margins, '--margins --mode train')])
def test_each_is_measured_on_the_training_images_that_its_own_seed_drew(script, flags, runs, monkeypatch, tmp_path):
    def images(names, words, out):
        files = ' '.join(f'{runs}/{name}/checkpoint.pth.tar' for name in names)
        call(monkeypatch, script, f'{files} {flags} {words} --images 12 -o {tmp_path}/{out}')
        kind = 'sharpness' if script is sharp else 'margins'
        return [json.loads((tmp_path / out / f'{name}-checkpoint-{kind}.json').read_text())[0]['settings']['images']
                for name in names]

    together = images(['half', 'other_half'], '', 'both')
    assert together == images(['half'], '', 'first') + images(['other_half'], '', 'second')
    assert together[0] != together[1] and {held['mode'] for held in together} == {'train'}
    passes, fingerprint = [], checkpoints.fingerprint
    monkeypatch.setattr(checkpoints, 'fingerprint', lambda batches: passes.append(1) or fingerprint(batches))
    first, second = images(['half', 'other_half'], '--mode test', 'test')
    assert first == second and first['mode'] == 'test' and len(passes) == 1
    assert images(['half'], '--mode test --test-batch 5', 'fives') == [first]


def test_what_was_measured_is_not_measured_again_and_what_is_new_is_added(runs, monkeypatch, capsys, tmp_path):
    shutil.copytree(runs / 'plain', tmp_path / 'plain')
    command = f'{tmp_path}/plain/checkpoint.pth.tar {SHORT.split("--draws")[0]} '
    path = tmp_path / 'plain/checkpoint-sharpness.json'
    call(monkeypatch, sharp, command + '--box-iterations 2')
    first, printed = path.read_bytes(), capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(sharp, 'box_sharpness', lambda *args: pytest.fail('measured again'))
        call(monkeypatch, sharp, command + '--box --box-iterations 2')
    assert path.read_bytes() == first and capsys.readouterr().out == printed
    call(monkeypatch, sharp, command + '--box-iterations 2 --box-epsilon 0.01')
    entries = json.loads(path.read_text())
    assert entries[:2] == json.loads(first) and [entry['measure'] for entry in entries] == ['loss', 'box', 'box']
    assert entries[2]['result']['sharpness'] > entries[1]['result']['sharpness']
    call(monkeypatch, sharp, command + '--box-iterations 2 --mode test')  # on other images all is new
    assert [entry['settings']['images']['mode'] for entry
            in json.loads(path.read_text())] == ['train'] * 3 + ['test'] * 2


def test_what_is_broken_off_keeps_what_was_measured(runs, monkeypatch, tmp_path):
    def stopped(*args, **options):
        raise Stopped(signal.SIGINT)

    monkeypatch.setitem(sharp.MEASURES, 'trace', (stopped, ('probes',)))
    with pytest.raises(Stopped) as stop:
        call(monkeypatch, sharp, f'{runs}/plain/checkpoint.pth.tar --noise --trace --images 20 --draws 1 -o {tmp_path}')
    path = tmp_path / 'plain-checkpoint-sharpness.json'
    assert [entry['measure'] for entry in json.loads(path.read_text())] == ['loss', 'noise']
    assert 'goes on' in stop.value.sentence


def test_float64_and_as_augmented_as_in_training(runs, monkeypatch, tmp_path):
    results = {}
    for flags in ('', '--precision fp64', '--no-augment', '--manualSeed 1', '--mode test'):
        out = tmp_path / (flags or 'plain').replace(' ', '')
        call(monkeypatch, sharp, f'{runs}/plain/checkpoint.pth.tar --noise --ss 0 --draws 1 --images 100 {flags} -o '
                                 f'{out}')
        results[flags] = json.loads((out / 'plain-checkpoint-sharpness.json').read_text())[0]['result']['Loss']
    assert results['--precision fp64'] == pytest.approx(results[''], rel=1e-5)
    assert len({round(value, 6) for value in results.values()}) == 4


@pytest.mark.parametrize('flags, sentence', [
    ('', 'a checkpoint is required: FILE'),
    ('{}/plain/checkpoint.pth.tar nowhere.pth.tar', 'there is no checkpoint nowhere.pth.tar'),
    ('{}/plain/checkpoint.pth.tar {}/plain/../plain/checkpoint.pth.tar', 'a checkpoint is named twice'),
    ('{}/plain/checkpoint.pth.tar {}/copy/plain/checkpoint.pth.tar -o '
     'there', 'would have the same names in --out there'),
    ('{}/plain/checkpoint.pth.tar -j 3', '--workers is for --dataset folder'),
    ('{}/plain/checkpoint.pth.tar --times 3', '--times repeats the draw of a random manifold'),
    ('{}/plain/checkpoint.pth.tar --draws 3', '--draws is used by --noise, which is not asked for'),
    ('{}/plain/checkpoint.pth.tar --trace --box-epsilon 0.1', '--box-epsilon is used by --box, which is not asked for'),
    ('{}/plain/checkpoint.pth.tar --ball --ball-epsilon 0', 'must be a number above 0'),
    ('{}/plain/checkpoint.pth.tar --noise --ss -1', 'must be a number of at least 0'),
    ('{}/plain/checkpoint.pth.tar --mode val', '--mode val needs a run with --val-split'),
    ('{}/plain/checkpoint.pth.tar -o /dev/null/new', 'results cannot be written to /dev/null/new, as /dev/null is not '
                                                     'a folder'),
    ('{}/plain/checkpoint.pth.tar --arch vgg16', 'holds the architecture resnet, but --arch vgg16 was given'),
    ('{}/plain/checkpoint.pth.tar -o {out}', 'is not what this script writes'),
])
def test_a_mistake_is_one_sentence_before_any_data_is_read(flags, sentence, runs, monkeypatch, tmp_path, capsys):
    (tmp_path / 'plain-checkpoint-sharpness.json').write_text('{"a": 1}')
    flags = flags.replace('{}', str(runs)).format(out=tmp_path)
    assert sentence in refused(monkeypatch, capsys, tmp_path, flags, sharp)


def test_checkpoints_of_other_images_cannot_be_compared(runs, monkeypatch, tmp_path):
    state = torch.load(runs / 'plain/checkpoint.pth.tar', weights_only=True)
    torch.save({**state, 'mean': [0.0, 0.0, 0.0]}, tmp_path / 'other.pth.tar')
    with pytest.raises(UserError, match='were trained on different images'):
        call(monkeypatch, sharp, f'{runs}/plain/checkpoint.pth.tar {tmp_path}/other.pth.tar')
