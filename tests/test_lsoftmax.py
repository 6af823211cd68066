import copy
import itertools
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

import lsoftmax
from lsoftmax import LargeMarginSoftmaxLoss, LSoftmaxLinear
from utils.flags import Parser

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/lsoftmax.npz')
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.float64])


def angle(a, b):
    """Kahan's 2 atan2(|a - b|, |a + b|) of unit vectors, accurate also at 0 and pi; a zero vector is orthogonal."""
    if not a.any() or not b.any():
        return math.pi / 2
    a, b = a / math.sqrt(math.fsum(a * a)), b / math.sqrt(math.fsum(b * b))
    return 2 * math.atan2(math.sqrt(math.fsum((a - b) ** 2)), math.sqrt(math.fsum((a + b) ** 2)))


def oracle(x, W, targets, margin, beta):
    """Logits and mean cross-entropy, one sample and one class at a time, from the definition; all in float64."""
    logits, loss = np.zeros((len(x), len(W))), 0.0
    for i, target in enumerate(targets):
        for j in range(len(W)):
            length, theta = math.sqrt(math.fsum(x[i] ** 2)) * math.sqrt(math.fsum(W[j] ** 2)), angle(x[i], W[j])
            if j != target:
                logits[i, j] = length * math.cos(theta)
                continue
            k = 0
            while k < margin - 1 and theta > (k + 1) * math.pi / margin:
                k += 1
            psi = (-1) ** k * math.cos(margin * theta) - 2 * k
            logits[i, j] = length * (psi + beta * math.cos(theta)) / (1 + beta)
        largest = max(logits[i])
        sum_of_powers = math.fsum(math.exp(logit - largest) for logit in logits[i])
        loss += (largest + math.log(sum_of_powers) - logits[i, target]) / len(x)
    return logits, loss


def central_difference(function, point, step=1e-6):
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        ahead, behind = point.copy(), point.copy()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


def head_with(W, beta=0.0, **options):
    W = torch.as_tensor(W)
    head = LSoftmaxLinear(W.shape[1], W.shape[0], beta=beta, **options).to(W.dtype)
    with torch.no_grad():
        head.weight.copy_(W)
    return head


def ours(x, W, targets, **options):
    """Logits, cross-entropy and its gradients with respect to x and the weight."""
    head = head_with(W, **options)
    x, targets = torch.as_tensor(x).clone().requires_grad_(), torch.as_tensor(targets)
    logits = head(x, targets)
    loss = F.cross_entropy(logits, targets)
    return logits, loss, *torch.autograd.grad(loss, (x, head.weight))


def close(actual, expected, tolerance=1e-9):
    """Within `tolerance` of the largest element of `expected`."""
    expected = np.asarray(expected)
    actual = actual.detach().double().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max() + 1e-15)


def at_angles(thetas):
    """Unit vectors at these angles to (1, 0)."""
    return torch.stack((torch.cos(thetas), torch.sin(thetas)), dim=1)


@pytest.mark.parametrize('data', [str(name) for name in GOLDEN['data_names']])
@pytest.mark.parametrize('margin', GOLDEN['margins'].tolist())
@pytest.mark.parametrize('beta', GOLDEN['betas'].tolist())
def test_golden(data, margin, beta):
    x, W, targets = (GOLDEN[f'{data}/{key}'] for key in ('x', 'W', 'targets'))
    case = f'{data}/m{margin}_beta{beta:g}'
    expected = {key: GOLDEN[f'{case}/{key}'] for key in ('logits', 'ce', 'gx', 'gW', 'beta_after')}
    logits, loss, gx, gW = ours(x, W.T, targets, margin=margin, beta=beta)
    close(logits, expected['logits'])
    close(loss, expected['ce'])
    tolerance = 1e-7 if data == 'angles' else 1e-9  # the original adds 1e-10 to lengths, and clamps at 1 - 1e-7 for k
    close(gx, expected['gx'], tolerance)
    close(gW, expected['gW'].T, tolerance)

    head = head_with(W.T, margin=margin, beta=beta)
    head(torch.tensor(x), torch.tensor(targets))
    head.after_step()
    close(head.beta, expected['beta_after'])
    close(head.eval()(torch.tensor(x)), GOLDEN[f'{data}/eval_logits'])


