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
from torch import nn

import large_margin
from large_margin import LargeMarginLoss, train_epoch
from utils.flags import Parser

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/large_margin.npz')
NORMS, AGGREGATES = (1, 2, math.inf), ('worst', 'sum', 'mean')


def length(gradient, norm):
    """In the dual of the norm that distances are measured in."""
    sizes = [abs(element) for element in gradient.flatten()]
    if norm == 1:
        return max(sizes)
    return sum(sizes) if norm == math.inf else torch.sqrt(sum(size ** 2 for size in sizes))


def oracle(layers_of, x, targets, gamma, alpha, top_k, norm, aggregate, approximate, weights, epsilon=1e-8):
    """The loss by its definition, one sample, class and layer at a time; layers_of(x) is (logits, activations)."""
    total, clipped = 0, set()
    for i, target in enumerate(targets.tolist()):
        logits, activations = layers_of(x[i:i + 1])
        powers = torch.exp(logits[0] - logits[0].max())
        p = powers / powers.sum()
        others = sorted((j for j in range(len(p)) if j != target), key=lambda j: -p[j].item())[:top_k]
        for activation, weight in zip(activations, weights or [1] * len(activations)):
            distances = []
            for j in others:
                gradient, = torch.autograd.grad(p[target] - p[j], activation, create_graph=True)
                size = length(gradient[0], norm)
                distances.append((p[target] - p[j]) / ((size.detach() if approximate else size) / weight + epsilon))
            if aggregate == 'worst':
                distances = [min(distances)]
            losses = []
            for d in distances:
                clipped.add('above' if d > gamma else 'below' if d < gamma * (1 - alpha) else 'inside')
                if d < gamma * (1 - alpha):
                    d = gamma * (1 - alpha)
                losses.append(gamma - d - gamma if d < gamma else 0 - gamma)
            total = total + sum(losses) / (len(losses) if aggregate == 'mean' else 1) / len(activations)
    return total / len(targets), clipped


class SmallNet(nn.Module):
    """No BatchNorm, so that the gradient of a batch is that of each image alone."""

    def __init__(self, classes=4, dtype=torch.float64, activation=torch.relu):
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(1, 2, 2, dtype=dtype)
        self.fc = nn.Linear(8, classes, dtype=dtype)

    def layers(self, x):
        """Logits and [input, hidden layer]."""
        hidden = self.activation(self.conv(x))
        return self.fc(hidden.flatten(1)), [x, hidden]

    def forward(self, x):
        return self.layers(x)[0]


def small_problem(batch=4, classes=4, dtype=torch.float64, sharpness=6.0, **options):
    """A net, images and targets, of which every other is the class that the net gives."""
    torch.manual_seed(0)
    net = SmallNet(classes, dtype, **options)
    x, targets = torch.randn(batch, 1, 3, 3, dtype=dtype), torch.arange(batch) % classes
    with torch.no_grad():
        net.fc.weight *= sharpness
        targets[::2] = net(x).argmax(dim=1)[::2]
    return net, x.requires_grad_(), targets


def close(actual, expected, tolerance=1e-9):
    """Within `tolerance` of the largest element of `expected`."""
    actual, expected = (torch.as_tensor(value).detach().numpy() for value in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max() + 1e-15)


def flat_gradient(loss, tensors):
    """One vector; a tensor that the loss does not depend on counts as zeros."""
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros_like(tensor).flatten() if gradient is None else gradient.flatten()
                      for gradient, tensor in zip(gradients, tensors)])


