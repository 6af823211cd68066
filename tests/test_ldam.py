import argparse
import math
import pathlib
import re
import runpy
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import ldam
from baselines.ldam import NormalizedLinear, class_margins, deferred_weights, ldam_loss

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/rivals.npz')
CASES = [f'{when}_drw_s{scale}_m{margin}' for when in ('before', 'after') for scale, margin in ((30, 0.5), (10, 0.3))]


def margin_of(j, counts, max_margin):
    return max_margin * counts[j] ** -0.25 / max(count ** -0.25 for count in counts)


def oracle(cosines, targets, counts, max_margin, scale, weight):
    """The loss from the definition, one image and one class at a time, in float64."""
    numerator = denominator = 0.0
    for i, y in enumerate(targets):
        scaled = []
        for j in range(len(counts)):
            scaled.append(scale * (cosines[i, j] - (margin_of(j, counts, max_margin) if j == y else 0)))
        cross_entropy = math.log(math.fsum(math.exp(z) for z in scaled)) - scaled[y]
        numerator += weight[y] * cross_entropy
        denominator += weight[y]
    return numerator / denominator


def weights_oracle(counts, beta):
    weights = [(1 - beta) / (1 - beta ** count) for count in counts]
    return [len(counts) * weight / math.fsum(weights) for weight in weights]


def close(actual, expected, tolerance=1e-9):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def random_data(seed, batch=9, classes=5):
    generator = np.random.default_rng(seed)
    counts = [int(count) for count in generator.integers(1, 3000, size=classes)]
    return (generator.uniform(-1, 1, (batch, classes)), generator.integers(classes, size=batch), counts)


def layer_with(W, scale):
    layer = NormalizedLinear(W.shape[1], W.shape[0], scale).to(torch.as_tensor(W).dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(W))
    return layer


def term_for(counts, *flags, classes=None):
    parser = argparse.ArgumentParser()
    ldam.add_arguments(parser)
    model = types.SimpleNamespace(num_classes=len(counts) if classes is None else classes)
    return ldam.loss_term(parser.parse_args(flags), model, counts)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('max_margin, scale', [(0.5, 30.0), (0.0, 1.0), (1.5, 10.0)])
def test_float64_against_the_plain_loop(seed, max_margin, scale):
    cosines, targets, counts = random_data(seed)
    expected = oracle(cosines, targets, counts, max_margin, scale, [1.0] * 5)
    arguments = torch.tensor(cosines), torch.tensor(targets)
    assert ldam_loss(*arguments, counts, max_margin, scale).item() == pytest.approx(expected, rel=1e-12)
    weight = [0.5, 2.0, 0.25, 3.0, 1.5]
    expected = oracle(cosines, targets, counts, max_margin, scale, weight)
    for given in (weight, torch.tensor(weight)):
        loss = ldam_loss(*arguments, torch.tensor(counts), max_margin, scale, given)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_gradcheck_and_torch_func():
    cosines, targets, counts = random_data(0)
    cosines, targets = torch.tensor(cosines), torch.tensor(targets)
    weight = deferred_weights(counts)

    def loss(cosines):
        return ldam_loss(cosines, targets, counts, scale=3.0, weight=weight)

    x = cosines.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    close(torch.func.grad(loss)(cosines), torch.autograd.grad(loss(x), x)[0], 1e-12)


@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    reference = {key: GOLDEN[f'ldam/{case}/float64/{key}']
                 for key in ('loss', 'gx', 'gW', 'scaled_logits', 'cosine', 'margins', 'class_weights')}
    max_margin, scale = float(case.split('_m')[1]), float(case.split('_s')[1].split('_')[0])
    x, targets = torch.tensor(GOLDEN['ldam/x'], requires_grad=True), torch.tensor(GOLDEN['ldam/targets'])
    counts = GOLDEN['ldam/counts'].tolist()
    layer = layer_with(GOLDEN['ldam/W'], scale)
    outputs = layer(x)
    close(outputs.detach(), scale * reference['cosine'])
    close(class_margins(counts, max_margin), reference['margins'])
    term = term_for(counts, f'--max-margin={max_margin}', f'--scale={scale}', '--deferred=0.8')
    term.before_step(0.9 if case.startswith('after') else 0.5, 1.0)
    weight = deferred_weights(counts, float(GOLDEN['ldam/beta'])) if case.startswith('after') else None
    if weight is not None:
        close(weight, reference['class_weights'])
    for loss in (ldam_loss(outputs / scale, targets, counts, max_margin, scale, weight), term(outputs, targets, []),
                 term((outputs, None), targets, [])):
        close(loss.item(), reference['loss'])
        gx, gW = torch.autograd.grad(loss, (x, layer.weight), retain_graph=True)
        close(gx, reference['gx'])
        close(gW, reference['gW'])


