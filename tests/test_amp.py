import copy
import math
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from amp import AMP
from helpers import NothingIsRead, same, through_a_file, weights

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/amp.npz')
BASES = [(torch.optim.SGD, dict(momentum=0.9, weight_decay=1e-3, nesterov=True)),
         (torch.optim.Adam, dict(weight_decay=1e-3)),
         (torch.optim.AdamW, dict(weight_decay=0.1, amsgrad=True))]


def gradients(params, x, targets):
    """Gradients of the cross-entropy of tanh(x A^T) W^T + b, by hand."""
    A, W, b = params
    hidden = np.tanh(x @ A.T)
    odds = np.exp(hidden @ W.T + b)
    signal = (odds / odds.sum(axis=1, keepdims=True) - np.eye(len(b))[targets]) / len(x)
    return [((signal @ W) * (1 - hidden ** 2)).T @ x, signal.T @ hidden, signal.sum(axis=0)]


def oracle(params, batches, lr, momentum, epsilon, inner_lr, inner_iter, perturbation, weight_decay=0.0,
           nesterov=False):
    """The algorithm, one tensor at a time. lr and momentum: a list by step; the next three: a list by tensor."""
    params, velocity = [p.copy() for p in params], [None] * len(params)
    for (x, targets), rate, friction in zip(batches, lr, momentum):
        gradient, delta = gradients(params, x, targets), [np.zeros_like(p) for p in params]
        for number in range(max(inner_iter)):
            for i in range(len(params)):
                if number < inner_iter[i]:
                    delta[i] = delta[i] + inner_lr[i] * gradient[i]
            lengths = [math.sqrt((d ** 2).sum()) for d in delta]
            if perturbation == 'global':
                lengths = [math.sqrt(math.fsum(length ** 2 for length in lengths))] * len(params)
            delta = [d if length <= e else d * e / length for d, length, e in zip(delta, lengths, epsilon)]
            gradient = gradients([p + d for p, d in zip(params, delta)], x, targets)
        for i, p in enumerate(params):
            g = gradient[i] + weight_decay * p
            velocity[i] = g if velocity[i] is None else friction * velocity[i] + g
            params[i] = p - rate * (g + friction * velocity[i] if nesterov else velocity[i])
    return params


class Net(nn.Module):
    def __init__(self, params, dtype=torch.float64):
        super().__init__()
        self.A, self.W, self.b = (nn.Parameter(torch.tensor(p, dtype=dtype)) for p in params)

    def forward(self, x):
        return torch.tanh(x @ self.A.T) @ self.W.T + self.b


class ConvBN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def problem(seed=0, steps=12):
    """Weights and batches, as float64 arrays."""
    generator = np.random.default_rng(seed)
    params = [generator.standard_normal(shape) for shape in ((6, 4), (3, 6), (3,))]
    return params, [(generator.standard_normal((7, 4)), generator.integers(0, 3, 7)) for _ in range(steps)]


def batch(x, targets, model):
    return torch.tensor(x, dtype=next(model.parameters()).dtype), torch.tensor(targets)


def closure_of(optimizer, model, x, targets, after=lambda number: None):
    """A closure; `after`, given the number of the call from 0, may change gradients or raise."""
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        calls.append(loss.item())
        after(len(calls) - 1)
        return loss
    closure.losses = calls
    return closure


def train(optimizer, model, batches, scheduler=None):
    for x, targets in batches:
        optimizer.step(closure_of(optimizer, model, *batch(x, targets, model)))
        if scheduler:
            scheduler.step()
    return model


def vector(tensors):
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors] or [np.zeros(0)])


def set_vector(tensors, values):
    for t, piece in zip(tensors, np.split(values, np.cumsum([t.numel() for t in tensors])[:-1])):
        t.data.copy_(torch.tensor(piece).reshape(t.shape))


def close(actual, expected, tolerance=1e-9):
    """Within `tolerance` of the largest element of `expected`."""
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=0) + 1e-15)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2 ** 31), inner_iter=st.integers(0, 3), epsilon=st.sampled_from([0.0, 1e-3, 0.05, 0.5, 5.0]),
       inner_lr=st.sampled_from([0.0, 0.3, 1.0, 100.0]), perturbation=st.sampled_from(['tensor', 'global']),
       momentum=st.sampled_from([0.0, 0.9]), weight_decay=st.sampled_from([0.0, 0.01]), nesterov=st.booleans())
