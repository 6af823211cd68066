"""Derivatives of the losses beyond the first, and torch.func, against differences of first derivatives and plain loops.

All in float64, at points away from where the losses have a kink.
"""
import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from dma import DMA_Linear, dma_loss, half_squared_angle
from large_margin import LargeMarginLoss
from lsoftmax import LSoftmaxLinear
from utils.activations import Activations

TARGETS = torch.tensor([0, 1, 2, 0, 1])
DMA, LSOFTMAX = DMA_Linear(4, 3, bias=False), LSoftmaxLinear(4, 3, margin=4)
KINDS = ('dma x', 'dma_loss', 'lsoftmax x', 'lsoftmax weight')


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dma_of(x, weight, targets=TARGETS):
    logits, cosine = functional_call(DMA, {'weight': weight}, (x,))
    return F.cross_entropy(logits, targets) + 0.5 * dma_loss(cosine)


def lsoftmax_of(x, weight, targets=TARGETS, beta=0.5):
    tensors = {'weight': weight, 'beta': torch.as_tensor(beta, dtype=torch.float64)}
    return F.cross_entropy(functional_call(LSOFTMAX, tensors, (x, targets)), targets)


def function_and_point(kind):
    x, weight = draw(5, 4), draw(3, 4, seed=1)
    return {'dma x': (lambda x: dma_of(x, weight), x), 'dma_loss': (dma_loss, torch.tanh(draw(5, 3))),
            'lsoftmax x': (lambda x: lsoftmax_of(x, weight), x),
            'lsoftmax weight': (lambda weight: lsoftmax_of(x, weight), weight)}[kind]


def first(f, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def differences(f, x, step=1e-5):
    """The Hessian (n, n) of f at x, one entry of x after the other."""
    columns = []
    for index in range(x.numel()):
        moved = torch.zeros(x.numel(), dtype=x.dtype)
        moved[index] = step
        moved = moved.view_as(x)
        columns.append((first(f, x + moved) - first(f, x - moved)).flatten() / (2 * step))
    return torch.stack(columns)


def assert_close(actual, expected, tolerance=1e-7):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize('kind', KINDS)
def test_hessian_in_every_mode(kind):
    f, x = function_and_point(kind)
    expected, size = differences(f, x), x.numel()
    assert_close(torch.autograd.functional.hessian(f, x).view(size, size), expected)
    assert_close(hessian(f)(x).view(size, size), expected)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(f))(x).view(size, size), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_gradcheck_and_gradgradcheck(kind):
    f, x = function_and_point(kind)
    x.requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True)


@pytest.mark.parametrize('kind', KINDS)
def test_gradient_penalty(kind):
    f, x = function_and_point(kind)

    def penalty(x):
        return torch.autograd.grad(f(x), x, create_graph=True)[0].square().sum()

    assert_close(first(penalty, x).flatten(), 2 * differences(f, x) @ first(f, x).flatten())


@pytest.mark.parametrize('kind', KINDS)
def test_grad_jvp_and_third_derivatives_of_torch_func(kind):
    f, x = function_and_point(kind)
    direction = draw(*x.shape, seed=2)
    assert torch.equal(grad(f)(x), first(f, x))
    assert_close(jvp(f, (x,), (direction,))[1], (first(f, x) * direction).sum())

    def along(t):
        return f(x + t * direction)

    at = torch.zeros((), dtype=torch.float64)
    second, step = grad(grad(along)), 1e-4
    third = (second(at + step) - second(at - step)) / (2 * step)
    assert_close(grad(second)(at), third, 1e-5)
    assert_close(jacfwd(jacfwd(jacfwd(along)))(at), third, 1e-5)


@pytest.mark.parametrize('loss', [dma_of, lsoftmax_of])
def test_vmap_as_a_plain_loop(loss):
    x, weight, weights = draw(5, 4), draw(3, 4), draw(6, 3, 4, seed=3)
    of_one = grad(lambda weight, image, target: loss(image[None], weight, target[None]))
    per_image = vmap(of_one, in_dims=(None, 0, 0))(weight, x, TARGETS)
    assert_close(per_image, torch.stack([of_one(weight, *pair) for pair in zip(x, TARGETS)]))
    of_weight = grad(lambda weight: loss(x, weight))
    assert_close(vmap(of_weight)(weights), torch.stack([of_weight(weight) for weight in weights]))
    targets = torch.stack([TARGETS, TARGETS.flip(0), (TARGETS + 1) % 3])
    of_targets = grad(lambda weight, targets: loss(x, weight, targets))
    assert_close(vmap(of_targets, in_dims=(None, 0))(weight, targets),
                 torch.stack([of_targets(weight, row) for row in targets]))


def test_vmap_over_beta():
    x, weight, betas = draw(5, 4), draw(3, 4), torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    of_beta = grad(lambda weight, beta: lsoftmax_of(x, weight, beta=beta))
    assert_close(vmap(of_beta, in_dims=(None, 0))(weight, betas),
                 torch.stack([of_beta(weight, beta) for beta in betas]))


