import math
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dma import DMA_Linear, dma_loss

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/dma.npz')


def oracle(x, W):
    """Loss and its gradient with respect to x, one pair at a time, from the definition; all in float64.

    Angles are Kahan's 2 atan2(|a - b|, |a + b|) of unit vectors, which is accurate at 0 and at pi too. The gradient of
    1/2 theta^2 is -theta / sin(theta) times that of the cosine, (w/|w| - cos(theta) x/|x|) / |x|.
    """
    loss, gradient = 0.0, np.zeros_like(x)
    for i in range(len(x)):
        length = math.sqrt(math.fsum(value * value for value in x[i]))
        nearest = None
        for k in range(len(W)):
            norm = math.sqrt(math.fsum(value * value for value in W[k]))
            if length == 0 or norm == 0:
                theta, direction = math.pi / 2, np.zeros(x.shape[1])
            else:
                a, b = x[i] / length, W[k] / norm
                theta = 2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
                direction = (b - math.cos(theta) * a) / length
            if nearest is None or theta < nearest[0]:
                nearest = theta, direction
        theta, direction = nearest
        slope = 1.0 if theta < 1e-8 else theta / max(math.sin(theta), 1e-300)
        loss += 0.5 * theta ** 2 / len(x)
        gradient[i] = -slope * direction / len(x)
    return loss, gradient


def layer_with(W, b=None):
    W = torch.as_tensor(W)
    layer = DMA_Linear(W.shape[1], W.shape[0], bias=b is not None).to(W.dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
        if b is not None:
            layer.bias.copy_(torch.as_tensor(b))
    return layer


def ours(x, W):
    x = torch.as_tensor(x).clone().requires_grad_()
    loss = dma_loss(layer_with(W)(x)[1])
    return loss.item(), torch.autograd.grad(loss, x)[0]


def close(actual, expected, tolerance=1e-10):
    """Within `tolerance` of the largest element of `expected`, or within rounding of a cosine at 1, if that is more."""
    expected = np.asarray(expected)
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max() + 1e-15)


@pytest.mark.parametrize('case', [str(name) for name in GOLDEN['case_names']])
def test_golden(case):
    g = {key.split('/')[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(case + '/')}
    layer = layer_with(g['W'], g['b'] if g['has_bias'] else None)
    x, targets = torch.tensor(g['x'], requires_grad=True), torch.tensor(g['targets'])
    logits, cosine = layer(x, targets)
    close(logits, g['logits'])
    close(cosine, g['cosine'])
    regulariser, ce = dma_loss(cosine), F.cross_entropy(logits, targets)
    close(regulariser, g['dma_loss'])
    close(ce + float(GOLDEN['coef']) * regulariser, g['total_loss'])

    gx, gW = torch.autograd.grad(regulariser, (x, layer.weight), retain_graph=True, allow_unused=True)
    assert gW is None and gx.isfinite().all()
    # The original's own gradient is wrong or undefined in the edge cases; there only the true one counts.
    exists = np.isfinite(g['true_dma_gx']).all(axis=1)
    if exists.any():
        close(gx[torch.tensor(exists)], g['true_dma_gx'][exists])
    if not case.startswith('edge'):
        close(gx, g['dma_gx'])
        close(torch.autograd.grad(ce + 0.5 * regulariser, layer.weight)[0], g['total_gW'])


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2 ** 31), batch=st.integers(1, 4), classes=st.integers(1, 5), features=st.integers(1, 6),
       exponent=st.integers(-30, 30))
