import argparse
import copy
import math
import pathlib
import pickle
import re
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import arcface
from baselines.arcface import ArcFaceLinear

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/rivals.npz')
CASES = sorted({key.rsplit('/', 2)[0] for key in GOLDEN.files if key.startswith('face/') and key.count('/') == 4})
MARGINS = [(0.0, 0.0), (0.0, 0.35), (0.5, 0.0), (1.0, 0.2), (3.0, 0.0)]


def oracle(x, W, targets, scale, angular_margin, cosine_margin):
    """Logits, mean loss, and its gradients at x and at W, one pair at a time, from the definition, in float64.

    Angles are Kahan's 2 atan2(|a - b|, |a + b|) of unit vectors, which is accurate at 0 and at pi too. The gradient of
    the cosine is (b - cosine a) / |x|, and the slope of cos(theta + m) as a function of it sin(theta + m) / sin(theta).
    """
    logits, loss, gx, gW = np.zeros((len(x), len(W))), 0.0, np.zeros_like(x), np.zeros_like(W)
    for i in range(len(x)):
        slopes, pairs = [], []
        for j in range(len(W)):
            a_length, b_length = math.hypot(*x[i]), math.hypot(*W[j])
            if a_length == 0 or b_length == 0:
                theta, at_x, at_w = math.pi / 2, 0 * x[i], 0 * W[j]
            else:
                a, b = x[i] / a_length, W[j] / b_length
                theta = 2 * math.atan2(math.hypot(*(a - b)), math.hypot(*(a + b)))
                at_x, at_w = (b - math.cos(theta) * a) / a_length, (a - math.cos(theta) * b) / b_length
            if j != targets[i]:
                value, slope = math.cos(theta), 1.0
            elif theta + angular_margin >= math.pi:
                value, slope = math.cos(theta) - angular_margin * math.sin(angular_margin) - cosine_margin, 1.0
            else:
                value = math.cos(theta + angular_margin) - cosine_margin
                slope = math.sin(theta + angular_margin) / math.sin(theta) if theta > 1e-8 else 0.0
            logits[i, j] = scale * value
            slopes.append(scale * slope)
            pairs.append((at_x, at_w))
        largest = max(logits[i])
        total = math.fsum(math.exp(logit - largest) for logit in logits[i])
        loss += (largest + math.log(total) - logits[i, targets[i]]) / len(x)
        for j in range(len(W)):
            at_logit = (math.exp(logits[i, j] - largest) / total - (j == targets[i])) / len(x)
            gx[i] += at_logit * slopes[j] * pairs[j][0]
            gW[j] += at_logit * slopes[j] * pairs[j][1]
    return logits, loss, gx, gW


def layer_with(W, scale=30.0, angular_margin=0.5, cosine_margin=0.0):
    W = torch.as_tensor(W)
    layer = ArcFaceLinear(W.shape[1], W.shape[0], scale, angular_margin, cosine_margin).to(W.dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
    return layer


def ours(x, W, targets, *options):
    layer, x = layer_with(W, *options), torch.tensor(x, requires_grad=True)
    logits = layer(x, torch.as_tensor(targets))
    loss = F.cross_entropy(logits, torch.as_tensor(targets))
    return (logits.detach(), loss.item(), *torch.autograd.grad(loss, (x, layer.weight)))


def close(actual, expected, tolerance=1e-9):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * np.abs(expected).max() + 1e-14)


def random_data(seed, batch=7, classes=5, features=6):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((batch, features)), generator.standard_normal((classes, features)),
            generator.integers(classes, size=batch))


@pytest.mark.parametrize('margins', MARGINS)
@pytest.mark.parametrize('seed', range(4))
def test_float64_against_the_plain_loop(seed, margins):
    x, W, targets = random_data(seed)
    x[0], x[1] = 2 * W[targets[0]], -3 * W[targets[1]]  # angles of 0 and pi
    x[2], W[4] = 0, 0
    for result, expected in zip(ours(x, W, targets, 10.0, *margins), oracle(x, W, targets, 10.0, *margins)):
        close(result, expected, 1e-7)  # the sine of an angle of 0, from its cosine, has half of the digits


def test_both_branches_are_in_the_loop_tests():
    angles = []
    for seed in range(4):
        x, W, targets = random_data(seed)
        angles += [math.acos(x[i] @ W[k] / np.linalg.norm(x[i]) / np.linalg.norm(W[k])) for i, k in enumerate(targets)]
    assert any(angle + 1.0 > math.pi for angle in angles) and any(angle + 1.0 < math.pi for angle in angles)