@pytest.mark.parametrize('table', ['cifar10_exp0.01', 'cifar100_exp0.01', 'cifar10_step0.01', 'balanced10'])
def test_golden_tables_of_margins_and_weights(table):
    counts, margins, weights = (GOLDEN[f'ldam/tables/{table}/{key}'] for key in ('counts', 'margins', 'drw_weights'))
    close(class_margins(torch.tensor(counts)), margins)
    close(deferred_weights(torch.tensor(counts)), weights)
    close(weights_oracle(counts.tolist(), 0.9999), weights)


def test_weights():
    counts = [5000, 200, 10, 1]
    for beta in (0.5, 0.99, 0.9999):
        weights = deferred_weights(counts, beta)
        assert weights.dtype == torch.float64
        close(weights, weights_oracle(counts, beta))
    assert torch.equal(deferred_weights(counts, 0.0), torch.ones(4, dtype=torch.float64))
    assert deferred_weights([7], 0.9).tolist() == [1.0]
    # For beta near 1 the weights approach 1 / count.
    inverse = 1 / np.array(counts)
    close(deferred_weights(counts, 1 - 1e-13), 4 * inverse / inverse.sum())


def test_the_rarest_class_has_the_largest_margin():
    margins = class_margins([16, 1, 81], 0.6)
    close(margins, [0.3, 0.6, 0.2])


@pytest.mark.parametrize('deferred, switched', [(0.8, [False, False, True, True]), (1.0, [False] * 4),
                                                (0.0, [True] * 4)])
def test_the_weights_are_deferred(deferred, switched):
    cosines, targets, counts = random_data(1)
    outputs, targets = torch.tensor(30 * cosines), torch.tensor(targets)
    term = term_for(counts, f'--deferred={deferred}')
    plain, weighted = (oracle(cosines, targets, counts, 0.5, 30.0, weight)
                       for weight in ([1.0] * 5, weights_oracle(counts, 0.9999)))
    assert abs(plain - weighted) > 0.01
    assert term(outputs, targets, []).item() == pytest.approx(weighted if deferred == 0 else plain)
    for behind, reweighted in zip((0.0, 0.79, 0.8, 1.0), switched):
        term.before_step(behind, 1.0)
        assert term(outputs, targets, []).item() == pytest.approx(weighted if reweighted else plain)
    term.before_step(0.1, 1.0)  # the training begins again
    assert term(outputs, targets, []).item() == pytest.approx(weighted if deferred == 0 else plain)


def test_the_term_follows_the_dtype_of_the_outputs():
    cosines, targets, counts = random_data(2)
    term, targets = term_for(counts), torch.tensor(targets)
    expected = oracle(cosines, targets, counts, 0.5, 30.0, [1.0] * 5)
    outputs = torch.tensor(30 * cosines)
    assert term(outputs.float(), targets, []).item() == pytest.approx(expected, rel=1e-5)
    assert term(outputs, targets, []).item() == pytest.approx(expected, rel=1e-12)
    loss = term(outputs.bfloat16(), targets, [])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=0.05)


def test_head():
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 6), (3, 6)))
    layer = layer_with(W, 20.0)
    expected = 20 * F.cosine_similarity(x[:, None], W[None], dim=2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x, torch.tensor([0, 1, 2, 0])), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    for length in (1e-37, 1e37):
        torch.testing.assert_close(layer.float()((x * length).float()), expected.float(), rtol=1e-4, atol=1e-4)
    assert set(layer.state_dict()) == {'weight'}


def test_zero_and_parallel_vectors():
    layer = layer_with(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]]), 30.0)
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0]], requires_grad=True)
    outputs = layer(x)
    assert outputs.tolist() == [[0, 0, 0], [30, 0, 0], [-30, 0, 0]]
    ldam_loss(outputs / 30, torch.tensor([0, 0, 0]), [3, 2, 1]).backward()
    assert x.grad.isfinite().all() and torch.equal(x.grad[0], torch.zeros(2))
    assert layer.weight.grad.isfinite().all() and torch.equal(layer.weight.grad[1], torch.zeros(2))