def test_golden_floor_of_beta():
    g = {key: GOLDEN[f'betamin/{key}'] for key in ('m', 'beta', 'beta_min', 'logits', 'gx', 'gW', 'beta_after')}
    x, W, targets = (GOLDEN[f'rand/{key}'] for key in ('x', 'W', 'targets'))
    options = dict(margin=int(g['m']), beta=float(g['beta']), beta_min=float(g['beta_min']))
    logits, _, gx, gW = ours(x, W.T, targets, **options)
    close(logits, g['logits'])
    close(gx, g['gx'])
    close(gW, g['gW'].T)
    head = head_with(W.T, **options)
    head.after_step()
    close(head.beta, g['beta_after'])  # beta itself goes on falling


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_golden_schedule(dtype, tolerance):
    for steps, expected in zip(GOLDEN['schedule/n_calls'], GOLDEN['schedule/beta']):
        beta, decay = float(GOLDEN['schedule/beta0']), float(GOLDEN['schedule/scale'])
        head = LSoftmaxLinear(3, 2, beta=beta, beta_decay=decay).to(dtype)
        for _ in range(steps):
            head.after_step()
        assert head.beta.item() == pytest.approx(expected, rel=tolerance)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2 ** 31), margin=st.integers(1, 7), beta=st.sampled_from([0.0, 0.25, 1.0, 30.0]),
       batch=st.integers(1, 4), classes=st.integers(1, 5), features=st.integers(1, 6))
def test_float64_against_the_plain_loop(seed, margin, beta, batch, classes, features):
    generator = np.random.default_rng(seed)
    x, W = generator.standard_normal((batch, features)), generator.standard_normal((classes, features))
    for rows in (x, W):  # differences over a step are no slope in very short vectors
        rows *= generator.uniform(0.5, 2, (len(rows), 1)) / np.linalg.norm(rows, axis=1, keepdims=True)
    targets = generator.integers(classes, size=batch)
    logits, loss, gx, gW = ours(x, W, targets, margin=margin, beta=beta)
    expected_logits, expected_loss = oracle(x, W, targets, margin, beta)
    close(logits, expected_logits, 1e-12)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-11, abs=1e-13)
    for ours_gradient, gradient in ((gx, central_difference(lambda x: oracle(x, W, targets, margin, beta)[1], x)),
                                    (gW, central_difference(lambda W: oracle(x, W, targets, margin, beta)[1], W))):
        np.testing.assert_allclose(ours_gradient.numpy(), gradient, rtol=0, atol=1e-5 * (1 + np.abs(gradient).max()))


def apart_from_the_boundaries(margin):
    """x, weight and repeated targets whose angles are not near k pi/m, where the second derivative jumps."""
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        x, W = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (5, 3))
        targets = torch.tensor([0, 1, 0, 0, 1])
        turns = torch.arccos(F.cosine_similarity(x, W[targets])) * margin / math.pi
        if ((turns - turns.round()).abs() > 0.02).all() and len(set(turns.floor().tolist())) == margin:
            return x.requires_grad_(), W.requires_grad_(), targets


@pytest.mark.parametrize('beta', [0.0, 1.0])
def test_gradcheck_and_gradgradcheck_with_repeated_targets(beta):
    x, W, targets = apart_from_the_boundaries(3)
    head = LSoftmaxLinear(4, 3, margin=3, beta=beta).double()

    def layer(x, W):
        return torch.func.functional_call(head, {'weight': W}, (x, targets))

    assert torch.autograd.gradcheck(layer, (x, W))
    assert torch.autograd.gradgradcheck(layer, (x, W))


def test_each_gradient_alone_is_the_one_of_both():
    x, W, targets = apart_from_the_boundaries(4)
    both = ours(x.detach(), W.detach(), targets, margin=4)[2:]
    head = head_with(W.detach(), margin=4)
    loss = F.cross_entropy(head(x.detach(), targets), targets)
    assert torch.equal(torch.autograd.grad(loss, head.weight)[0], both[1])
    loss = F.cross_entropy(head.requires_grad_(False)(x, targets), targets)
    assert torch.equal(torch.autograd.grad(loss, x)[0], both[0])


def test_the_weight_gradient_adds_up_over_repeated_targets():
    x, W, _ = apart_from_the_boundaries(3)
    head = head_with(W.detach(), margin=3)
    targets = torch.ones(len(x), dtype=torch.long)
    together, = torch.autograd.grad(head(x, targets).sum(), head.weight)
    apart = sum(torch.autograd.grad(head(x[i:i + 1], targets[:1]).sum(), head.weight)[0] for i in range(len(x)))
    close(together, apart.numpy(), 1e-12)