@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    _, data, name = case.split('/')
    kind, margin, scale = name.split('_')
    margin, scale = float(margin[1:]), float(scale[1:])
    x, W, targets, cosine = (GOLDEN[f'face/{data}/{key}'] for key in ('x', 'W', 'targets', 'cosine'))
    reference = {key: GOLDEN[f'{case}/{"true_fallback" if kind == "arc" else "true"}/{key}']
                 for key in ('logits', 'loss', 'gx', 'gW')}
    options = (scale, margin, 0.0) if kind == 'arc' else (scale, 0.0, margin)
    logits, loss, gx, gW = ours(x, W, targets, *options)
    close(logits, reference['logits'])
    close(loss, reference['loss'].mean())
    close(layer_with(W, *options).eval()(torch.tensor(x)).detach(), scale * cosine)
    for result, expected in ((gx, reference['gx']), (gW, reference['gW'])):
        exists = np.isfinite(expected).all(axis=1)
        assert result.isfinite().all() and exists.any()
        close(result[torch.tensor(exists)], expected[exists], 1e-7 if data == 'angles' else 1e-9)


def test_goldens_cover_every_data_set_and_both_margins():
    assert len(CASES) == 32  # 4 data sets, 4 ArcFace and 4 CosFace settings each


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('margins', MARGINS)
def test_gradients_are_finite_and_bounded_at_every_angle(dtype, margins):
    for angle in (0.0, 1e-8, 1e-6, 1e-4, 3e-4, 1e-3, 0.1, math.pi - 1e-3, math.pi - 1e-6, math.pi):
        layer = layer_with(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype), 1.0, *margins)
        x = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=dtype, requires_grad=True)
        layer(x, torch.tensor([0]))[0, 0].backward()
        assert x.grad.norm() <= 1.01  # |gradient of cos(theta + m)| = |sin(theta + m)| / |x|
        assert layer.weight.grad.isfinite().all()


def test_gradient_at_a_small_angle_is_that_of_the_angle_in_float32():
    layer = layer_with(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 1.0, 0.5)
    x = torch.tensor([[math.cos(0.02), math.sin(0.02)]], requires_grad=True)
    layer(x, torch.tensor([0]))[0, 0].backward()
    # Constant margins, as in insightface since December 2022, would give sin(0.02) instead of sin(0.52).
    assert x.grad.norm().item() == pytest.approx(math.sin(0.52), rel=1e-3)


