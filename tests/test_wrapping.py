"""What AMP and SmoothOut have in common: the base optimizer that they wrap."""
import functools

import pytest
import torch

from amp import AMP
from smoothout import SmoothOut


@pytest.fixture(params=[functools.partial(AMP, epsilon=0.1), functools.partial(SmoothOut, ss=0.1)],
                ids=['amp', 'smoothout'])
def wrap(request):
    return request.param


class NeedsClosure(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {'lr': lr})

    def step(self, closure):
        return closure()


@pytest.mark.parametrize('kind', [torch.optim.LBFGS, functools.partial(torch.optim.LBFGS, max_iter=2), NeedsClosure,
                                  AMP, SmoothOut])
@pytest.mark.parametrize('groups', [1, 2])
def test_a_base_optimizer_that_needs_a_closure_is_refused(kind, groups, wrap):
    words = f'{wrap.func.__name__} cannot wrap {getattr(kind, "func", kind).__name__}'
    with pytest.raises(ValueError, match=f'{words}, whose step needs a closure; .* SGD, Adam'):
        wrap([{'params': [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)], 0.1, base_optimizer=kind)


@pytest.mark.parametrize('kind', ['SGD', 'Adam', 'AdamW', 'RMSprop', 'Adagrad', 'Adadelta', 'Adamax', 'ASGD', 'NAdam',
                                  'RAdam', 'Rprop', 'Adafactor'])
def test_other_base_optimizers_work(kind, wrap):
    w = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = wrap([w], 0.1, base_optimizer=getattr(torch.optim, kind))
    before = w.detach().clone()
    for _ in range(2):
        optimizer.step(lambda: (optimizer.zero_grad(), w.square().sum().backward()))
    assert not torch.equal(w, before)


@pytest.mark.parametrize('shapes', [[[]], [[], [(2, 3)]], [[(2, 3)], []], [[(0,), (0, 3), (3, 0)]]])
@pytest.mark.parametrize('used', ['all', 'none', 'frozen'])
def test_empty_groups_and_parameters_without_a_gradient(shapes, used, wrap):
    groups = [{'params': [torch.nn.Parameter(torch.ones(shape)) for shape in group]} for group in shapes]
    parameters = [p.requires_grad_(used != 'frozen') for group in groups for p in group['params']]
    optimizer = wrap(groups, 0.1)

    def closure():
        optimizer.zero_grad()
        start = torch.zeros((), requires_grad=True)
        sum([p.square().sum() for p in parameters] if used == 'all' else [], start).backward()

    for _ in range(2):
        optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    changed = used == 'all' and any(p.numel() for p in parameters)
    assert changed != all(torch.equal(p, torch.ones_like(p)) for p in parameters)