@DTYPES
@pytest.mark.parametrize('margin', [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize('sign', [1, -1])
def test_angles_of_exactly_0_and_pi(dtype, margin, sign):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(1, 64, generator=generator, dtype=dtype)
    lengths = torch.logspace(-6, 6, 1000, dtype=dtype)[:, None]
    x = (sign * lengths * W).requires_grad_()
    head = head_with(W, margin=margin)
    logits = head(x, torch.zeros(1000, dtype=torch.long))
    psi = 1 if sign == 1 else -(2 * margin - 1)
    tolerance = 50 * margin ** 2 * torch.finfo(dtype).eps
    ratio = logits / (lengths * W.square().sum())
    torch.testing.assert_close(ratio, torch.full_like(ratio, psi), rtol=tolerance, atol=0)
    # |w| |x| psi has the slope |w| psi along x at both ends, and none across.
    gx, = torch.autograd.grad(logits.sum(), x, retain_graph=True)
    torch.testing.assert_close(gx, (sign * psi * W).expand_as(x), rtol=0, atol=tolerance * 4)
    gW, = torch.autograd.grad((logits / lengths).sum() / 1000, head.weight)
    torch.testing.assert_close(gW, psi * W, rtol=0, atol=tolerance * 40)


@DTYPES
@pytest.mark.parametrize('margin', [1, 2, 3, 4, 5, 6, 7])
def test_psi_falls_from_1_to_1_minus_2m_without_jumps(dtype, margin):
    thetas = torch.linspace(0, math.pi, 2001, dtype=dtype)
    head = head_with(torch.tensor([[1.0, 0.0]], dtype=dtype), margin=margin)
    targets = torch.zeros(2001, dtype=torch.long)
    psi = head(at_angles(thetas), targets)[:, 0]
    assert psi[0].item() == pytest.approx(1) and psi[-1].item() == pytest.approx(1 - 2 * margin, rel=1e-5)
    steps = psi.diff()
    assert steps.max() < 1e-5 and steps.min() > -1.01 * margin * math.pi / 2000


@pytest.mark.parametrize('margin', [2, 3, 4, 5, 6, 7])
def test_psi_and_its_slope_are_continuous_where_k_changes(margin):
    boundaries = torch.arange(1, margin, dtype=torch.float64) * math.pi / margin
    head = head_with(torch.tensor([[1.0, 0.0]], dtype=torch.float64), margin=margin)
    targets = torch.zeros(margin - 1, dtype=torch.long)
    values, slopes = [], []
    for side in (-1e-9, 1e-9):
        x = at_angles(boundaries + side).requires_grad_()
        values.append(head(x, targets)[:, 0])
        slopes.append(torch.autograd.grad(values[-1].sum(), x)[0])
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-6)
    k = torch.arange(1, margin, dtype=torch.float64)
    torch.testing.assert_close(values[0], 1 - 2 * k, rtol=0, atol=1e-10)  # psi(k pi/m)


@DTYPES
@pytest.mark.parametrize('scale', [1e-15, 1e-4, 1.0, 1e15])
def test_the_margin_does_not_depend_on_lengths(dtype, scale):
    generator = np.random.default_rng(0)
    x, W, targets = generator.standard_normal((6, 5)), generator.standard_normal((4, 5)), np.arange(6) % 4
    x, W = torch.tensor(x, dtype=dtype), torch.tensor(W, dtype=dtype)
    logits = head_with(W, margin=4)(scale * x, torch.tensor(targets)) / scale
    expected = oracle(x.double().numpy(), W.double().numpy(), targets, 4, 0.0)[0]
    close(logits, expected, 1e-12 if dtype == torch.float64 else 1e-5)


@DTYPES
@pytest.mark.parametrize('beta', [0.0, 1.0])
def test_zero_feature_and_zero_weight_row(dtype, beta):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(3, 5, generator=generator, dtype=dtype), torch.randn(4, 5, generator=generator, dtype=dtype)
    x[0], W[2] = 0, 0
    targets = torch.tensor([1, 2, 3])
    logits, loss, gx, gW = ours(x, W, targets, margin=4, beta=beta)
    expected, expected_loss = oracle(x.double().numpy(), W.double().numpy(), targets.tolist(), 4, beta)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    close(logits, expected, tolerance)
    assert loss.item() == pytest.approx(expected_loss, rel=tolerance)
    assert gx.isfinite().all() and gW.isfinite().all()
    # Of the target's logit only the share of beta is left, as of a zero vector neither length nor angle has a slope.
    p = torch.softmax(logits[0], dim=0).detach()
    p[1] -= 1
    p[1] *= beta / (1 + beta)
    close(gx[0], (p @ W / 3).numpy(), tolerance)
    zeros = torch.zeros(3, 5, dtype=dtype)
    both_zero = ours(zeros, zeros, torch.tensor([0, 2, 2]), margin=3, beta=beta)
    assert (both_zero[0] == 0).all() and all(tensor.isfinite().all() for tensor in both_zero)


def test_empty_batch_one_image_and_one_class():
    head = LSoftmaxLinear(4, 3)
    x = torch.empty(0, 4, requires_grad=True)
    logits = head(x, torch.empty(0, dtype=torch.long))
    logits.sum().backward()
    assert logits.shape == head.without_margin(logits).shape == (0, 3)
    assert x.grad.shape == (0, 4) and (head.weight.grad == 0).all()
    assert head.eval()(x).shape == (0, 3)

    logits, loss, gx, gW = ours(torch.randn(1, 4), torch.randn(3, 4), torch.tensor([2]), margin=4)
    assert logits.shape == (1, 3) and loss.isfinite() and gx.isfinite().all() and gW.isfinite().all()
    logits, loss, gx, gW = ours(torch.randn(2, 4), torch.randn(1, 4), torch.tensor([0, 0]), margin=4)
    assert logits.shape == (2, 1) and loss == 0 and (gx == 0).all() and (gW == 0).all()


def test_margin_1_is_plain_softmax():
    x, targets = torch.randn(6, 5), torch.arange(6) % 4
    for beta in (0.0, 1.0):
        head = LSoftmaxLinear(5, 4, margin=1, beta=beta)
        torch.testing.assert_close(head(x, targets), F.linear(x, head.weight))


def test_only_the_logit_of_the_target_changes():
    torch.manual_seed(0)
    head, x, targets = LSoftmaxLinear(5, 4, beta=0.0), torch.randn(6, 5), torch.arange(6) % 4
    plain, other = x @ head.weight.t(), F.one_hot(targets, 4) == 0
    logits = head(x, targets)
    torch.testing.assert_close(logits[other], plain[other])
    assert (logits[~other] < plain[~other]).all()


def test_training_needs_the_targets():
    with pytest.raises(ValueError, match='head.features, targets.'):
        LSoftmaxLinear(4, 3)(torch.randn(2, 4))


def test_evaluation_is_plain_with_and_without_targets():
    head, x = LSoftmaxLinear(5, 4, beta=0.0).eval(), torch.randn(6, 5)
    for logits in (head(x), head(x, torch.arange(6) % 4), head(x, targets=None)):
        torch.testing.assert_close(logits, x @ head.weight.t())
    assert head(torch.randn(6, 5).bfloat16()).dtype == torch.float32


def test_accuracy_is_counted_without_the_margin():
    targets = torch.arange(20) % 5
    x = (F.one_hot(targets, 5) + 0.8 * F.one_hot((targets + 1) % 5, 5)).float()  # 39 degrees off, nearest to the target
    head = head_with(torch.eye(5), margin=4)
    logits = head(x.requires_grad_(), targets)
    plain = head.without_margin(logits)
    assert torch.equal(plain, x.detach()) and not plain.requires_grad
    assert (logits.argmax(dim=1) == targets).sum() == 0
    assert (plain.argmax(dim=1) == targets).all()
    F.cross_entropy(logits, targets).backward()  # reading them changed nothing of the graph
    assert torch.equal(copy.deepcopy(head).without_margin(logits), plain)
    logits = head.eval()(x)
    assert torch.equal(head.without_margin(logits), logits)


def test_beta_is_saved_loaded_and_used():
    torch.manual_seed(0)
    x, targets = torch.randn(6, 5), torch.arange(6) % 4
    head = LSoftmaxLinear(5, 4, beta=2.0)
    for _ in range(30):
        head.after_step()
    state = head.state_dict()
    assert set(state) == {'weight', 'beta'} and state['beta'].shape == ()
    assert 'beta' in dict(head.named_buffers()) and [name for name, _ in head.named_parameters()] == ['weight']
    fresh = LSoftmaxLinear(5, 4, beta=100.0)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x, targets), head(x, targets))
    expected = oracle(x.double().numpy(), head.weight.detach().double().numpy(), targets.tolist(), 4, 2 * 0.99 ** 30)[0]
    close(fresh(x, targets), expected, 1e-5)


