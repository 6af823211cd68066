import copy
import functools
import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amp import AMP
from baselines.sam import SAM

GOLDEN = np.load(pathlib.Path(__file__).parent / 'goldens/rivals.npz')


def network(name, flat):
    """The networks of the recorded values, with the parameters `flat`."""
    layers = [nn.Linear(4, 6), *([nn.LayerNorm(6, eps=1e-5)] if name == 'mlpln' else []), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    nn.utils.vector_to_parameters(torch.tensor(flat), model.parameters())
    return model


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()
    return closure


def configurations(part):
    columns = {key.split('/cfg_')[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f'{part}/cfg_')}
    return [{name: column[row].item() for name, column in columns.items()} for row in range(len(columns['names']))]


def close(actual, expected):
    """Within 1e-9 of the largest, and within what float64 rounds weights by, as processors differ in that."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=max(1e-9 * np.abs(expected).max(), 1e-15))


@pytest.mark.parametrize('c', configurations('sam'), ids=lambda c: c['names'])
def test_golden(c):
    g = {key.rpartition('/')[2]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f'sam/{c["names"]}/')}
    model = network(c['model'], g['params'][0])
    named = [str(name) for name in GOLDEN[f'sam/{c["model"]}/param_names']]
    unscaled = [p for name, p in zip(named, model.parameters()) if 'weight' not in name]
    optimizer = SAM(model.parameters(), lr=c['lr'], rho=c['rho'], adaptive=c['adaptive'], eta=c['eta'],
                    unscaled=unscaled if c['impl'] == 'samsung' else (), momentum=c['momentum'],
                    weight_decay=c['weight_decay'], nesterov=c['nesterov'])
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(flat(model).copy()))
    for step in range(3):
        x, y = (torch.tensor(GOLDEN[f'sam/{c["model"]}/{name}'][step]) for name in 'xy')
        loss = optimizer.step(closure_of(model, optimizer, x, y))
        close(loss.numpy(), g['loss1'][step])
        close(passes[-1] - g['params'][step], g['eps'][step])
        if c['rho']:
            close(torch.cat([p.grad.flatten() for p in model.parameters()]).numpy(), g['grad2'][step])
        close(flat(model), g['params'][step + 1])
        buffers = [optimizer.state[p]['momentum_buffer'].flatten() for p in model.parameters()]
        close(torch.cat(buffers).numpy(), g['momentum_buffer'][step])


@pytest.mark.parametrize('c', [c for c in configurations('msam') if c['momentum'] != 0], ids=lambda c: c['names'])
def test_momentum_golden(c):
    """But for AdamW with weight decay, which torch applies before the step and the authors' code after it."""
    g = {key.rpartition('/')[2]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f'msam/{c["names"]}/')}
    model = network(c['model'], g['params_clean'][0])
    adamw = c['base'] == 'adamw'
    options = {'base_optimizer': torch.optim.AdamW} if adamw else {'momentum': c['momentum']}
    optimizer = SAM(model.parameters(), lr=c['lr'], rho=c['rho'], direction='momentum',
                    weight_decay=c['weight_decay'], **options)
    check = close if not adamw else lambda actual, expected: np.testing.assert_allclose(actual, expected, atol=1e-5)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(flat(model).copy()))
    for step in range(3):
        x, y = (torch.tensor(GOLDEN[f'sam/{c["model"]}/{name}'][step]) for name in 'xy')
        loss = optimizer.step(closure_of(model, optimizer, x, y))
        check(passes[-1], g['params_stored'][step])
        check(loss.numpy(), g['loss'][step])
        check(flat(model), g['params_clean'][step + 1])
    assert len(passes) == 3


@pytest.mark.parametrize('adaptive, eta', [(False, 0.0), (True, 0.0), (True, 0.01)])
def test_two_steps_of_a_plain_loop(adaptive, eta):
    """f(w) = w_1^4 + 3 w_1 w_2 + w_2^2, whose gradient anyone can check, with momentum 0.5 and weight decay 0.1."""
    w = nn.Parameter(torch.tensor([1.5, -0.5], dtype=torch.float64))
    optimizer = SAM([w], lr=0.01, rho=0.3, adaptive=adaptive, eta=eta, momentum=0.5, weight_decay=0.1)

    def closure():
        optimizer.zero_grad()
        (w[0] ** 4 + 3 * w[0] * w[1] + w[1] ** 2).backward()

    def gradient(a, b):
        return [4 * a ** 3 + 3 * b, 3 * a + 2 * b]

    expected, velocity = [1.5, -0.5], [0.0, 0.0]
    for _ in range(2):
        t = [abs(value) + eta if adaptive else 1.0 for value in expected]
        g = gradient(*expected)
        length = math.sqrt(sum((s * slope) ** 2 for s, slope in zip(t, g)))
        worst = gradient(*[value + 0.3 * s ** 2 * slope / length for value, s, slope in zip(expected, t, g)])
        velocity = [0.5 * v + slope + 0.1 * value for v, slope, value in zip(velocity, worst, expected)]
        expected = [value - 0.01 * v for value, v in zip(expected, velocity)]
        optimizer.step(closure)
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-10)


@pytest.fixture(params=[{}, {'adaptive': True, 'rho': 0.5}, {'direction': 'momentum', 'rho': 0.3}], ids=str)
def options(request):
    return {'lr': 0.1, 'momentum': 0.9, **request.param}