def test_float64_against_the_plain_loop(seed, batch, classes, features, exponent):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((batch, features)) * 10.0 ** exponent
    W = generator.standard_normal((classes, features))
    loss, gradient = ours(x, W)
    expected_loss, expected_gradient = oracle(x, W)
    assert loss == pytest.approx(expected_loss, rel=1e-12, abs=1e-14)
    if (layer_with(W)(torch.tensor(x))[1].max(dim=1).values > -0.99).all():  # near -1 no gradient exists
        np.testing.assert_allclose(gradient.numpy() * 10.0 ** exponent, expected_gradient * 10.0 ** exponent,
                                   rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('angle', [0.0, 1e-7, 1e-4, 3e-4, 1e-3, 0.1, 1.0, math.pi / 2, 2.0, 3.0])
@pytest.mark.parametrize('scale', [1e-37, 1e-20, 1.0, 1e20, 1e37])
def test_float32_at_every_angle_and_length(angle, scale):
    W = np.array([[1.0, 0.0, 0.0]], dtype=np.float32)
    x = np.array([[math.cos(angle), math.sin(angle), 0.0]], dtype=np.float32) * np.float32(scale)
    loss, gradient = ours(x, W)
    expected_loss, expected_gradient = oracle(x.astype(np.float64), W.astype(np.float64))
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=3e-7)
    assert gradient.isfinite().all()
    np.testing.assert_allclose(gradient.double().numpy() * scale, expected_gradient * scale, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_parallel_antiparallel_and_zero_vectors_have_finite_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(1, 64, generator=generator, dtype=dtype)
    lengths = torch.logspace(-3, 3, 1000, dtype=dtype)[:, None]
    loss, gradient = ours(lengths * W, W)
    assert loss < 1e-6 and gradient.isfinite().all()
    # the true gradient is 0; what is left is the rounding of the cosine
    assert (gradient * 1000 * lengths).abs().max() < 10 * torch.finfo(dtype).eps
    loss, gradient = ours(-lengths * W, W)
    assert loss == pytest.approx(math.pi ** 2 / 2, rel=1e-3) and gradient.isfinite().all()

    x = torch.cat((torch.zeros(1, 64, dtype=dtype), W))
    loss, gradient = ours(x, torch.cat((W, torch.zeros(1, 64, dtype=dtype))))
    assert loss == pytest.approx(math.pi ** 2 / 16, rel=1e-6)  # (pi/2)^2 / 2 for the zero vector, 0 for the other
    assert torch.equal(gradient[0], torch.zeros(64, dtype=dtype))


def test_slope_at_parallel_is_the_limit_minus_one():
    for dtype in (torch.float32, torch.float64):
        cosine = torch.ones(1, 1, dtype=dtype, requires_grad=True)
        dma_loss(cosine).backward()
        assert cosine.grad.item() == -1.0


def test_gradcheck():
    cosine = torch.linspace(-0.95, 0.95, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(dma_loss, cosine)


def test_only_the_feature_is_pulled():
    layer = DMA_Linear(5, 3)
    dma_loss(layer(torch.randn(4, 5, requires_grad=True))[1]).backward()
    assert layer.weight.grad is None and layer.bias.grad is None


def test_a_step_along_the_gradient_makes_the_angle_smaller():
    torch.manual_seed(0)
    layer, x = DMA_Linear(8, 5), torch.randn(16, 8, requires_grad=True)
    before = dma_loss(layer(x)[1])
    before.backward()
    assert dma_loss(layer(x.detach() - 0.5 * x.grad)[1]) < before


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_bf16_autocast_keeps_small_angles(device):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    angle = math.radians(1.0)  # bfloat16 would read 0 degrees
    layer = layer_with(np.array([[1.0, 0.0]], dtype=np.float32)).to(device)
    x = torch.tensor([[math.cos(angle), math.sin(angle)]], device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        logits, cosine = layer(x)
        loss = dma_loss(cosine)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and cosine.dtype == torch.float32
    assert loss.item() == pytest.approx(angle ** 2 / 2, rel=1e-3)
    assert x.grad.isfinite().all() and x.grad.norm().item() == pytest.approx(angle, rel=1e-3)
    with torch.autocast(device, torch.bfloat16):  # features that are bfloat16 already
        assert layer(x.detach().bfloat16())[1].dtype == torch.float32


def test_logits_are_those_of_a_linear_layer_in_training_and_evaluation():
    torch.manual_seed(0)
    layer, x = DMA_Linear(6, 4), torch.randn(3, 6)
    for mode in (True, False):
        layer.train(mode)
        logits, cosine = layer(x, torch.tensor([0, 1, 2]))
        assert torch.equal(logits, F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(cosine, F.cosine_similarity(x[:, None], layer.weight[None], dim=2))
    assert set(layer.state_dict()) == {'weight', 'bias'}
    assert DMA_Linear(6, 4, bias=False).bias is None


def test_empty_batch_one_image_one_class_and_wrong_shape():
    layer = DMA_Linear(4, 3)
    x = torch.empty(0, 4, requires_grad=True)
    loss = dma_loss(layer(x)[1])
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 4)
    assert dma_loss(DMA_Linear(4, 1)(torch.randn(1, 4))[1]).isfinite()
    for wrong in (torch.zeros(3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match='cosines'):
            dma_loss(wrong)


def test_the_file_works_alone(tmp_path):
    shutil.copy(ROOT / 'dma.py', tmp_path)
    result = subprocess.run([sys.executable, 'dma.py'], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and 'dma_loss' in result.stdout, result.stderr
