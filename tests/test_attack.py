"""FGSM and PGD: where a linear network makes the worst image known in closed form, and in the bounds of what an image
is.
"""
import argparse

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from utils.lab.attack import Attack

MEAN, STD = torch.tensor([120.0, 100.0, 80.0]), torch.tensor([60.0, 50.0, 70.0])


def normalised(pixels):
    return (pixels - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def in_pixels(inputs):
    return inputs * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)


def images(seed, number=4):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (number, 3, 5, 5), generator=generator).float()
    pixels[0] = 0
    pixels[-1] = 255
    return pixels, torch.randint(2, (number,), generator=generator)


def attack(kind, weight, epsilon, steps=10, seed=0):
    """On the logits (w.x, 0)."""
    def outputs(inputs):
        score = (inputs * weight).flatten(1).sum(dim=1)
        return torch.stack((score, torch.zeros_like(score)), dim=1), 'what a head adds'

    return Attack(kind, outputs, epsilon, steps, MEAN, STD, torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([0.0, 1 / 255, 8 / 255, 0.3, 1.0]),
       kind=st.sampled_from(['fgsm', 'pgd']))
def test_a_linear_network_is_fooled_as_much_as_the_cube_allows(seed, epsilon, kind):
    pixels, targets = images(seed)
    weight = 0.01 * torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(seed + 1))
    moved = in_pixels(attack(kind, weight, epsilon)(normalised(pixels), targets))
    # what helps class 0 hurts it where it is the target
    down = torch.where(targets == 0, -1.0, 1.0)[:, None, None, None]
    expected = (pixels + 255 * epsilon * down * weight.sign()).clamp(0, 255)
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-3)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([1 / 255, 0.1, 1.0]), steps=st.integers(1, 4))
def test_it_stays_in_the_cube_and_between_black_and_white(seed, epsilon, steps):
    pixels, targets = images(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 2))
    before = [p.clone() for p in net.parameters()]
    for kind in ('fgsm', 'pgd'):
        made = Attack(kind, net, epsilon, steps, MEAN, STD, torch.Generator().manual_seed(0))
        with torch.no_grad():
            moved = in_pixels(made(normalised(pixels), targets))
        assert (moved - pixels).abs().max() <= 255 * epsilon + 1e-3
        assert -1e-3 <= moved.min() and moved.max() <= 255 + 1e-3
        assert not moved.requires_grad and all(p.grad is None and torch.equal(p, q) for p, q
                                               in zip(net.parameters(), before))


def test_fgsm_is_one_step_and_pgd_begins_at_random():
    pixels, targets = images(0)
    weight = torch.zeros(3, 5, 5)  # no slope: fgsm moves nothing, pgd stays where it began
    assert torch.equal(attack('fgsm', weight, 0.1)(normalised(pixels), targets), normalised(pixels))
    first, again, other = (in_pixels(attack('pgd', weight, 0.1, seed=seed)(normalised(pixels), targets)) for seed
                           in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    inner = (first - pixels)[1:-1].abs()  # without the black and the white image
    assert 0.4 * 25.5 < inner.mean() < 0.6 * 25.5 and inner.max() <= 25.5 + 1e-3


@pytest.mark.parametrize('text, value', [('8/255', 8 / 255), ('0.1', 0.1), ('0', 0), ('1', 1), ('1e-2', 0.01)])
def test_epsilon_is_read_as_a_share(text, value):
    assert evaluate.pixels(text) == value


@pytest.mark.parametrize('text', ['8', '-1/255', '1/0', 'much', '', 'nan', '256/255'])
def test_another_epsilon_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match='from 0 to 1, such as 8/255, was given'):
        evaluate.pixels(text)