def test_float64_against_the_plain_loop(seed, inner_iter, epsilon, inner_lr, perturbation, momentum, weight_decay,
                                        nesterov):
    nesterov = nesterov and momentum > 0
    params, batches = problem(seed, steps=4)
    model = Net(params)
    optimizer = AMP(model.parameters(), 0.3, epsilon, inner_lr, inner_iter, perturbation,
                    momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    train(optimizer, model, batches)
    expected = oracle(params, batches, [0.3] * 4, [momentum] * 4, [epsilon] * 3, [inner_lr] * 3, [inner_iter] * 3,
                      perturbation, weight_decay, nesterov)
    for actual, p in zip(model.parameters(), expected):
        close(actual, p)


@pytest.mark.parametrize('perturbation', ['tensor', 'global'])
def test_options_of_each_group_against_the_plain_loop(perturbation):
    params, batches = problem(3, steps=5)
    model = Net(params)
    epsilon, inner_lr, inner_iter = [0.05, 0.4, 0.2], [1.0, 0.3, 10.0], [1, 3, 0]
    groups = [dict(params=p, epsilon=e, inner_lr=lr, inner_iter=n) for p, e, lr, n in
              zip(model.parameters(), epsilon, inner_lr, inner_iter)]
    train(AMP(groups, 0.2, 9.0, perturbation=perturbation, momentum=0.9), model, batches)
    expected = oracle(params, batches, [0.2] * 5, [0.9] * 5, epsilon, inner_lr, inner_iter, perturbation)
    for actual, p in zip(model.parameters(), expected):
        close(actual, p)


@pytest.mark.parametrize('name', [str(name) for name in GOLDEN['cfg_names']])
def test_golden(name):
    g = {key.split('/')[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(name + '/')}
    kind = str(g['model'])
    model = (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)) if kind == 'mlp' else ConvBN()).double()
    params, buffers = list(model.parameters()), list(model.buffers())
    set_vector(params, GOLDEN[f'{kind}/params0'])
    if buffers:
        set_vector(buffers, GOLDEN[f'{kind}/buffers0'])
    options = dict(weight_decay=float(g['weight_decay']))
    if g['base'] == 'SGD':
        options.update(momentum=float(g['momentum']), nesterov=bool(g['nesterov']))
    groups = params
    if g['groups']:
        groups = [dict(params=params[:2], epsilon=float(g['group0_epsilon']), inner_lr=float(g['group0_inner_lr'])),
                  dict(params=params[2:], lr=float(g['group1_lr']))]
    optimizer = AMP(groups, float(g['lr']), float(g['epsilon']), float(g['inner_lr']), int(g['inner_iter']),
                    base_optimizer=getattr(torch.optim, str(g['base'])), **options)
    for step in range(3):
        x, targets = torch.tensor(GOLDEN[f'{kind}/x'][step]), torch.tensor(GOLDEN[f'{kind}/y'][step])
        seen = []

        def closure():
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.cross_entropy(outputs, targets)
            loss.backward()
            if g['clip']:
                nn.utils.clip_grad_norm_(params, float(g['clip']))
            seen.append((loss.item(), vector([p.grad for p in params]), vector(params) - g['params'][step]))
            return outputs, loss

        outputs, loss = optimizer.step(closure)
        losses, slopes, deltas = zip(*seen)
        close(outputs, g['outputs'][step])
        close(loss, g['loss'][step])
        close(losses, g['closure_losses'][step])
        close(slopes[0], g['grad_clean'][step])
        close(slopes[-1], g['grad_used'][step])
        close(deltas[-1], g['dev'][step], 1e-8)  # found as a difference of weights
        close(vector(params), g['params'][step + 1])
        close(vector(buffers), g['buffers'][step + 1])  # as in the original, of all the passes


def test_with_buffers_the_statistics_are_those_of_the_clean_passes_alone():
    torch.manual_seed(0)
    model = ConvBN()
    optimizer = AMP(model.parameters(), 0.1, 2.0, inner_iter=2, buffers=model.buffers(), momentum=0.9)
    for step in range(1, 6):
        x, targets = torch.randn(8, 2, 5, 5), torch.randint(3, (8,))
        clean = copy.deepcopy(model)
        clean(x)
        optimizer.step(closure_of(optimizer, model, x, targets))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), clean.buffers()))
        assert model.bn1.num_batches_tracked == step
    optimizer.step(closure_of(optimizer, model, x, targets,
                              lambda number: number and model.fc.weight.grad.fill_(math.nan)))
    assert model.bn1.num_batches_tracked == 6 and all(b.isfinite().all() for b in model.buffers())