def test_bf16_autocast_keeps_small_angles():
    layer, angle = layer_with(torch.tensor([[1.0, 0.0]]), 1.0), math.radians(2.0)  # cosine 0.9994, in bfloat16 1
    with torch.autocast('cpu', torch.bfloat16):
        cosine = layer(torch.tensor([[math.cos(angle), math.sin(angle)]]))
        loss = ldam_loss(cosine.expand(1, 2), torch.tensor([0]), [1, 1], max_margin=0.001, scale=1000.0)
        assert layer(torch.ones(1, 2).bfloat16()).dtype == torch.float32
    assert cosine.dtype == loss.dtype == torch.float32
    assert cosine.item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert loss.item() == pytest.approx(math.log(1 + math.e), rel=1e-3)


def test_empty_batch_one_image_and_one_class():
    layer = NormalizedLinear(4, 3)
    x = torch.empty(0, 4, requires_grad=True)
    for weight in (None, [1.0, 2.0, 3.0]):
        loss = ldam_loss(layer(x) / 30, torch.empty(0, dtype=torch.long), [1, 2, 3], weight=weight)
        assert loss.item() == 0
        loss.backward()
        assert x.grad.shape == (0, 4) and torch.equal(layer.weight.grad, torch.zeros(3, 4))
    assert term_for([1, 2, 3])(layer(x), torch.empty(0, dtype=torch.long), []).item() == 0
    cosines, targets, counts = random_data(3, batch=1)
    # The scale of the weights cancels, so a single image has its plain loss.
    loss = ldam_loss(torch.tensor(cosines), torch.tensor(targets), counts, weight=deferred_weights(counts))
    assert loss.item() == pytest.approx(oracle(cosines, targets, counts, 0.5, 30.0, [1.0] * 5))
    assert ldam_loss(torch.tensor([[0.3]]), torch.tensor([0]), [12]).item() == 0


@pytest.mark.parametrize('counts, message', [
    ([5, 0, 3], '0 for class 1'), ([5, 3, -2], '-2 for class 2'), ([1.5, 2, 3], '1.5 for class 0'),
    ([1, math.nan, 2], 'nan for class 1'), ([1, 2, math.inf], 'inf for class 2'), ([], 'shape'), ([[1, 2, 3]], 'shape'),
    ([1, 2], '2 counts')])
def test_wrong_counts(counts, message):
    for given in (counts, torch.tensor(counts)):
        with pytest.raises(ValueError, match=message):
            ldam_loss(torch.zeros(2, 3), torch.tensor([0, 1]), given)


@pytest.mark.parametrize('options, message', [
    ({'max_margin': -1}, 'max_margin'), ({'max_margin': math.inf}, 'max_margin'), ({'scale': 0}, 'scale'),
    ({'scale': math.nan}, 'scale'), ({'weight': [1.0, 2.0]}, 'weight')])
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ldam_loss(torch.zeros(2, 3), torch.tensor([0, 1]), [1, 2, 3], **options)


def test_other_options_out_of_range():
    for beta in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match='beta'):
            deferred_weights([1, 2], beta)
    with pytest.raises(ValueError, match='0 for class 1'):
        deferred_weights([1, 0])
    with pytest.raises(ValueError, match='scale'):
        NormalizedLinear(4, 3, scale=-1.0)
    for flag, message in (('--deferred=1.1', 'deferred'), ('--deferred=-0.1', 'deferred'), ('--max-margin=-1', 'max_'),
                          ('--reweight-beta=1', 'beta'), ('--scale=0', 'scale')):
        with pytest.raises(ValueError, match=message):
            term_for([1, 2, 3], flag)
    with pytest.raises(ValueError, match='4 numbers'):
        term_for([1, 2, 3], classes=4)


def test_flags():
    parser = argparse.ArgumentParser()
    ldam.add_arguments(parser)
    args = parser.parse_args([])
    assert vars(args) == {'max_margin': 0.5, 'scale': 30.0, 'deferred': 0.8, 'reweight_beta': 0.9999}
    assert ldam.cross_entropy_weight(args) == 0.0
    assert ldam.head(parser.parse_args(['--scale=16']))(4, 3).scale == 16.0


def test_the_file_imports_torch_and_the_standard_library_alone_and_its_example_runs(capsys):
    path = ROOT / 'baselines/ldam.py'
    imports = re.findall(r'^ *(?:import|from) +(\w+)', path.read_text(), re.MULTILINE)
    assert 'torch' in imports and set(imports) - {'torch'} <= sys.stdlib_module_names
    runpy.run_path(str(path), run_name='__main__')
    assert 'reweighted' in capsys.readouterr().out