@pytest.mark.parametrize('approximate', [True, False])
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('aggregate', AGGREGATES)
def test_float64_against_the_plain_loop(norm, aggregate, approximate):
    net, x, targets = small_problem()
    gammas = (10000.0, {1: 0.8, 2: 0.3, math.inf: 0.1}[norm])
    clipped_in_any = set()
    for gamma, top_k, weights in itertools.product(gammas, (1, 2, 3), (None, [0.5, 2.0])):
        logits, activations = net.layers(x)
        loss = LargeMarginLoss(gamma, 2.0, top_k, norm, aggregate, approximate, weights)(logits, targets, activations)
        expected, clipped = oracle(net.layers, x, targets, gamma, 2.0, top_k, norm, aggregate, approximate, weights)
        # With gamma 10000 the paper's gamma - d - gamma has only 12 digits after the point, in float64 as well.
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-11)
        for tensors in (list(net.parameters()), [x]):
            close(flat_gradient(loss, tensors), flat_gradient(expected, tensors))
        assert gamma < 10000 or clipped == {'inside'}
        clipped_in_any |= clipped
    assert clipped_in_any == {'above', 'below', 'inside'}


def golden_layers(params, x):
    shapes = [[int(size) for size in str(shape).split('x')] for shape in GOLDEN['param_shapes']]
    parts = params.split([math.prod(shape) for shape in shapes])
    conv1, bias1, conv2, bias2, fc, bias = (part.reshape(shape) for part, shape in zip(parts, shapes))
    hidden = torch.relu(F.conv2d(x, conv1, bias1, padding=1))
    return F.linear(torch.relu(F.conv2d(hidden, conv2, bias2, stride=2)).flatten(1), fc, bias), [x, hidden]


def on_golden(**options):
    """Loss and its gradients with respect to the parameters and to the input."""
    params, x = (torch.tensor(GOLDEN[key], requires_grad=True) for key in ('params', 'x'))
    logits, activations = golden_layers(params, x)
    loss = LargeMarginLoss(epsilon=float(GOLDEN['epsilon']), **options)(logits, torch.tensor(GOLDEN['y']), activations)
    return loss, *torch.autograd.grad(loss, (params, x))


@pytest.mark.parametrize('row', range(len(GOLDEN['google/loss'])))
def test_golden_of_google(row):
    g = {key: GOLDEN[f'google/{key}'][row] for key in (
        'gamma', 'alpha', 'top_k', 'dist_norm', 'worst_case', 'use_approximation', 'layers_weights', 'loss', 'tf_loss',
        'grads', 'tf_grads', 'grad_x')}
    loss, gradient, gx = on_golden(gamma=g['gamma'], alpha=g['alpha'], top_k=int(g['top_k']), norm=g['dist_norm'],
                                   aggregate='worst' if g['worst_case'] else 'sum',
                                   approximate=bool(g['use_approximation']),
                                   layer_weights=g['layers_weights'].tolist())
    close(loss, g['loss'])
    close(loss, g['tf_loss'])
    close(gradient, g['grads'])
    close(gradient, g['tf_grads'])
    close(gx, g['grad_x'])


# The port's avg_top_k, the mean of the distances before they are clipped, has no counterpart here.
@pytest.mark.parametrize('row', np.flatnonzero(GOLDEN['port/loss_type'] != 'avg_top_k').tolist())
def test_golden_of_the_port(row):
    g = {key: GOLDEN[f'port/{key}'][row] for key in (
        'gamma', 'alpha', 'top_k', 'dist_norm', 'loss_type', 'use_approximation', 'loss', 'grads', 'original_loss',
        'original_grads')}
    loss, gradient, _ = on_golden(gamma=g['gamma'], alpha=g['alpha'], top_k=int(g['top_k']), norm=g['dist_norm'],
                                  aggregate={'all_top_k': 'mean', 'worst_top_k': 'worst'}[str(g['loss_type'])],
                                  approximate=bool(g['use_approximation']))
    close(loss, g['loss'])
    close(loss, g['original_loss'])
    close(gradient, g['grads'])
    if g['use_approximation']:  # without it the original goes on approximating
        close(gradient, g['original_grads'])