def test_jacobian_and_hessian_of_logits():
    x, weight = draw(5, 4), draw(3, 4, seed=1)
    head = LSoftmaxLinear(4, 3, beta=0.5).double()

    def logits(weight):
        return functional_call(head, {'weight': weight}, (x, TARGETS))

    assert_close(jacrev(logits)(weight), jacfwd(logits)(weight))
    assert_close(jacrev(jacrev(logits))(weight), hessian(logits)(weight))
    copied = copy.deepcopy(head)  # which has seen tensors that exist inside of torch.func only
    torch.save(head, io.BytesIO())
    assert torch.equal(copied.weight, head.weight)


@pytest.mark.parametrize('order', [1, 2, 3, 4, 5])
def test_every_derivative_of_the_angle_against_its_series(order):
    """f = sum over k of (2 u)^k / (k^2 (2k choose k)) with u = 1 - c, each term differentiated by hand."""
    for cosine in (1.0, 1 - 1e-12, 0.99, 0.7, 0.51, 0.49, 0.2, 0.0, -0.3):
        u, expected = 1 - cosine, 0.0
        for k in range(order, 400):
            factor = 2.0 ** k / (k * k * math.comb(2 * k, k))
            expected += (-1) ** order * factor * math.perm(k, order) * u ** (k - order)
        point = torch.tensor(cosine, dtype=torch.float64)
        assert half_squared_angle(point, order).item() == pytest.approx(expected, rel=1e-11)
        f = half_squared_angle
        for _ in range(order):
            f = grad(f)
        assert f(point).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_second_derivatives_are_finite_for_parallel_antiparallel_and_zero_vectors(dtype):
    weight = draw(3, 4).to(dtype)
    x = torch.stack([2 * weight[0], -weight[1], torch.zeros(4, dtype=dtype), draw(4).to(dtype), 3 * weight[1]])
    for f in (lambda x: dma_of(x, weight), lambda x: lsoftmax_of(x, weight.double())):
        assert hessian(f)(x).isfinite().all() and torch.autograd.functional.hessian(f, x).isfinite().all()
    weight[1] = 0
    assert hessian(lambda weight: lsoftmax_of(x.double(), weight))(weight.double()).isfinite().all()


# LargeMarginLoss. It takes gradients itself, so torch.func can differentiate it in reverse mode only.

def margin_loss(approximate, top_k=1, aggregate='worst', norm=2):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    for seed, p in enumerate(model.parameters()):
        p.data = draw(*p.shape, seed=seed)
    loss = LargeMarginLoss(gamma=10.0, top_k=top_k, aggregate=aggregate, approximate=approximate, norm=norm)
    return lambda x: loss(model(x), TARGETS, [x]), model


@pytest.mark.parametrize('options', [{}, {'top_k': 2, 'aggregate': 'sum'}, {'top_k': 2, 'norm': 'inf'}, {'norm': 1}])
def test_large_margin_hessian_if_exact(options):
    f, _ = margin_loss(False, **options)
    x = draw(5, 4)
    expected = differences(f, x)
    assert_close(torch.autograd.functional.hessian(f, x).view(20, 20), expected)
    assert_close(jacrev(jacrev(f))(x).view(20, 20), expected)
    assert torch.equal(grad(f)(x), first(f, x))
    with pytest.raises((RuntimeError, ValueError)):  # refused, not wrong
        jvp(f, (x,), (x,))
    with pytest.raises((RuntimeError, ValueError)):
        jacfwd(jacrev(f))(x)


def test_large_margin_hessian_of_the_approximation_has_constant_norms():
    f, model = margin_loss(True)
    x = draw(5, 4)
    norms, nearest = [], []
    for image, target in zip(x, TARGETS):
        candidates = []
        for j in range(3):
            if j != target:
                image = image.detach().requires_grad_()
                p = torch.softmax(model(image), dim=0)
                gradient, = torch.autograd.grad(p[target] - p[j], image)
                candidates.append((p[j].item(), j, gradient.norm()))
        _, j, norm = max(candidates)
        norms.append(norm + 1e-8)
        nearest.append(j)

    def surrogate(x):
        total = 0
        for image, target, j, norm in zip(x, TARGETS, nearest, norms):
            p = torch.softmax(model(image), dim=0)
            total = total - (p[target] - p[j]) / norm / len(x)
        return total

    assert_close(first(f, x), first(surrogate, x))
    assert_close(torch.autograd.functional.hessian(f, x).view(20, 20), differences(surrogate, x))


def test_images_that_require_a_gradient_get_it_through_a_loss_at_the_input():
    """A layer `input` once cut the images of the user off the graph."""
    f, model = margin_loss(False)
    read, x = Activations(model, ['input']).read, draw(5, 4).requires_grad_()
    loss = LargeMarginLoss(gamma=10.0, approximate=False)
    actual, = torch.autograd.grad(loss(model(x), TARGETS, read()), x)
    assert torch.equal(actual, first(f, x))
