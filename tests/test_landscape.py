"""The loss as a function of the weights, against plain loops, the network itself, and recorded values."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import cifar as models
from smoothout import batch_norm_parameters, filter_normalized
from helpers import Fixed, same, sharpness_golden
from utils.lab.landscape import Landscape
from utils.metrics import Predictions

GOLDEN, landscape_of = sharpness_golden()


def network(seed=0, dtype=torch.float64):
    """Convolutions, BatchNorm with statistics that were seen, an in-place ReLU, pooling, dropout, and no bias here and
    there.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                        nn.MaxPool2d(2), nn.Flatten(),
                        nn.Dropout(0.5), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 6)).to(dtype)
    for _ in range(3):
        net(torch.randn(16, 3, 6, 6, dtype=dtype))
    return net


def images(sizes=(7, 7, 3), classes=6, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Fixed([(torch.randn(n, 3, 6, 6, dtype=dtype, generator=generator),
                   torch.randint(classes, (n,), generator=generator))
                  for n in sizes], classes)


def together(batches):
    return torch.cat([inputs for inputs, _ in batches]), batches.labels


def loss_by_loop(net, inputs, targets):
    """Cross-entropy, one image and one class at a time."""
    total = 0.0
    with torch.no_grad():
        for image, target in zip(inputs, targets.tolist()):
            logits = net(image[None])[0].tolist()
            total += math.log(math.fsum(math.exp(logit) for logit in logits)) - logits[target]
    return total / len(targets)


def test_the_vector_is_the_parameters_in_order_and_the_model_is_left_alone():
    net = network()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    landscape = Landscape(net, images())
    assert torch.equal(landscape.weights, nn.utils.parameters_to_vector(net.parameters()).detach())
    tensors = landscape.tensors(landscape.weights)
    assert all(torch.equal(tensors[name], p) for name, p in net.named_parameters())
    moved = landscape.weights + 1
    landscape.measure(moved)
    landscape.loss_and_gradient(moved)
    landscape.hessian_product(torch.ones_like(moved))
    landscape.estimated_buffers(landscape.batches, moved)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in landscape.buffers.items())
    assert all(p.grad is None for p in net.parameters()) and not any(module.training for module in net.modules())
    assert [m.momentum for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [0.1, 0.1]
    assert torch.equal(state, torch.get_rng_state())


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 100), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
       scale=st.sampled_from([0.0, 0.1, 2.0]))