@pytest.mark.parametrize('norm', NORMS)
def test_without_approximation_the_loss_is_the_same_and_the_gradient_another(norm):
    (loss, gradient, _), (exact_loss, exact_gradient, _) = (on_golden(norm=norm, approximate=approximate)
                                                            for approximate in (True, False))
    close(loss, exact_loss)
    assert (gradient - exact_gradient).norm() > 0.1 * exact_gradient.norm()


@pytest.mark.parametrize('norm', NORMS)
def test_the_exact_gradient_is_the_slope_of_the_loss(norm):
    net, x, targets = small_problem(activation=torch.tanh)
    weight = net.fc.weight.detach().clone().requires_grad_()

    def loss(weight):
        hidden = torch.tanh(net.conv(x))
        logits = F.linear(hidden.flatten(1), weight, net.fc.bias)
        return LargeMarginLoss(norm=norm, approximate=False, top_k=2, aggregate='sum')(logits, targets, [x, hidden])

    assert torch.autograd.gradcheck(loss, weight)


def two_classes(gap, dtype, **options):
    """Loss of one sample of class 0 whose logit is `gap` above the other's, with the weight, the bias and the sample.

    Then p_y - p_j = tanh(gap/2), with a slope of sech(gap/2)^2 / 2 |w| for w the difference of the weights, and
    d = sinh(gap) / |w|.
    """
    weight = torch.tensor([[3.0, -1.0, 2.0], [-1.0, 0.5, 1.0]], dtype=dtype, requires_grad=True)
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=dtype, requires_grad=True)
    bias = torch.tensor([gap - 5.5, 0.0], dtype=dtype, requires_grad=True)
    loss = LargeMarginLoss(**options)(F.linear(x, weight, bias), torch.tensor([0]), [x])
    return loss, weight, bias, x


W_NORM = math.sqrt(4 ** 2 + 1.5 ** 2 + 1)


@pytest.mark.parametrize('gap', [1e-4, 0.1, 5.0, -2.0])
@pytest.mark.parametrize('approximate', [True, False])
def test_two_classes_in_closed_form(gap, approximate):
    loss, weight, bias, x = two_classes(gap, torch.float64, approximate=approximate, epsilon=1e-30)
    assert -loss.item() == pytest.approx(math.sinh(gap) / W_NORM, rel=1e-9)
    slope = 1 if approximate else math.cosh(gap)
    assert -torch.autograd.grad(loss, bias, retain_graph=True)[0][0].item() == pytest.approx(slope / W_NORM, rel=1e-9)


@pytest.mark.parametrize('aggregate', AGGREGATES)
def test_tiny_distances_are_not_rounded_to_the_precision_of_gamma(aggregate):
    distances = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        W = torch.zeros(2, 5)
        W[0] = 300 * torch.randn(5, generator=generator)
        x = (1e-4 * W[:1] / W[0].norm() * (0.5 + torch.rand(1, generator=generator))).requires_grad_()
        loss = LargeMarginLoss(gamma=10000.0, aggregate=aggregate)(F.linear(x, W), torch.tensor([0]), [x])
        w = W[0].double()
        distances.append(math.sinh((x.detach()[0].double() @ w).item()) / w.norm().item())
        assert -loss.item() == pytest.approx(distances[-1], rel=1e-5)
    assert 4e-5 < min(distances) and max(distances) < 3e-4


@pytest.mark.parametrize('approximate', [True, False])
@pytest.mark.parametrize('gap', [10.0, 20.0, 30.0])
def test_a_saturated_softmax_has_the_right_distance_and_gradient_in_float32(gap, approximate):
    loss, weight, bias, x = two_classes(gap, torch.float32, approximate=approximate, epsilon=1e-30, gamma=1e30)
    assert -loss.item() == pytest.approx(math.sinh(gap) / W_NORM, rel=1e-3)
    gradient, slope = torch.autograd.grad(loss, (weight, bias))
    # d = sinh(gap) / |w|: along the gap, and unless the norm is held constant along w as well
    x, w = x.detach().double()[0], (weight[0] - weight[1]).detach().double()
    expected = x / W_NORM if approximate else math.cosh(gap) * x / W_NORM - math.sinh(gap) * w / W_NORM ** 3
    close(-gradient[0].double(), expected, 1e-3)
    assert -slope[0].item() == pytest.approx((1 if approximate else math.cosh(gap)) / W_NORM, rel=1e-3)


