import argparse
import math
import pathlib
import re
import runpy
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import logit_adjustment
from baselines.logit_adjustment import adjusted, adjustment, logit_adjusted_loss

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / 'tests/goldens/rivals.npz')
TAUS = [f'{tau:g}' for tau in GOLDEN['logit_adjust/taus']]


def oracle(logits, probabilities, counts, tau):
    """The loss of equation 10, one image and one class at a time, in float64; probabilities (batch, K) of the classes.

    For one target y, -log(e^(s_y + tau log prior_y) / sum_j e^(s_j + tau log prior_j)).
    """
    loss = 0.0
    for i in range(len(logits)):
        total = math.fsum(math.exp(logits[i, j]) * (counts[j] / sum(counts)) ** tau for j in range(len(counts)))
        for j in range(len(counts)):
            share = math.exp(logits[i, j]) * (counts[j] / sum(counts)) ** tau / total
            loss -= probabilities[i, j] * math.log(share) / len(logits)
    return loss


def close(actual, expected, tolerance=1e-9):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def random_data(seed, batch=8, classes=5):
    generator = np.random.default_rng(seed)
    counts = [int(count) for count in generator.integers(1, 3000, size=classes)]
    return generator.standard_normal((batch, classes)), generator.integers(classes, size=batch), counts


def term_for(counts, *flags, classes=None):
    parser = argparse.ArgumentParser()
    logit_adjustment.add_arguments(parser)
    model = types.SimpleNamespace(num_classes=len(counts) if classes is None else classes)
    return logit_adjustment.loss_term(parser.parse_args(flags), model, counts)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('tau', [0.0, 0.5, 1.0, 3.0])
def test_float64_against_the_plain_loop(seed, tau):
    logits, targets, counts = random_data(seed)
    expected = oracle(logits, np.eye(5)[targets], counts, tau)
    outputs, targets = torch.tensor(logits), torch.tensor(targets)
    term = term_for(counts, f'--tau={tau}')
    for loss in (logit_adjusted_loss(outputs, targets, counts, tau), term(outputs, targets, []),
                 logit_adjusted_loss(outputs, targets, torch.tensor(counts), tau), term((outputs, None), targets, [])):
        assert loss.item() == pytest.approx(expected, rel=1e-12)
    predicted = adjusted(outputs, counts, tau)
    for i in range(len(logits)):
        for j in range(len(counts)):
            expected = logits[i, j] - tau * math.log(counts[j] / sum(counts))
            assert predicted[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_probabilities_as_targets():
    logits, _, counts = random_data(4)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), size=8)
    expected = oracle(logits, probabilities, counts, 1.0)
    outputs, targets = torch.tensor(logits), torch.tensor(probabilities)
    assert logit_adjusted_loss(outputs, targets, counts).item() == pytest.approx(expected, rel=1e-12)
    assert term_for(counts)(outputs, targets, []).item() == pytest.approx(expected, rel=1e-12)
    assert term_for(counts)(outputs.float(), targets.float(), []).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('tau', TAUS)
def test_golden(tau):
    reference = {key: GOLDEN[f'logit_adjust/tau{tau}/paper/{key}']
                 for key in ('adjustment', 'loss', 'glogits', 'posthoc_logits', 'posthoc_argmax')}
    logits = torch.tensor(GOLDEN['logit_adjust/logits'], requires_grad=True)
    targets, counts = torch.tensor(GOLDEN['logit_adjust/targets']), GOLDEN['logit_adjust/counts'].tolist()
    close(adjustment(counts, float(tau)), reference['adjustment'])
    loss = logit_adjusted_loss(logits, targets, counts, float(tau))
    close(loss.item(), reference['loss'].mean())
    close(torch.autograd.grad(loss, logits)[0], reference['glogits'])
    for i in range(len(logits)):
        one = logit_adjusted_loss(logits[i:i + 1], targets[i:i + 1], counts, float(tau))
        assert one.item() == pytest.approx(reference['loss'][i], rel=1e-9)
    predicted = adjusted(logits.detach(), counts, float(tau))
    close(predicted, reference['posthoc_logits'])
    assert predicted.argmax(dim=1).tolist() == reference['posthoc_argmax'].tolist()


def test_gradcheck_and_torch_func():
    logits, targets, counts = random_data(0)
    logits, targets = torch.tensor(logits), torch.tensor(targets)

    def loss(logits):
        return logit_adjusted_loss(logits, targets, counts)

    x = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    close(torch.func.grad(loss)(logits), torch.autograd.grad(loss(x), x)[0], 1e-12)