def test_loss_by_loop_at_any_weights_whatever_the_batches(seed, sizes, scale):
    net, batches = network(seed), images(sizes, seed=seed)
    landscape = Landscape(net, batches)
    weights = landscape.weights + scale * torch.randn(len(landscape.weights), dtype=torch.float64,
                                                      generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(net).eval()
    nn.utils.vector_to_parameters(weights, other.parameters())
    inputs, targets = together(batches)
    measured, (loss, gradient) = landscape.measure(weights), landscape.loss_and_gradient(weights)
    assert measured['Loss'] == pytest.approx(loss_by_loop(other, inputs, targets), rel=1e-12)
    assert loss.item() == pytest.approx(measured['Loss'], rel=1e-12) and loss.dtype == torch.float64
    assert measured['Top-1'] == pytest.approx(100 * (other(inputs).argmax(dim=1) == targets).double().mean().item())
    expected = torch.autograd.grad(F.cross_entropy(other(inputs), targets), list(other.parameters()))
    torch.testing.assert_close(gradient, nn.utils.parameters_to_vector(expected), rtol=1e-10, atol=1e-13)


def test_the_hessian_is_the_slope_of_the_gradient():
    landscape, h = Landscape(network(), images()), 1e-6
    v = torch.randn(len(landscape.weights), dtype=torch.float64)
    above, below = (landscape.loss_and_gradient(landscape.weights + sign * h * v)[1] for sign in (1, -1))
    torch.testing.assert_close(landscape.hessian_product(v), (above - below) / (2 * h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('arch', ['resnet', 'lenet', 'shallow', 'densenet', 'mlp', 'vgg11_bn'])
def test_it_measures_what_the_network_itself_says(arch):
    torch.manual_seed(0)
    net = models.build(arch, 10, **{'resnet': {'depth': 8}, 'densenet': {'depth': 10}}.get(arch, {}))
    net = net.eval().to(memory_format=torch.channels_last)
    batches = Fixed([(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last),
                      torch.randint(10, (4,)))], 10)
    landscape, counted = Landscape(net, batches), Predictions(1, 10, 'cpu')
    landscape.measure(meter=counted)
    with torch.no_grad():
        torch.testing.assert_close(counted.probabilities[0], torch.softmax(net(batches[0][0]), dim=1))
    v, u = (torch.randn(len(landscape.weights)) for _ in range(2))
    products = [(a @ landscape.hessian_product(b)).item() for a, b in ((u, v), (v, u), (v, v))]
    assert products[0] == pytest.approx(products[1], abs=1e-3 * abs(products[2]))  # symmetric, to the digits of fp32


def test_bf16_and_float64():
    batches = images(dtype=torch.float32)
    net = network(dtype=torch.float32)
    full, low = Landscape(net, batches).measure()['Loss'], Landscape(net, batches, 'bf16').measure()['Loss']
    double = Landscape(copy.deepcopy(net).double(), batches, 'fp64').measure()['Loss']
    assert double != full == pytest.approx(double, rel=1e-6) and low != full == pytest.approx(low, rel=0.02)


@pytest.mark.parametrize('name', ['master', 'slave'])
def test_golden_loss_and_gradient(name):
    landscape = landscape_of(name)
    loss, gradient = landscape.loss_and_gradient(landscape.weights)
    assert loss.item() == pytest.approx(float(GOLDEN[f'{name}/f0']), rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(GOLDEN[f'{name}/grad0']), rtol=1e-10, atol=1e-14)


def test_golden_profile_along_a_filter_normalised_direction():
    landscape = landscape_of('master')
    raw, direction = (landscape.tensors(torch.tensor(GOLDEN[f'profile/{name}'])) for name in ('raw', 'direction'))
    for name, weight in landscape.tensors(landscape.weights).items():
        ours = filter_normalized(raw[name], weight)  # which adds 1e-6 to lengths that are 0.01 and more
        torch.testing.assert_close(ours, direction[name], rtol=2e-4, atol=0)
    for alpha, loss in zip(GOLDEN['profile/alpha'], GOLDEN['profile/loss']):
        moved = landscape.weights + alpha * torch.tensor(GOLDEN['profile/direction'])
        assert landscape.measure(moved)['Loss'] == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize('batch_norm', [False, True])
@pytest.mark.parametrize('noise', ['uniform', 'normal'])
@pytest.mark.parametrize('adapt', ['none', 'weight', 'filter'])
def test_noise_is_that_of_smoothout_and_spares_batch_norm(noise, adapt, batch_norm):
    net = network()
    landscape = Landscape(net, images())
    drawn = landscape.noise(torch.Generator().manual_seed(3), noise, adapt, batch_norm)
    assert torch.equal(drawn, landscape.noise(torch.Generator().manual_seed(3), noise, adapt, batch_norm))
    spared, pieces = {id(p) for p in batch_norm_parameters(net)}, landscape.tensors(drawn)
    for name, p in net.named_parameters():
        if id(p) in spared and not batch_norm:
            assert not pieces[name].any()
        elif adapt == 'filter':
            axes = tuple(range(1, p.dim()))
            lengths = [torch.linalg.vector_norm(t, dim=axes) if axes else t.abs() for t in (pieces[name], p)]
            torch.testing.assert_close(*lengths, rtol=1e-3, atol=1e-4)
        elif adapt == 'weight' and noise == 'uniform':
            assert (pieces[name].abs() <= p.abs()).all() and pieces[name].abs().sum() >= 0.2 * p.abs().sum()
        elif adapt == 'none':
            assert (pieces[name].abs().max() <= 1) == (noise == 'uniform') or p.numel() < 100
            assert pieces[name].unique().numel() == p.numel()


@pytest.mark.parametrize('sizes', [(16,), (8, 8), (7, 7, 2)])
def test_statistics_are_estimated_as_the_mean_over_batches(sizes):
    net = network()
    landscape, batches = Landscape(net, images(sizes)), images(sizes)
    moved = landscape.weights * 1.5
    buffers = landscape.estimated_buffers(batches, moved)
    other = copy.deepcopy(net).eval()
    nn.utils.vector_to_parameters(moved, other.parameters())
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for inputs, targets in batches:
        with torch.no_grad():
            values = other[0](inputs).transpose(0, 1).flatten(1)
        mean += values.mean(dim=1) * len(targets) / sum(sizes)
        variance += values.var(dim=1) * len(targets) / sum(sizes)
    torch.testing.assert_close(buffers['1.running_mean'], mean)
    torch.testing.assert_close(buffers['1.running_var'], variance)
    assert not torch.equal(buffers['7.running_mean'], landscape.buffers['7.running_mean'])
    # no dropout in it
    assert torch.equal(buffers['1.running_mean'], landscape.estimated_buffers(batches, moved)['1.running_mean'])


def test_without_batch_norm_there_is_nothing_to_estimate():
    landscape = landscape_of('master')
    assert landscape.estimated_buffers(pytest.fail, landscape.weights) == {}


def test_an_error_on_the_way_leaves_the_layers_in_evaluation():
    net = network()
    landscape = Landscape(net, images())
    with pytest.raises(RuntimeError):
        landscape.estimated_buffers([(torch.zeros(2, 1, 6, 6, dtype=torch.float64), torch.zeros(2))])
    assert not any(module.training for module
                   in net.modules()) and net[1].momentum == 0.1 and same(net, Landscape(net, images()).model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_on_cuda_as_on_the_cpu():
    net, batches = network(), images()
    cpu = Landscape(copy.deepcopy(net), batches)
    cuda = Landscape(net.cuda(), Fixed([(inputs.cuda(), targets.cuda()) for inputs, targets in batches], 6))
    v = torch.randn(len(cpu.weights), dtype=torch.float64)
    assert cuda.measure()['Loss'] == pytest.approx(cpu.measure()['Loss'], rel=1e-10)
    torch.testing.assert_close(cuda.hessian_product(v.cuda()).cpu(), cpu.hessian_product(v), rtol=1e-8, atol=1e-10)