@pytest.mark.parametrize('approximate', [True, False])
@pytest.mark.parametrize('norm', NORMS)
def test_a_saturated_softmax_of_many_classes_in_float32_is_as_in_float64(norm, approximate):
    def loss_and_gradient(dtype):
        torch.manual_seed(0)
        net, x, targets = small_problem(dtype=torch.float64, sharpness=1)
        net, x = net.to(dtype), x.detach().to(dtype).requires_grad_()
        with torch.no_grad():
            net.fc.bias.copy_(torch.tensor([30.0, 1.0, 0.0, -1.0]))
        logits, activations = net.layers(x)
        loss = LargeMarginLoss(gamma=1e30, top_k=2, norm=norm, aggregate='sum', approximate=approximate, epsilon=1e-30)(
            logits, torch.zeros_like(targets), activations)
        gradient = flat_gradient(loss, list(net.parameters())).double()
        return loss.item(), gradient

    loss, gradient = loss_and_gradient(torch.float32)
    expected_loss, expected_gradient = loss_and_gradient(torch.float64)
    assert abs(loss) > 1e8 and loss == pytest.approx(expected_loss, rel=1e-3)
    assert expected_gradient.norm() > 0.1
    close(gradient, expected_gradient, 1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('approximate', [True, False])
@pytest.mark.parametrize('gap', [-30.0, -100.0, -200.0, -1000.0])
def test_confidently_wrong_samples_have_a_finite_loss_and_no_gradient(gap, approximate, dtype):
    loss, *tensors = two_classes(gap, dtype, approximate=approximate, gamma=100.0, alpha=4.0)
    assert loss.item() == pytest.approx(300.0, rel=1e-6)
    assert (flat_gradient(loss, tensors) == 0).all()


@pytest.mark.parametrize('gap', [100.0, 200.0, 1000.0])
@pytest.mark.parametrize('approximate', [True, False])
def test_confidently_right_samples_are_left_alone(gap, approximate):
    loss, *tensors = two_classes(gap, torch.float32, approximate=approximate)
    assert loss.item() == -10000 and (flat_gradient(loss, tensors) == 0).all()


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('gamma', [10000.0, 1e12])  # clipped or not
def test_a_zero_gradient_vector_has_a_finite_loss_and_finite_gradients(norm, gamma):
    net, x, targets = small_problem(classes=3)
    with torch.no_grad():
        net.conv.bias.fill_(-100)  # all ReLUs are dead
        net.fc.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    for approximate in (True, False):
        loss_function = LargeMarginLoss(gamma, norm=norm, approximate=approximate)
        logits, activations = net.layers(x)
        loss = loss_function(logits, targets, [x])
        gradient = flat_gradient(loss, list(net.parameters()))
        assert loss.isfinite() and gradient.isfinite().all()
        assert (gradient != 0).any() == (gamma > 10000)
        loss = loss_function(logits, targets, activations)
        assert loss.isfinite() and flat_gradient(loss, list(net.parameters())).isfinite().all()


@pytest.mark.parametrize('aggregate', AGGREGATES)
def test_top_k_of_all_other_classes_works_and_one_more_does_not(aggregate):
    net, x, targets = small_problem()
    logits, activations = net.layers(x)
    assert LargeMarginLoss(top_k=3, aggregate=aggregate)(logits, targets, activations).isfinite()
    for top_k, classes in ((4, 4), (2, 2), (1, 1)):
        with pytest.raises(ValueError, match=f'at most the number of other classes, {classes - 1}, was given {top_k}'):
            LargeMarginLoss(top_k=top_k, aggregate=aggregate)(logits[:, :classes], targets * 0, activations)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('batch, classes', [(1, 4), (3, 2), (1, 2)])
def test_two_classes_and_one_image(batch, classes, norm):
    net, x, targets = small_problem(batch, classes)
    logits, activations = net.layers(x)
    loss = LargeMarginLoss(norm=norm)(logits, targets, activations)
    expected = oracle(net.layers, x, targets, 10000.0, 4.0, 1, norm, 'worst', True, None)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize('approximate', [True, False])
@pytest.mark.parametrize('aggregate', AGGREGATES)
@pytest.mark.parametrize('norm', NORMS)
def test_empty_batch(norm, aggregate, approximate):
    net, x, targets = small_problem(0)
    logits, activations = net.layers(x)
    loss_function = LargeMarginLoss(norm=norm, aggregate=aggregate, top_k=2, approximate=approximate)
    loss = loss_function(logits, targets, activations)
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == x.shape
    assert all((parameter.grad == 0).all() for parameter in net.parameters())


@pytest.mark.parametrize('shape', [(4,), (4, 1), (4, 1, 1)])
def test_activations_of_any_shape(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    loss = LargeMarginLoss()(x.reshape(4, 1) @ weight, targets, [x])
    expected = oracle(lambda x: (x.reshape(1, 1) @ weight, [x]), x, targets, 10000.0, 4.0, 1, 2, 'worst', True, None)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-11)


def test_activations_that_cannot_have_a_gradient():
    net, x, targets = small_problem()
    loss_function = LargeMarginLoss()
    logits, activations = net.layers(x.detach())
    with pytest.raises(ValueError, match='activations that require grad'):
        loss_function(logits, targets, activations)
    with torch.no_grad():
        with pytest.raises(ValueError, match='outside of torch.no_grad'):
            loss_function(*(net(x), targets), [x])
    logits, activations = net.layers(x)
    other = torch.randn(4, 3, requires_grad=True)
    for wrong in ([other], [x, other], [x.detach().requires_grad_()]):
        with pytest.raises(ValueError, match='do not depend on'):
            loss_function(logits, targets, wrong)
    with pytest.raises(ValueError, match='at least one activation'):
        loss_function(logits, targets, [])
    for weights in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match=f'a layer weight for each, was given 2 and {len(weights)}'):
            LargeMarginLoss(layer_weights=weights)(logits, targets, activations)