def test_equal_counts_change_nothing(capsys):
    logits, targets, _ = random_data(1)
    logits, targets = torch.tensor(logits), torch.tensor(targets)
    expected = F.cross_entropy(logits, targets).item()
    assert logit_adjusted_loss(logits, targets, [7] * 5).item() == pytest.approx(expected)
    assert torch.equal(adjusted(logits, [7] * 5).argmax(dim=1), logits.argmax(dim=1))
    term_for([7] * 5, classes=5)
    assert 'changes nothing here: every class has 7 training images' in capsys.readouterr().out
    term_for([7, 7, 7, 7, 6], classes=5)
    assert capsys.readouterr().out == ''


def test_float32_at_least_also_under_autocast():
    logits, targets, counts = random_data(2)
    expected = logit_adjusted_loss(torch.tensor(logits).bfloat16().double(), torch.tensor(targets), counts).item()
    with torch.autocast('cpu', torch.bfloat16):
        outputs = torch.tensor(logits).bfloat16()
        for loss in (logit_adjusted_loss(outputs, torch.tensor(targets), counts),
                     term_for(counts)(outputs, torch.tensor(targets), [])):
            assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
        assert adjusted(outputs, counts).dtype == torch.float32


def test_extreme_counts_and_logits_are_finite():
    logits = torch.tensor([[0.0, 0.0], [1e30, -1e30]], requires_grad=True)
    loss = logit_adjusted_loss(logits[:1], torch.tensor([1]), [10 ** 9, 1], 4.0)
    assert loss.item() == pytest.approx(4 * 9 * math.log(10), rel=1e-5)
    loss = logit_adjusted_loss(logits, torch.tensor([1, 0]), [10 ** 9, 1], 4.0)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_empty_batch_one_image_and_one_class():
    for targets in (torch.empty(0, dtype=torch.long), torch.empty(0, 3)):
        logits = torch.empty(0, 3, requires_grad=True)
        for loss in (logit_adjusted_loss(logits, targets, [1, 2, 3]), term_for([1, 2, 3])(logits, targets, [])):
            assert loss.item() == 0
            loss.backward()
            assert logits.grad.shape == (0, 3)
    assert adjusted(torch.empty(0, 3), [1, 2, 3]).shape == (0, 3)
    logits, targets, counts = random_data(3, batch=1)
    expected = oracle(logits, np.eye(5)[targets], counts, 1.0)
    assert logit_adjusted_loss(torch.tensor(logits), torch.tensor(targets), counts).item() == pytest.approx(expected)
    assert logit_adjusted_loss(torch.tensor([[0.3]]), torch.tensor([0]), [12]).item() == 0


@pytest.mark.parametrize('counts, message', [
    ([5, 0, 3], '0 for class 1'), ([5, 3, -2], '-2 for class 2'), ([1.5, 2, 3], '1.5 for class 0'),
    ([1, math.nan, 2], 'nan for class 1'), ([1, 2, math.inf], 'inf for class 2'), ([], 'shape'), ([[1, 2, 3]], 'shape'),
    ([1, 2], 'each of 3 classes')])
def test_wrong_counts(counts, message):
    for given in (counts, torch.tensor(counts)):
        with pytest.raises(ValueError, match=message):
            logit_adjusted_loss(torch.zeros(2, 3), torch.tensor([0, 1]), given)
        with pytest.raises(ValueError, match=message):
            adjusted(torch.zeros(2, 3), given)


def test_options_out_of_range():
    for tau in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match='tau'):
            logit_adjusted_loss(torch.zeros(2, 3), torch.tensor([0, 1]), [1, 2, 3], tau)
        with pytest.raises(ValueError, match='tau'):
            adjusted(torch.zeros(2, 3), [1, 2, 3], tau)
        with pytest.raises(ValueError, match='tau'):
            term_for([1, 2, 3], f'--tau={tau}')
    with pytest.raises(ValueError, match='0 for class 2'):
        term_for([1, 2, 0])
    with pytest.raises(ValueError, match='4 numbers'):
        term_for([1, 2, 3], classes=4)


def test_flags():
    parser = argparse.ArgumentParser()
    logit_adjustment.add_arguments(parser)
    args = parser.parse_args([])
    assert vars(args) == {'tau': 1.0} and logit_adjustment.cross_entropy_weight(args) == 0.0


def test_the_file_imports_torch_and_the_standard_library_alone_and_its_example_runs(capsys):
    path = ROOT / 'baselines/logit_adjustment.py'
    imports = re.findall(r'^ *(?:import|from) +(\w+)', path.read_text(), re.MULTILINE)
    assert 'torch' in imports and set(imports) - {'torch'} <= sys.stdlib_module_names
    runpy.run_path(str(path), run_name='__main__')
    assert 'adjusted loss' in capsys.readouterr().out