def test_beta_falls_in_after_step_and_never_in_forward():
    head, x, targets = LSoftmaxLinear(5, 4, beta=8.0, beta_decay=0.5), torch.randn(6, 5), torch.arange(6) % 4
    logits = [head(x, targets) for _ in range(3)]
    with torch.no_grad():
        head(x, targets)
    assert head.beta == 8 and torch.equal(logits[0], logits[2])
    head.after_step()
    assert head.beta == 4 and not torch.equal(head(x, targets), logits[0])
    loss = F.cross_entropy(head(x, targets), targets)
    head.after_step()
    loss.backward()  # beta was needed for it
    assert head.beta == 2 and head.weight.grad.isfinite().all()


def test_beta_counts_as_no_less_than_its_floor():
    torch.manual_seed(0)
    W, x, targets = torch.randn(4, 5), torch.randn(6, 5), torch.arange(6) % 4
    floored, plain = head_with(W, beta=1.0, beta_min=0.5, beta_decay=0.25), head_with(W, beta=1.0, beta_min=0.0)
    assert torch.equal(floored(x, targets), plain(x, targets))
    floored.after_step()
    plain.beta.fill_(0.5)
    assert floored.beta == 0.25 and torch.equal(floored(x, targets), plain(x, targets))


def test_a_large_beta_is_plain_softmax():
    head, x, targets = LSoftmaxLinear(5, 4, beta=1e7), torch.randn(6, 5), torch.arange(6) % 4
    logits = head(x, targets)
    torch.testing.assert_close(logits, head.without_margin(logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('backward_inside', [False, True])
def test_bf16_autocast_changes_neither_logits_nor_gradients(device, backward_inside):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    torch.manual_seed(0)
    W, targets = torch.randn(4, 5, device=device), torch.arange(6, device=device) % 4
    x = W[targets] + 0.02 * torch.randn(6, 5, device=device)  # 1 degree off, which bfloat16 would read as 0

    def logits_and_gradients(x, autocast):
        head, x = head_with(W.to(device), margin=4).to(device), x.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = head(x, targets)
            assert head.without_margin(logits).dtype == torch.float32
            loss = (logits * torch.linspace(-1, 1, 4, device=device)).sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return logits, x.grad, head.weight.grad

    tolerance = dict(rtol=1e-5, atol=1e-5)
    for with_autocast, without in zip(logits_and_gradients(x, True), logits_and_gradients(x, False)):
        assert with_autocast.dtype == torch.float32
        torch.testing.assert_close(with_autocast, without, **tolerance)
    # features that are bfloat16 already
    half = logits_and_gradients(x.bfloat16(), True)
    logits, gx, gW = logits_and_gradients(x.bfloat16().float(), False)
    assert half[0].dtype == torch.float32 and half[1].dtype == torch.bfloat16
    torch.testing.assert_close(half[0], logits, **tolerance)
    torch.testing.assert_close(half[1], gx.bfloat16(), rtol=0.01, atol=1e-3)
    torch.testing.assert_close(half[2], gW, **tolerance)
    with torch.autocast(device, torch.bfloat16):
        assert head_with(W.to(device)).to(device).eval()(x).dtype == torch.float32


def test_the_loss_is_cross_entropy_of_its_head():
    torch.manual_seed(0)
    loss_function = LargeMarginSoftmaxLoss(5, 4, margin=3, beta=2.0, beta_decay=0.5, beta_min=0.75)
    x, targets = torch.randn(6, 5), torch.arange(6) % 4
    loss = loss_function(x, targets)
    assert torch.equal(loss, F.cross_entropy(loss_function.head(x, targets), targets))
    W = loss_function.head.weight.detach().double().numpy()
    for beta in (2.0, 1.0, 0.75, 0.75):
        expected = oracle(x.double().numpy(), W, targets.tolist(), 3, beta)[1]
        assert loss_function(x, targets).item() == pytest.approx(expected, rel=1e-5)
        loss_function.after_step()
    assert loss_function.head.beta == 0.125
    assert [name for name, _ in loss_function.named_parameters()] == ['head.weight']


def test_the_loss_trains_features_of_one_class_towards_each_other():
    torch.manual_seed(0)
    targets = torch.arange(60) % 3
    x = F.one_hot(targets, 3).float() @ torch.randn(3, 8) + 0.3 * torch.randn(60, 8)
    network, loss_function = torch.nn.Linear(8, 4), LargeMarginSoftmaxLoss(4, 3, margin=4, beta=10.0, beta_decay=0.95)
    optimizer = torch.optim.SGD([*network.parameters(), *loss_function.parameters()], lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        loss_function(network(x), targets).backward()
        optimizer.step()
        loss_function.after_step()
    assert (loss_function.head.eval()(network(x)).argmax(dim=1) == targets).float().mean() > 0.95
    assert loss_function.train()(network(x), targets) < 0.3  # with a margin, by then


def test_beta_begins_as_its_schedule_says_where_it_is_not_given():
    for schedule, first in (('position', 1000), ('decay', 100)):
        head = LSoftmaxLinear(4, 3, beta_schedule=schedule)
        head.before_step(0.0)
        assert head.beta == first


@pytest.mark.parametrize('options, message', [
    *((dict(margin=margin), 'margin must be a whole number of at least 1') for margin in (0, -1, 1.5)),
    *((dict(beta=beta), 'beta and its floor must be numbers') for beta in (-1.0, math.nan, math.inf)),
    *((dict(beta_min=beta), 'beta and its floor must be numbers') for beta in (-1.0, math.nan, math.inf)),
    *((dict(beta_decay=decay), 'decay of beta must be between 0 and 1') for decay in (2, -0.1, math.nan))])
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LSoftmaxLinear(4, 3, **options)
    with pytest.raises(ValueError, match=message):
        LargeMarginSoftmaxLoss(4, 3, **options)


def test_the_weight_begins_as_that_of_a_linear_layer():
    torch.manual_seed(0)
    head = LSoftmaxLinear(7, 3)
    torch.manual_seed(0)
    assert torch.equal(head.weight, torch.nn.Linear(7, 3, bias=False).weight) and head.bias is None
    assert head.margin == 4 and head.beta == 100


def test_arguments_make_a_head():
    parser = Parser()
    lsoftmax.add_arguments(parser)
    head = lsoftmax.head(parser.parse_args([]))(7, 3)
    assert (head.margin, head.beta.item(), head.beta_schedule, head.beta_min) == (4, 1000, 'position', 0)
    flags = '--margin 2 --beta-schedule decay --beta 5 --beta-decay 0.5 --beta-min 1'
    head = lsoftmax.head(parser.parse_args(flags.split()))(7, 3)
    assert (head.margin, head.beta.item(), head.beta_decay, head.beta_min) == (2, 5, 0.5, 1)
    assert lsoftmax.head(parser.parse_args(['--beta-schedule', 'decay']))(7, 3).beta == 100
    assert head.weight.shape == (3, 7)


def test_the_file_works_alone(tmp_path):
    shutil.copy(ROOT / 'lsoftmax.py', tmp_path)
    result = subprocess.run([sys.executable, 'lsoftmax.py'], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and 'plain logits' in result.stdout, result.stderr


RIVALS = np.load(ROOT / 'tests/goldens/rivals.npz')


@pytest.mark.parametrize('row', range(3), ids=RIVALS['lambda/names'].tolist())
def test_beta_by_position_is_that_of_the_authors_files(row):
    g = {key.rpartition('/')[2]: RIVALS[key] for key in RIVALS.files if key.startswith('lambda/')}
    gamma, power = g['gamma_u'][row].item(), g['power'][row].item()
    values = [lsoftmax.beta_at(u, 1000.0, gamma, power) for u in g['u'].tolist()]
    np.testing.assert_allclose(values, g['value'][row], rtol=1e-9)
    if row < 2:  # the third configuration has no margin of its own to be chosen by
        parser = Parser()
        lsoftmax.add_arguments(parser)
        flags = ['--margin', str(g['margin'][row]), '--beta-min', '5']
        head = lsoftmax.head(parser.parse_args(flags))(4, 3).double()
        for u, value, floored in zip(g['u'].tolist(), g['value'][row], g['value_min5'][row]):
            head.before_step(u)
            assert head.beta.item() == pytest.approx(value, rel=1e-6)
            x, targets = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
            plain, logits = head.eval()(x), head.train()(x, targets)
            other = LSoftmaxLinear(4, 3, head.margin, beta=floored).double()
            other.load_state_dict({**head.state_dict(), 'beta': torch.tensor(floored)})
            torch.testing.assert_close(logits, other(x, targets), rtol=1e-6, atol=1e-9)
            assert not torch.equal(plain, logits)
            before = head.beta.item()
            head.after_step()
            assert head.beta.item() == before