def test_layers_weighed_by_their_elements():
    """As the sum over layers of a loss for each layer, with that layer's number of elements as its weight."""
    params, x = (torch.tensor(GOLDEN[key], requires_grad=True) for key in ('params', 'x'))
    logits, activations = golden_layers(params, x)
    targets, gamma = torch.tensor(GOLDEN['y']), 100.0
    losses = [LargeMarginLoss(gamma, norm='inf', layer_weights=[tensor[0].numel()])(logits, targets, [tensor])
              for tensor in activations]
    loss = LargeMarginLoss(gamma, norm='inf', layer_weights='elements')(logits, targets, activations)
    assert len(losses) > 1 and len({tensor[0].numel() for tensor in activations}) > 1
    close(loss, sum(losses) / len(losses))
    assert abs(loss - LargeMarginLoss(gamma, norm='inf')(logits, targets, activations)) > 1e-3


@pytest.mark.parametrize('options, message', [
    *((dict(gamma=gamma), 'gamma and alpha must be numbers above 0') for gamma in (0, -1.0, math.nan, math.inf)),
    *((dict(alpha=alpha), 'gamma and alpha must be numbers above 0') for alpha in (0, -1, math.nan, math.inf)),
    *((dict(epsilon=epsilon), 'epsilon a number of at least 0') for epsilon in (-1e-8, math.nan)),
    *((dict(norm=norm), 'norm must be 1, 2 or inf') for norm in (3, '3', 'two', None, 0, math.nan, -math.inf)),
    *((dict(aggregate=aggregate), 'aggregate must be') for aggregate in ('x', None)),
    *((dict(top_k=top_k), 'top_k must be a whole number of at least 1') for top_k in (0, 1.5, -1)),
    *((dict(layer_weights=weights), 'layer_weights must be numbers above 0')
      for weights in ([1, 0], [-1.0], [math.nan]))])
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LargeMarginLoss(**options)


