import argparse
import pathlib
import re
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import hinge
from baselines.hinge import KINDS, hinge_loss

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/rivals.npz')
GOLDENS = {'ova_l1': ('one-vs-all', False), 'ova_l2': ('one-vs-all', True),
           'crammer_singer': ('crammer-singer', False), 'crammer_singer_squared': ('crammer-singer', True),
           'ww_torch_p1': ('weston-watkins', False), 'ww_torch_p2': ('weston-watkins', True)}


def oracle(scores, targets, kind, squared):
    """The loss and its gradient, one image and one class at a time, in float64; no two scores may be equal."""
    loss, gradient, (batch, K) = 0.0, np.zeros_like(scores), scores.shape
    for i, y in enumerate(targets):
        terms = []  # of each term: its violation, its factor, and its slopes at the scores
        for j in range(K):
            if kind == 'one-vs-all':
                sign = 1 if j == y else -1
                terms.append((1 - sign * scores[i, j], 1, {j: -sign}))
            elif j != y:
                terms.append((1 + scores[i, j] - scores[i, y], 1 / K if kind == 'weston-watkins' else 1, {j: 1, y: -1}))
        if kind == 'crammer-singer':
            terms = sorted(terms, key=lambda term: term[0])[-1:]
        for violation, factor, slopes in terms:
            if violation > 0:
                loss += factor * (violation ** 2 if squared else violation) / batch
                for j, slope in slopes.items():
                    gradient[i, j] += factor * slope * (2 * violation if squared else 1) / batch
    return loss, gradient


def ours(scores, targets, kind, squared):
    scores = torch.tensor(scores, requires_grad=True)
    loss = hinge_loss(scores, torch.as_tensor(targets), kind, squared)
    return loss.item(), torch.autograd.grad(loss, scores)[0]


def close(actual, expected, tolerance=1e-9):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def random_data(seed, batch=9, classes=5):
    generator = np.random.default_rng(seed)
    return 2 * generator.standard_normal((batch, classes)), generator.integers(classes, size=batch)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('squared', [False, True])
@pytest.mark.parametrize('classes', [1, 2, 5])
def test_float64_against_the_plain_loop(kind, squared, classes):
    for seed in range(4):
        scores, targets = random_data(seed, classes=classes)
        expected_loss, expected_gradient = oracle(scores, targets, kind, squared)
        loss, gradient = ours(scores, targets, kind, squared)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        close(gradient, expected_gradient, 1e-12)
        assert expected_loss > 0 or (classes == 1 and kind != 'one-vs-all')


@pytest.mark.parametrize('name', GOLDENS)
def test_golden(name):
    kind, squared = GOLDENS[name]
    scores, targets = GOLDEN['hinge/scores'], GOLDEN['hinge/targets']
    losses = GOLDEN[f'hinge/{name}/loss']
    loss, gradient = ours(scores, targets, kind, squared)
    close(loss, losses.mean())
    close(gradient, GOLDEN[f'hinge/{name}/gscores'])
    each = [ours(scores[i:i + 1], targets[i:i + 1], kind, squared)[0] for i in range(len(scores))]
    close(each, losses)


@pytest.mark.parametrize('squared', [False, True])
def test_weston_watkins_is_torch_multi_margin_loss(squared):
    scores, targets = random_data(7)
    expected = F.multi_margin_loss(torch.tensor(scores), torch.tensor(targets), p=2 if squared else 1)
    assert ours(scores, targets, 'weston-watkins', squared)[0] == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize('kind', KINDS)
def test_the_gradient_at_a_kink_is_zero(kind):
    # Every max(0, .) is exactly at its kink: 1 - 1, and 1 + 0 - 1 or 1 - 1 + 0.
    scores = [[1.0, -1.0, -1.0]] if kind == 'one-vs-all' else [[1.0, 0.0, 0.0]]
    loss, gradient = ours(scores, [0], kind, False)
    assert loss == 0 and torch.equal(gradient, torch.zeros(1, 3))


@pytest.mark.parametrize('squared', [False, True])
def test_equal_largest_logits_share_the_gradient(squared):
    _, gradient = ours([[0.5, 0.75, 0.75, 0.0]], [0], 'crammer-singer', squared)
    slope = 2 * 1.25 if squared else 1.0
    assert gradient.tolist() == [[-slope, slope / 2, slope / 2, 0.0]]


def test_the_three_kinds_differ():
    scores = [[3.0, 0.0, 0.0, 0.0, 0.0]]  # every pairwise margin holds, and no score is below -1
    assert [ours(scores, [0], kind, False)[0] for kind in KINDS] == [4.0, 0.0, 0.0]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('squared', [False, True])
def test_gradcheck_and_torch_func(kind, squared):
    scores, targets = random_data(0, batch=3)
    scores, targets = torch.tensor(scores), torch.tensor(targets)
    x = scores.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hinge_loss(x, targets, kind, squared), x)
    gradient = torch.func.grad(lambda x: hinge_loss(x, targets, kind, squared))(scores)
    close(gradient, torch.autograd.grad(hinge_loss(x, targets, kind, squared), x)[0], 1e-12)


@pytest.mark.parametrize('kind', KINDS)
def test_float32_at_least_also_under_autocast(kind):
    scores, targets = random_data(1)
    scores = torch.tensor(scores).bfloat16()
    expected = hinge_loss(scores.double(), torch.tensor(targets), kind).item()
    with torch.autocast('cpu', torch.bfloat16):
        loss = hinge_loss(scores, torch.tensor(targets), kind)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('squared', [False, True])
def test_empty_batch_and_one_class(kind, squared):
    logits = torch.empty(0, 3, requires_grad=True)
    loss = hinge_loss(logits, torch.empty(0, dtype=torch.long), kind, squared)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 3)
    loss, gradient = ours([[-1.0]], [0], kind, squared)
    expected = {False: (2.0, -1.0), True: (4.0, -4.0)}[squared] if kind == 'one-vs-all' else (0.0, 0.0)
    assert (loss, gradient.item()) == expected


@pytest.mark.parametrize('kind', KINDS)
def test_the_term(kind):
    parser = argparse.ArgumentParser()
    hinge.add_arguments(parser)
    assert vars(parser.parse_args([])) == {'hinge': 'one-vs-all'}
    args = parser.parse_args([f'--hinge={kind}'])
    scores, targets = random_data(2)
    expected, _ = oracle(scores, targets, kind, False)
    for outputs in (torch.tensor(scores), (torch.tensor(scores), None)):
        assert hinge.loss_term(args)(outputs, torch.tensor(targets), []).item() == pytest.approx(expected, rel=1e-12)
    assert hinge.cross_entropy_weight(args) == 0.0


def test_wrong_kinds_and_shapes():
    with pytest.raises(ValueError, match="one of one-vs-all, crammer-singer, weston-watkins, was given 'ova'"):
        hinge_loss(torch.zeros(2, 3), torch.tensor([0, 1]), 'ova')
    for shape in ((3,), (2, 0), (2, 3, 4)):
        with pytest.raises(ValueError, match='logits'):
            hinge_loss(torch.zeros(shape), torch.tensor([0, 0]))


def test_the_file_imports_torch_alone_and_its_example_runs(capsys):
    path = ROOT / 'baselines/hinge.py'
    assert re.findall(r'^ *(?:import|from) +(\w+)', path.read_text(), re.MULTILINE) == ['torch']
    runpy.run_path(str(path), run_name='__main__')
    assert all(kind in line for kind, line in zip(KINDS, capsys.readouterr().out.splitlines()))