@pytest.mark.parametrize('inner_iter', [0, 1, 3])
def test_returns_what_the_first_call_returned(inner_iter):
    params, batches = problem()
    for wrap in (lambda loss, number: loss, lambda loss, number: (number, 'text', loss), lambda loss, number: None):
        model = Net(params)
        optimizer = AMP(model.parameters(), 0.1, 0.5, inner_iter=inner_iter)
        returned = []
        inner = closure_of(optimizer, model, *batch(*batches[0], model))

        def closure():
            returned.append(wrap(inner(), len(returned)))
            return returned[-1]
        assert optimizer.step(closure) is returned[0] and len(returned) == 1 + inner_iter


@pytest.mark.parametrize('base, options', BASES)
@pytest.mark.parametrize('call', [0, 1, 2])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(base, options, call, value):
    params, batches = problem()
    model = Net(params, torch.float32)
    optimizer = AMP(model.parameters(), 0.1, 0.5, inner_iter=2, base_optimizer=base, **options)

    def spoil(number):
        if number == call:
            model.W.grad[1, 2] = value

    for first in (True, False):  # with and without a state that is there already
        before = weights(model)
        closure = closure_of(optimizer, model, *batch(*batches[0], model), spoil)
        optimizer.step(closure)
        assert same(model, before) and len(closure.losses) == 3 and np.isfinite(closure.losses).all()
        train(optimizer, model, batches)
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values()
                   if torch.is_tensor(value))


def test_a_gradient_that_is_not_finite_without_any_state_leaves_no_trace():
    params, batches = problem()
    models = [Net(params), Net(params)]
    optimizers = [AMP(model.parameters(), 0.1, 0.5, weight_decay=0.01) for model in models]
    optimizers[0].step(closure_of(optimizers[0], models[0], *batch(*batches[0], models[0]),
                                  lambda number: models[0].A.grad.mul_(math.nan)))
    for model, optimizer in zip(models, optimizers):
        train(optimizer, model, batches)
    assert same(*models)


@pytest.mark.parametrize('call', [0, 1, 2])
def test_after_an_exception_the_weights_are_as_before(call):
    params, batches = problem()
    model, spared = Net(params, torch.float32), Net(params, torch.float32)
    optimizer, other = (AMP(m.parameters(), 0.1, 0.5, inner_iter=2, momentum=0.9) for m in (model, spared))
    train(optimizer, model, batches[:3])
    train(other, spared, batches[:3])
    before = weights(model)

    def fail(number):
        if number == call:
            raise KeyboardInterrupt('stopped here')

    with pytest.raises(KeyboardInterrupt, match='stopped here'):
        optimizer.step(closure_of(optimizer, model, *batch(*batches[3], model), fail))
    assert same(model, before)
    assert same(train(optimizer, model, batches[3:]), train(other, spared, batches[3:]))


@pytest.mark.parametrize('lr', [0.0, 0.1])
@pytest.mark.parametrize('inner_iter, used', [
    (1, (True, False)), (1, (False, True)),
    (2, (True, False, True)), (2, (False, True, True)), (2, (True, True, False)), (2, (False, True, False))])
@pytest.mark.parametrize('base, options', BASES)
def test_a_parameter_without_a_gradient_in_one_of_the_passes_takes_no_part(lr, inner_iter, used, base, options):
    torch.manual_seed(0)
    always, sometimes = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    optimizer = AMP([always, sometimes], lr, 0.5, inner_iter=inner_iter, base_optimizer=base, **options)
    uses = iter((True,) * (1 + inner_iter) + used)  # first a step that gives both a momentum

    def closure():
        optimizer.zero_grad()
        loss = ((always - 3) ** 2).sum()
        if next(uses):
            loss = loss + ((sometimes - 3) ** 4).sum()
        loss.backward()
    optimizer.step(closure)
    before = always.detach().clone(), sometimes.detach().clone()
    optimizer.step(closure)
    assert torch.equal(sometimes, before[1])
    assert torch.equal(always, before[0]) == (lr == 0)