@pytest.mark.parametrize('norm', NORMS)
def test_norm_may_be_a_word(norm):
    net, x, targets = small_problem()
    logits, activations = net.layers(x)
    losses = [LargeMarginLoss(norm=name)(logits, targets, activations).item()
              for name in (norm, str(norm), float(norm))]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize('approximate', [True, False])
@pytest.mark.parametrize('norm', NORMS)
def test_channels_last_gives_the_same(norm, approximate):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
        net = net.double().to(memory_format=memory_format)
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        hidden = net[:2](x)
        assert hidden.is_contiguous(memory_format=memory_format)
        loss = LargeMarginLoss(norm=norm, approximate=approximate, top_k=2, aggregate='sum')(
            net[2:](hidden), torch.tensor([0, 2]), [x, hidden])
        results.append((loss, flat_gradient(loss, list(net.parameters()))))
    close(results[1][0], results[0][0], 1e-12)
    close(results[1][1], results[0][1], 1e-11)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('inside', [True, False])
def test_bf16_autocast_is_close(device, norm, inside):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    net, x, targets = small_problem(32, dtype=torch.float32, sharpness=2.0, activation=torch.tanh)
    net, x, targets = net.to(device), x.detach().to(device).requires_grad_(), targets.to(device)
    loss_function, results = LargeMarginLoss(norm=norm, top_k=2, aggregate='mean'), []
    for enabled in (True, False):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            logits, activations = net.layers(x)
            loss = loss_function(logits, targets, activations) if inside else None
        loss = loss_function(logits, targets, activations) if loss is None else loss
        assert loss.dtype == torch.float32
        results.append((logits, loss, flat_gradient(loss, list(net.parameters()))))
    (logits, loss, gradient), (_, expected_loss, expected_gradient) = results
    assert logits.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.05)
    assert gradient.isfinite().all() and (gradient - expected_gradient).norm() < 0.05 * expected_gradient.norm()


@pytest.mark.parametrize('approximate', [True, False])
def test_bf16_autocast_around_the_loss_alone_changes_nothing(approximate):
    net, x, targets = small_problem(32, dtype=torch.float32, activation=torch.tanh)
    results = []
    for enabled in (True, False):
        logits, activations = net.layers(x)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss = LargeMarginLoss(top_k=2, aggregate='mean', approximate=approximate)(logits, targets, activations)
        results.append((loss, flat_gradient(loss, list(net.parameters()))))
    close(results[0][0], results[1][0], 1e-6)
    close(results[0][1], results[1][1], 1e-6)


def test_the_gradients_of_the_parameters_are_those_of_the_loss_and_nothing_else():
    net, x, targets = small_problem()
    for approximate in (True, False):
        net.zero_grad()
        x.grad = None
        logits, activations = net.layers(x)
        loss = LargeMarginLoss(top_k=3, aggregate='mean', approximate=approximate)(logits, targets, activations)
        assert x.grad is None and all(parameter.grad is None for parameter in net.parameters())
        expected = torch.autograd.grad(loss, (x, *net.parameters()), retain_graph=True, allow_unused=True)
        loss.backward()
        for parameter, gradient in zip((x, *net.parameters()), expected):
            if gradient is None:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, gradient)


def test_a_step_along_the_gradient_makes_distances_larger():
    net, x, targets = small_problem()
    loss_function = LargeMarginLoss(top_k=2)
    before = loss_function(*(net(x), targets), [x])
    before.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.001 * parameter.grad
    assert loss_function(*(net(x), targets), [x]) < before