def test_parameters_that_are_frozen_later_do_not_move_and_do_not_shorten_the_look_ahead():
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer, seen = SAM([a, b], lr=0.1, momentum=0.9, rho=0.5, direction='momentum'), []

    def closure():
        optimizer.zero_grad()
        loss = (a + (3 * b if b.requires_grad else 0)).sum()
        loss.backward()
        seen.append((a.item(), b.item()))

    optimizer.step(closure)
    b.requires_grad_(False)
    before = a.item(), b.item()
    optimizer.step(closure)
    assert seen[1] == (pytest.approx(before[0] - 0.5), before[1])  # of a alone, whose momentum is 1


def trained(model, optimizer, steps, x, y):
    for _ in range(steps):
        optimizer.step(closure_of(model, optimizer, x, y))
    return flat(model)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=generator), torch.arange(8) % 3


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_weights_are_exactly_back_after_each_step(options, problem):
    model = make()
    optimizer = SAM(model.parameters(), **options)
    trained(model, optimizer, 2, *problem)
    before = flat(model).copy()
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    moved = []
    hook = model.register_forward_pre_hook(lambda *_: moved.append(not np.array_equal(flat(model), before)))
    assert np.array_equal(trained(model, optimizer, 50, *problem), before) and any(moved)
    hook.remove()

    def fails():
        raise RuntimeError('in the pass')

    with pytest.raises(RuntimeError, match='in the pass'):
        optimizer.step(fails)
    assert np.array_equal(flat(model), before)


def test_resumed_in_the_middle(options, problem):
    model = make()
    whole = trained(model, SAM(model.parameters(), **options), 6, *problem)
    model = make()
    first = SAM(model.parameters(), **options)
    trained(model, first, 3, *problem)
    second = SAM(model.parameters(), **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert np.array_equal(trained(model, second, 3, *problem), whole)


@pytest.mark.parametrize('with_gradient', [(0,), (1,), ()], ids=str)
def test_a_parameter_without_gradient_in_a_pass_is_left_alone(options, with_gradient, problem):
    """`extra` takes part in some of the passes alone, the first one before the measured step aside."""
    model, extra = make(), nn.Parameter(torch.ones(3))
    optimizer = SAM([*model.parameters(), extra], **options)
    x, y = problem

    def closure(passes=[-1]):
        optimizer.zero_grad(set_to_none=True)
        logits = model(x) + (extra if passes[0] < 0 or passes[0] in with_gradient else 0)
        passes[0] += passes[0] >= 0
        F.cross_entropy(logits, y).backward()
        return passes

    passes = optimizer.step(closure)
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    passes[0], before = 0, extra.detach().clone()
    optimizer.step(closure)
    assert torch.equal(extra, before)


def test_a_gradient_that_is_not_finite_changes_nothing(problem):
    model = make()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer, 1, *problem)
    before, (x, y) = flat(model).copy(), problem
    assert np.array_equal(trained(model, optimizer, 1, x * math.nan, y), before)
    assert not np.array_equal(trained(model, optimizer, 1, x, y), before)


def test_statistics_are_those_of_the_first_pass():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    alone = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), lr=0.1, rho=5.0, buffers=model.buffers())
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    optimizer.step(closure_of(model, optimizer, x, y))
    alone(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), alone.buffers()))


@pytest.mark.parametrize('make', [functools.partial(SAM, rho=0.5), functools.partial(AMP, epsilon=0.5,
                                                                                     perturbation='global')])
def test_a_group_without_a_radius_does_not_shorten_the_others(make):
    a, b, seen = *(nn.Parameter(torch.zeros(1)) for _ in range(2)), []
    option = 'epsilon' if make.func is AMP else 'rho'
    optimizer = make([{'params': [a]}, {'params': [b], option: 0.0}], lr=0.0)

    def closure():
        optimizer.zero_grad()
        seen.append((a.item(), b.item()))
        (3 * a + 4 * b).sum().backward()

    optimizer.step(closure)
    assert seen == [(0, 0), (pytest.approx(0.5), 0)]


def test_invalid_options_are_refused():
    w = [nn.Parameter(torch.ones(1))]
    for options, sentence in (({'rho': -1}, 'rho must be a number of at least 0, was given -1'),
                              ({'rho': math.nan}, 'rho must be a number of at least 0'),
                              ({'eta': -1}, 'eta must be a number of at least 0'),
                              ({'direction': 'up'}, "direction must be 'gradient' or 'momentum', was given 'up'"),
                              ({'direction': 'momentum'}, 'needs a base optimizer with momentum'),
                              ({'direction': 'momentum', 'base_optimizer': torch.optim.RMSprop}, 'with momentum'),
                              ({'direction': 'momentum', 'momentum': 0.9, 'rho': math.inf}, 'rho must be a number'),
                              ({'direction': 'momentum', 'momentum': 0.9, 'adaptive': True}, 'adaptive is for'),
                              ({'climb_fraction': 0.0}, 'climb_fraction must be a number above 0 and at most 1'),
                              ({'maximize': True}, 'SAM climbs to a higher loss, so maximize has no meaning in it'),
                              ({'base_optimizer': torch.optim.Adadelta}, 'Adadelta, which has an option rho too'),
                              ({'base_optimizer': torch.optim.LBFGS}, 'SAM cannot wrap LBFGS')):
        with pytest.raises(ValueError, match=sentence):
            SAM(w, lr=0.1, **options)