def test_all_parameters_without_a_gradient_in_the_perturbed_pass():
    p = nn.Parameter(torch.ones(3))
    optimizer = AMP([p], 0.1, 0.5, momentum=0.9)
    uses = iter((True, False))

    def closure():
        optimizer.zero_grad()
        if next(uses):
            p.sum().backward()
    optimizer.step(closure)
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('perturbation', ['tensor', 'global'])
def test_weights_are_restored_exactly(dtype, perturbation):
    params, batches = problem(steps=50)
    model = Net(params, dtype)
    before = weights(model)
    losses = []
    optimizer = AMP(model.parameters(), 0.0, 0.7, inner_iter=2, perturbation=perturbation, momentum=0.9)
    for x, targets in batches:
        closure = closure_of(optimizer, model, *batch(x, targets, model))
        optimizer.step(closure)
        losses.append(closure.losses)
        assert same(model, before)
    assert all(perturbed > clean for clean, _, perturbed in losses)  # it did climb


@pytest.mark.parametrize('base, options', BASES)
@pytest.mark.parametrize('off', [dict(epsilon=0.5, inner_iter=0), dict(epsilon=0.0, inner_iter=2),
                                 dict(epsilon=0.5, inner_lr=0.0)])
def test_without_a_perturbation_it_is_the_base_optimizer(base, options, off):
    params, batches = problem()
    model, plain = Net(params, torch.float32), Net(params, torch.float32)
    train(AMP(model.parameters(), 0.1, base_optimizer=base, **off, **options), model, batches)
    assert same(model, train(base(plain.parameters(), lr=0.1, **options), plain, batches))
    assert not same(model, weights(Net(params, torch.float32)))


@pytest.mark.parametrize('schedule', [lambda o: StepLR(o, 3, gamma=0.3),
                                      lambda o: OneCycleLR(o, 0.5, total_steps=13, base_momentum=0.5,
                                                           max_momentum=0.9)])
def test_schedulers_act_on_it_before_and_after_loading(schedule):
    params, batches = problem()
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.8)
    scheduler, rates, frictions = schedule(dummy), [], []
    for _ in batches:
        rates.append(dummy.param_groups[0]['lr'])
        frictions.append(dummy.param_groups[0]['momentum'])
        dummy.step()
        scheduler.step()
    assert len(set(rates)) > 3

    expected = oracle(params, batches, rates, frictions, [0.5] * 3, [1.0] * 3, [1] * 3, 'tensor')
    model = Net(params)
    optimizer = AMP(model.parameters(), 0.2, 0.5, momentum=0.8)
    scheduler = schedule(optimizer)
    train(optimizer, model, batches[:5], scheduler)
    saved = through_a_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    train(optimizer, model, batches[5:], scheduler)

    resumed = Net(problem(9)[0])
    other = AMP(resumed.parameters(), 0.2, 0.5, momentum=0.8)
    later = schedule(other)
    for item, state in zip((resumed, other, later), saved):
        item.load_state_dict(state)
    train(other, resumed, batches[5:], later)
    assert same(resumed, model)
    for p, value in zip(model.parameters(), expected):
        close(p, value)


@pytest.mark.parametrize('base, options', BASES)
def test_resumed_training_goes_on_bit_for_bit(base, options):
    params, batches = problem()
    model = Net(params, torch.float32)
    groups = [dict(params=[model.A], epsilon=0.3, inner_iter=2), dict(params=[model.W, model.b], lr=0.05, inner_lr=0.4)]
    optimizer = AMP(groups, 0.1, 0.5, base_optimizer=base, **options)
    train(optimizer, model, batches[:6])
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])

    resumed = Net(problem(9)[0], torch.float32)
    groups = [dict(params=[resumed.A]), dict(params=[resumed.W, resumed.b])]
    other = AMP(groups, 7.0, 7.0, base_optimizer=base, **options)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert [(g['epsilon'], g['inner_iter']) for g in other.param_groups] == [(0.3, 2), (0.5, 1)]
    assert same(train(other, resumed, batches[6:]), train(optimizer, model, batches[6:]))


def test_a_loaded_optimizer_sees_its_groups_changed():
    params, batches = problem()
    model = Net(params)
    optimizer = AMP(model.parameters(), 0.1, 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]['lr'] = 0.0
    assert same(train(optimizer, model, batches), Net(params))