def arguments(line=''):
    parser = Parser()
    large_margin.add_arguments(parser)
    return parser.parse_args(line.split())


def test_arguments_make_a_loss_term_that_takes_tuples_too():
    net, x, targets = small_problem()
    logits, activations = net.layers(x)
    term = large_margin.loss_term(arguments())
    expected = LargeMarginLoss()(logits, targets, activations).item()
    assert term(logits, targets, activations).item() == expected
    assert term((logits, torch.zeros(4, 7)), targets, activations).item() == expected

    args = arguments('--large-margin-coef 0.5 --large-margin-gamma 0.3 --large-margin-alpha 2 --top-k 2 --norm inf '
                     '--aggregate sum --layer-weights 0.5 2 --large-margin-layers input conv --exact '
                     '--cross-entropy-weight 0.25')
    loss = large_margin.loss_term(args)((logits, None), targets, activations)
    expected = 0.5 * oracle(net.layers, x, targets, 0.3, 2, 2, math.inf, 'sum', False, [0.5, 2.0])[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    close(flat_gradient(loss, list(net.parameters())), flat_gradient(expected, list(net.parameters())))
    assert large_margin.layers(args) == ['input', 'conv'] and large_margin.cross_entropy_weight(args) == 0.25
    assert large_margin.layers(arguments()) == ['input'] and large_margin.cross_entropy_weight(arguments()) == 0


def easy_batches():
    """Four classes around four points, 20 batches of 20."""
    generator = torch.Generator().manual_seed(0)
    centres, targets = 2 * torch.randn(4, 6, generator=generator), torch.arange(400) % 4
    images = centres[targets] + 0.3 * torch.randn(400, 6, generator=generator)
    return list(zip(images.split(20), targets.split(20)))


@pytest.mark.parametrize('options', [{}, dict(approximate=False, gamma=1.0),
                                     dict(top_k=3, aggregate='mean', norm='inf')])
def test_train_epoch_learns(options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    shares = [train_epoch(model, easy_batches(), optimizer, LargeMarginLoss(**options)) for _ in range(5)]
    assert model.training and shares[0] < shares[-1] and shares[-1] > 0.95


def test_train_epoch_counts_before_each_step():
    model, (batch, *_) = nn.Linear(6, 4), easy_batches()
    with torch.no_grad():
        right = (model(batch[0]).argmax(dim=1) == batch[1]).float().mean().item()
    share = train_epoch(model, [batch], torch.optim.SGD(model.parameters(), lr=1.0), LargeMarginLoss())
    assert share == pytest.approx(right)


def test_train_epoch_steps_along_the_loss_of_each_batch_alone():
    torch.manual_seed(0)
    model, batches = nn.Linear(6, 4), easy_batches()[:3]
    expected = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    train_epoch(model, [(images.clone(), targets) for images, targets in batches],
                torch.optim.SGD(model.parameters(), lr=0.1), LargeMarginLoss())
    for images, targets in batches:
        images = images.clone().requires_grad_()
        loss = LargeMarginLoss()(F.linear(images, *expected), targets, [images])
        for parameter, gradient in zip(expected, torch.autograd.grad(loss, expected)):
            parameter.data -= 0.1 * gradient
    for parameter, value in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter, value)


def test_train_epoch_leaves_the_images_as_they_were():
    model, batches = nn.Linear(6, 4), easy_batches()
    before = [images.clone() for images, _ in batches]
    train_epoch(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), LargeMarginLoss())
    for (images, _), expected in zip(batches, before):
        assert torch.equal(images, expected) and not images.requires_grad and images.grad is None


def test_the_file_works_alone_and_learns(tmp_path):
    shutil.copy(ROOT / 'large_margin.py', tmp_path)
    result = subprocess.run([sys.executable, 'large_margin.py'], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split('test accuracy ')[1].rstrip('%\n')) > 85