def test_parallel_and_zero_vectors_contribute_no_gradient():
    W = torch.eye(3, dtype=torch.float64)
    x = torch.tensor([[2.0, 0, 0], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    layer = layer_with(W)
    layer(x, torch.tensor([0, 1])).gather(1, torch.tensor([[0], [1]])).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(layer.weight.grad[0], torch.zeros(3, dtype=torch.float64))


def test_the_fallback_begins_where_the_angle_plus_the_margin_is_pi():
    margin = math.pi / 2  # cosine is exactly 0 at pi - margin, up to the rounding of cos(pi / 2)
    layer = layer_with(torch.eye(2, dtype=torch.float64), 1.0, margin)
    logit = layer(torch.tensor([[-1e-15, 1.0]], dtype=torch.float64), torch.tensor([0]))[0, 0].item()
    assert logit == pytest.approx(-margin)
    logit = layer(torch.tensor([[1e-15, 1.0]], dtype=torch.float64), torch.tensor([0]))[0, 0].item()
    assert logit == pytest.approx(-1.0)
    axis = layer_with(torch.eye(2, dtype=torch.float64), 1.0, 0.5)
    logit = axis(torch.tensor([[-1.0, 0.0]], dtype=torch.float64), torch.tensor([0]))[0, 0].item()
    assert logit == pytest.approx(-1 - 0.5 * math.sin(0.5))


def test_the_target_logit_falls_with_the_angle():
    angles = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    x = torch.stack((angles.cos(), angles.sin()), dim=1)
    layer = layer_with(torch.eye(2, dtype=torch.float64), 1.0, 0.5, 0.1)
    logits = layer(x, torch.zeros(200, dtype=torch.long))[:, 0]
    assert (logits.diff() < 0).all()


def test_evaluation_has_no_margin_and_training_needs_targets():
    x, W, targets = map(torch.as_tensor, random_data(0))
    layer = layer_with(W, 20.0, 0.5, 0.1)
    with pytest.raises(ValueError, match='needs the targets in training'):
        layer(x)
    plain = 20 * F.cosine_similarity(x[:, None], W[None], dim=2)
    logits = layer(x, targets)
    assert (logits < plain - 1e-6).sum() == len(x)  # the targets' alone
    torch.testing.assert_close(layer.without_margin(logits), plain)
    assert not layer.without_margin(logits).requires_grad
    layer.eval()
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(layer(x, targets), plain)
    torch.testing.assert_close(layer.without_margin(layer(x)), plain)
    assert set(layer.state_dict()) == {'weight'}


@pytest.mark.parametrize('strength', [0.0, 0.25, 1.0])
def test_strength_multiplies_both_margins(strength):
    x, W, targets = random_data(1)
    layer = layer_with(W, 20.0, 0.8, 0.2)
    layer.before_step(0.3, strength)
    logits = layer(torch.tensor(x), torch.tensor(targets))
    close(logits.detach(), oracle(x, W, targets, 20.0, 0.8 * strength, 0.2 * strength)[0])
    close(layer.without_margin(logits), oracle(x, W, targets, 20.0, 0.0, 0.0)[0])
    layer.before_step(0.4, 1.0)
    close(layer(torch.tensor(x), torch.tensor(targets)).detach(), oracle(x, W, targets, 20.0, 0.8, 0.2)[0])


def test_gradcheck_and_torch_func():
    x, W, targets = map(torch.as_tensor, random_data(2))
    layer = layer_with(W, 3.0, 1.0, 0.1)
    assert torch.autograd.gradcheck(lambda x: layer(x, targets), x.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: layer(x, targets), x.clone().requires_grad_())
    gradient = torch.func.grad(lambda x: layer(x, targets).square().sum())(x)
    copy.deepcopy(layer), pickle.dumps(layer)
    x.requires_grad_()
    close(gradient.detach(), torch.autograd.grad(layer(x, targets).square().sum(), x)[0])


def test_second_derivatives_are_finite_at_angles_of_0_and_pi():
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    gradient, = torch.autograd.grad(layer_with(torch.eye(2))(x, torch.tensor([0, 0, 0])).sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].isfinite().all()


def test_bf16_autocast_keeps_small_angles():
    angle = math.radians(1.0)  # bfloat16 would read 0 degrees
    layer = layer_with(torch.tensor([[1.0, 0.0]]), 1.0, 0.5)
    x = torch.tensor([[math.cos(angle), math.sin(angle)]], requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        logits = layer(x, torch.tensor([0]))
        assert layer(x.detach().bfloat16(), torch.tensor([0])).dtype == torch.float32
    assert logits.dtype == torch.float32 and logits.item() == pytest.approx(math.cos(angle + 0.5), rel=1e-4)
    logits.backward()
    assert x.grad.norm().item() == pytest.approx(math.sin(angle + 0.5), rel=1e-3)


def test_lengths_near_the_limits_of_float32():
    x, W, targets = random_data(3)
    expected = oracle(x, W, targets, 10.0, 0.5, 0.0)[0]
    for scale in (1e-37, 1e37):
        logits = ours((x * scale).astype(np.float32), W.astype(np.float32), targets, 10.0)[0]
        close(logits.double(), expected, 1e-5)


def test_empty_batch_one_image_and_one_class():
    layer = ArcFaceLinear(4, 3)
    x = torch.empty(0, 4, requires_grad=True)
    logits = layer(x, torch.empty(0, dtype=torch.long))
    logits.sum().backward()
    assert logits.shape == (0, 3) and x.grad.shape == (0, 4)
    assert torch.equal(layer.weight.grad, torch.zeros(3, 4))
    assert layer(torch.randn(1, 4), torch.tensor([2])).isfinite().all()
    one_class = ArcFaceLinear(4, 1)(torch.randn(1, 4), torch.tensor([0]))
    assert F.cross_entropy(one_class, torch.tensor([0])) == 0


@pytest.mark.parametrize('options, message', [
    ({'scale': 0}, 'scale'), ({'scale': math.inf}, 'scale'), ({'scale': math.nan}, 'scale'),
    ({'angular_margin': -0.1}, 'angular_margin'), ({'angular_margin': math.pi}, 'radians'),
    ({'angular_margin': 28.6}, 'radians'), ({'cosine_margin': -0.1}, 'cosine_margin'),
    ({'cosine_margin': math.inf}, 'cosine_margin')])
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ArcFaceLinear(4, 3, **options)


def test_strength_out_of_range():
    with pytest.raises(ValueError, match='between 0 and 1'):
        ArcFaceLinear(4, 3).before_step(0.0, 1.5)


def test_flags():
    parser = argparse.ArgumentParser()
    arcface.add_arguments(parser)
    layer = arcface.head(parser.parse_args([]))(4, 3)
    assert (layer.scale, layer.angular_margin, layer.cosine_margin) == (30.0, 0.5, 0.0) and layer.bias is None
    layer = arcface.head(parser.parse_args(['--scale=16', '--angular-margin=0', '--cosine-margin=0.35']))(4, 3)
    assert (layer.scale, layer.angular_margin, layer.cosine_margin) == (16.0, 0.0, 0.35)


def test_the_file_imports_torch_and_the_standard_library_alone_and_its_example_runs(capsys):
    path = ROOT / 'baselines/arcface.py'
    imports = re.findall(r'^ *(?:import|from) +(\w+)', path.read_text(), re.MULTILINE)
    assert 'torch' in imports and set(imports) - {'torch'} <= sys.stdlib_module_names
    runpy.run_path(str(path), run_name='__main__')
    assert 'ArcFace : loss' in capsys.readouterr().out