@pytest.mark.parametrize('loaded', [False, True])
def test_a_group_added_later_is_like_one_that_was_there(loaded):
    params, batches = problem()
    model, whole = Net(params), Net(params)
    optimizer = AMP([model.A, model.W], 0.1, 0.5, momentum=0.9, weight_decay=0.01)
    if loaded:
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer.add_param_group(dict(params=[model.b], lr=0.3, epsilon=0.1))
    train(optimizer, model, batches)
    groups = [dict(params=[whole.A, whole.W]), dict(params=[whole.b], lr=0.3, epsilon=0.1)]
    train(AMP(groups, 0.1, 0.5, momentum=0.9, weight_decay=0.01), whole, batches)
    assert same(model, whole) and not torch.equal(model.b, Net(params).b)


def test_frozen_and_unused_parameters_stay():
    params, batches = problem()
    model, fewer = Net(params), Net(params)
    model.b.requires_grad_(False)
    fewer.b.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    train(AMP([*model.parameters(), unused], 0.1, 0.5, inner_iter=2, momentum=0.9, weight_decay=0.1), model, batches)
    train(AMP([fewer.A, fewer.W], 0.1, 0.5, inner_iter=2, momentum=0.9, weight_decay=0.1), fewer, batches)
    assert torch.equal(unused, torch.ones(3)) and torch.equal(model.b, Net(params).b) and same(model, fewer)


def test_a_step_without_any_gradient_does_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = AMP([p], 0.1, 0.5, momentum=0.9)
    assert optimizer.step(lambda: 'result') == 'result' and torch.equal(p, torch.ones(3))


def test_parameters_of_several_dtypes():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    before = [p.detach().clone() for p in params]
    for perturbation in ('tensor', 'global'):
        for lr in (0.0, 0.1):
            optimizer = AMP(params, lr, 0.5, perturbation=perturbation, momentum=0.9)

            def closure():
                optimizer.zero_grad()
                loss = sum((p.double() ** 2).sum() for p in params)
                loss.backward()
                return loss
            for _ in range(3):
                optimizer.step(closure)
            assert all(torch.equal(p, q) == (lr == 0) for p, q in zip(params, before))
            before = [p.detach().clone() for p in params]


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize('base, options', BASES)
def test_a_copy_goes_on_bit_for_bit(duplicate, base, options):
    torch.manual_seed(0)
    model = ConvBN()
    optimizer = AMP(model.parameters(), 0.01, 0.5, inner_iter=2, perturbation='global', buffers=model.buffers(),
                    base_optimizer=base, **options)
    batches = [(torch.randn(8, 2, 5, 5).numpy(), torch.randint(3, (8,)).numpy()) for _ in range(8)]
    train(optimizer, model, batches[:4])
    twin, other = duplicate((model, optimizer))
    before = weights(model)
    train(other, twin, batches[4:])
    assert same(model, before) and not same(twin, before)
    assert same(twin, train(optimizer, model, batches[4:]))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers()))
    assert twin.bn1.num_batches_tracked == 8
    other.param_groups[0]['lr'] = 0.0  # and still it has one set of groups
    before = weights(twin)
    assert same(train(other, twin, batches), before)


def test_length_of_the_perturbation():
    params, batches = problem()
    for perturbation, inner_iter in (('global', 1), ('global', 2), ('tensor', 1), ('tensor', 2)):
        model = Net(params)
        optimizer = AMP(model.parameters(), 0.1, 0.25, 1e4, inner_iter, perturbation)
        before, seen = weights(model), []
        optimizer.step(closure_of(optimizer, model, *batch(*batches[0], model), lambda number: seen.append(
            [(p.detach() - q).norm().item() for p, q in zip(model.parameters(), before)])))
        assert seen[0] == [0, 0, 0]
        for lengths in seen[1:]:
            expected = 0.25 if perturbation == 'global' else 0.25 * math.sqrt(3)
            assert math.hypot(*lengths) == pytest.approx(expected, rel=1e-9)


def test_a_gradient_inside_the_ball_is_not_lengthened():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AMP([p], 0.1, 100.0, inner_lr=0.5)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(p.detach().clone())
        (p * torch.tensor([3.0, 4.0])).sum().backward()
    optimizer.step(closure)
    close(seen[1], np.array([1.5, 2.0]))


@pytest.mark.parametrize('option', [dict(epsilon=-1), dict(epsilon=math.nan), dict(epsilon=math.inf), dict(inner_lr=-1),
                                    dict(inner_lr=math.nan), dict(inner_iter=-1), dict(inner_iter=1.5),
                                    dict(perturbation='x'), dict(lr=-1), dict(maximize=True)])
def test_options_out_of_range_raise(option):
    name, = option
    with pytest.raises(ValueError, match='learning rate' if name == 'lr' else name):
        AMP([nn.Parameter(torch.zeros(1))], **{'lr': 0.1, 'epsilon': 0.5, **option})


@pytest.mark.parametrize('off', [dict(inner_lr=0.0), dict(epsilon=0.0), dict(inner_iter=0)])
def test_without_a_way_to_go_there_is_one_pass(off):
    p, passes = nn.Parameter(torch.zeros(1)), []
    optimizer = AMP([p], **{'lr': 0.1, 'epsilon': 0.5, **off})
    optimizer.step(lambda: passes.append((p - 1).pow(2).sum().backward()))
    assert len(passes) == 1 and p.item() == pytest.approx(0.2)


def test_hooks_run_once_per_step():
    params, batches = problem(steps=5)
    model = Net(params)
    optimizer = AMP(model.parameters(), 0.1, 0.5, inner_iter=2)
    before, after = [], []
    optimizer.register_step_pre_hook(lambda *arguments: before.append(weights(model)))
    optimizer.register_step_post_hook(lambda *arguments: after.append(weights(model)))
    train(optimizer, model, batches)
    assert len(before) == len(after) == 5 and same(model, after[-1]) and same(Net(params), before[0])


def step_of(optimizer, model, x, targets):
    def closure():
        optimizer.zero_grad()
        F.cross_entropy(model(x), targets).backward()
    return lambda: optimizer.step(closure)


@pytest.mark.parametrize('perturbation', ['tensor', 'global'])
def test_a_step_reads_no_tensor(perturbation):
    model = ConvBN()
    optimizer = AMP(model.parameters(), 0.1, 0.5, inner_iter=2, perturbation=perturbation, buffers=model.buffers(),
                    momentum=0.9)
    step = step_of(optimizer, model, torch.randn(8, 2, 5, 5), torch.randint(3, (8,)))
    with NothingIsRead():
        step()
        step()
        with pytest.raises(AssertionError, match='_local_scalar_dense'):
            torch.ones(1).item()


@pytest.mark.gpu
@pytest.mark.parametrize('perturbation', ['tensor', 'global'])
def test_a_step_does_not_wait_for_the_device(perturbation):
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    model = ConvBN().cuda()
    optimizer = AMP(model.parameters(), 0.1, 0.5, inner_iter=2, perturbation=perturbation, buffers=model.buffers(),
                    momentum=0.9)
    step = step_of(optimizer, model, torch.randn(8, 2, 5, 5, device='cuda'), torch.randint(3, (8,), device='cuda'))
    step()
    before = weights(model)
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert not same(model, before)


def test_the_state_of_the_base_optimizer_alone_can_be_loaded():
    p = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    plain.step()
    optimizer = AMP([p], lr=0.2, epsilon=0.5, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    optimizer.step(lambda: None)
    assert optimizer.param_groups[0]['epsilon'] == 0.5 and optimizer.param_groups[0]['lr'] == 0.1
    assert torch.allclose(p, torch.tensor(1 - 0.1 - 0.1 * 1.9))


def test_a_group_keeps_its_epsilon_where_the_state_has_none():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{'params': [p]} for p in weights]
    optimizer = AMP([{**groups[0]}, {**groups[1], 'epsilon': 0.0}], lr=0.2, epsilon=0.5)
    optimizer.load_state_dict(torch.optim.SGD(groups, lr=0.1).state_dict())
    assert [(group['epsilon'], group['lr']) for group in optimizer.param_groups] == [(0.5, 0.1), (0.0, 0.1)]


def test_the_file_works_alone(tmp_path):
    shutil.copy(ROOT / 'amp.py', tmp_path)
    result = subprocess.run([sys.executable, 'amp.py'], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and 'at 0.01: loss 0.005' in result.stdout, result.stderr
