"""Intervals, p-values and verdicts against plain loops over their definitions, and against chance."""
import itertools
import math
import warnings

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import t as student

from utils.lab import statistics
from utils.lab.runs import UP
from utils.lab.statistics import Interval, fewest_pairs, holm, paired, sign_flip, verdict, welch

A, B = [81.2, 80.4, 82.9, 81.7, 80.9, 83.0], [80.1, 80.0, 81.5]
DIFFERENCES = [0.9, -0.2, 1.4, 0.3, 0.8, 1.1, 0.5, -0.4]


@pytest.fixture(autouse=True)
def nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def mean(values):
    return sum(values) / len(values)


def variance(values):
    return sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1)


@pytest.mark.parametrize('one, other', [(A, B), (B, A), (A[:2], B[:2]), ([1.0, 1.0], [2.0, 4.0]), (A, A)])
def test_welch_is_the_interval_of_the_paper(one, other):
    first, second = variance(one) / len(one), variance(other) / len(other)
    freedom = (first + second) ** 2 / (first ** 2 / (len(one) - 1) + second ** 2 / (len(other) - 1))
    half = student.ppf(0.975, freedom) * math.sqrt(first + second)
    middle = mean(one) - mean(other)
    assert welch(one, other) == pytest.approx((middle, middle - half, middle + half), rel=1e-9, abs=1e-12)


def test_welch_of_a_single_run_and_of_constant_ones():
    assert welch([1.0], A) is None and welch(A, [1.0]) is None
    assert welch([3.0, 3.0], [1.0, 1.0, 1.0]) == Interval(2.0, 2.0, 2.0)


def bca(differences, resamples):
    """Efron's bias-corrected and accelerated interval of the mean, with these means of resamples, step by step."""
    n, observed = len(differences), mean(differences)
    below = sum(int(value < observed) + int(value <= observed) for value in resamples) / (2 * len(resamples))
    z0 = ndtri(below)
    left_out = [mean(differences[:index] + differences[index + 1:]) for index in range(n)]
    centre = mean(left_out)
    acceleration = (sum((centre - value) ** 3 for value in left_out)
                    / (6 * sum((centre - value) ** 2 for value in left_out) ** 1.5))
    ends = []
    for z in (ndtri(0.025), ndtri(0.975)):
        ends.append(np.quantile(resamples, ndtr(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))))
    return ends


@pytest.mark.parametrize('differences', [DIFFERENCES, DIFFERENCES[:3], [5.0, 5.1, 9.9, 5.2, 5.0], [0.0, 0.0, 0.0, 1.0]])
def test_the_paired_interval_is_bca(differences):
    generator = np.random.default_rng(7)
    resamples = [mean(list(generator.choice(differences, len(differences)))) for _ in range(20000)]
    low, high = bca(differences, resamples)
    found, spread = paired(differences), np.ptp(differences)
    assert found.mean == pytest.approx(mean(differences))
    assert abs(found.low - low) < 0.04 * spread and abs(found.high - high) < 0.04 * spread  # other resamples
    assert paired(differences) == found  # the same each time


def test_paired_edges():
    assert paired([]) is None and paired([1.0, 2.0]) is None
    assert paired([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5) and paired([0.0] * 9) == Interval(0, 0, 0)
    assert paired([0.1 + 0.2, 0.3, 0.3]) == Interval(*[pytest.approx(0.3)] * 3)  # equal but for rounding


@pytest.mark.parametrize('differences', [
    DIFFERENCES, DIFFERENCES[:6], [1.0] * 6, [-1.0] * 7, [0.0] * 6, [1.0, -1.0] * 3, [1e-9, 2.0, 3.0, -1.0, 0.5, 0.5]])
def test_the_sign_flip_p_counts_all_changes_of_signs(differences):
    observed, extreme, number = abs(sum(differences)), 0, 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        number += 1
        extreme += abs(sum(sign * each for sign, each in zip(signs, differences))) >= observed - 1e-12
    assert sign_flip(differences) == pytest.approx(extreme / number, abs=1e-12)
    assert sign_flip([-each for each in differences]) == sign_flip(differences)


@pytest.mark.parametrize('counts', [[-1, 2, 6, 7, 1, 5, 1], [3, -3, 1, 2, -2, 4, 4, 1], [1, 1, 1, 1, 1, 1, -6]])
def test_sums_that_are_equal_but_for_rounding_are_ties(counts):
    """Differences of accuracies of 10,000 images have the p of their counts."""
    of_counts = sum(abs(sum(sign * each for sign, each in zip(signs, counts))) >= abs(sum(counts)) for signs
                    in itertools.product((1, -1), repeat=len(counts))) / 2 ** len(counts)
    for first in (9021, 8765, 7003):
        differences = [100 * (first + 7 * index + count) / 10000 - 100 * (first + 7 * index) / 10000
                       for index, count in enumerate(counts)]
        assert sign_flip(differences) == pytest.approx(of_counts, abs=1e-12) == sign_flip(list(map(float, counts)))


def test_the_sign_flip_needs_six_pairs_and_is_drawn_beyond_sixteen():
    assert sign_flip([1.0] * 5) is None and sign_flip([]) is None
    assert sign_flip([1.0] * 6) == 2 / 2 ** 6 and sign_flip([1.0] * 16) == 2 / 2 ** 16
    values = list(np.random.default_rng(0).normal(0.4, 1, 20))
    exact = sum(abs(sum(s * v for s, v in zip(signs, values))) >= abs(sum(values))
                for signs in np.random.default_rng(1).choice([-1, 1], (20000, 20))) / 20000
    assert sign_flip(values) == pytest.approx(exact, abs=0.01) and sign_flip(values) == sign_flip(values)


def test_holm_step_by_step():
    ps = [0.03, None, 0.01, 0.04, 0.005]
    # 0.005 * 4, then 0.01 * 3, then 0.03 * 2, then 0.04 * 1, which may not fall below the one before it
    assert holm(ps) == pytest.approx([0.06, None, 0.03, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None] and holm([0.02]) == [0.02]


@pytest.mark.parametrize('interval, p, expected', [
    (Interval(1, 0.1, 2), 0.05, 'better'), (Interval(-1, -2, -0.1), 0.01, 'worse'),
    (Interval(1, 0.1, 2), 0.051, 'not shown'), (Interval(1, -0.1, 2), 0.01, 'not shown'),
    (Interval(1, 0.0, 2), 0.01, 'not shown'), (Interval(1, 0.5, 2), None, 'not shown'), (None, 0.01, 'not shown')])
def test_a_verdict_needs_both(interval, p, expected):
    assert verdict(interval, p, *UP) == expected
    mirrored = {'better': 'worse', 'worse': 'better'}.get(expected, expected)
    assert verdict(interval, p, *UP[::-1]) == mirrored


@pytest.mark.parametrize('exponent', [-700, -366, 0, 1000])
def test_the_size_of_the_unit_decides_nothing(exponent):
    """As where a margin is divided by a product of many norms, of which the bootstrap takes cubes."""
    whole = [3.1, 2.7, 3.3, 2.9, 3.6, 2.5, 3.0, 3.2]
    differences = [math.ldexp(each, exponent) for each in whole]
    assert paired(differences) == tuple(math.ldexp(end, exponent) for end in paired(whole))
    assert verdict(paired(differences), sign_flip(differences), *UP) == 'better'
    assert verdict(Interval(1.0, math.nan, math.nan), 0.01, *UP) == 'not shown'


def test_fewer_than_six_pairs_show_nothing_whatever_they_are():
    for pairs in range(6):
        differences = [100.0 + each for each in range(pairs)]
        assert verdict(paired(differences), sign_flip(differences), *UP) == 'not shown'


@pytest.mark.parametrize('methods, pairs', [(1, 6), (2, 7), (5, 8), (6, 8), (7, 9)])
def test_the_fewest_pairs_that_can_show_anything(methods, pairs):
    assert fewest_pairs(methods) == pairs
    assert methods * 2 / 2 ** pairs <= 0.05 and (pairs == 6 or methods * 2 / 2 ** (pairs - 1) > 0.05)


def test_without_an_effect_tables_seldom_claim_anything():
    """100 tables of five methods and ten seeds of pure chance: at most 5 should claim something, and 12 by bad luck."""
    generator, claims = np.random.default_rng(3), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, 'RESAMPLES', 499)
        for _ in range(100):
            plain = generator.normal(size=10)
            differences = [list(generator.normal(size=10) - plain) for _ in range(5)]
            corrected = holm([sign_flip(each) for each in differences])
            claims += any(p <= 0.05 and verdict(paired(each), p, *UP) != 'not shown'
                          for each, p in zip(differences, corrected))
    assert claims <= 12


def test_with_a_large_effect_tables_claim_it():
    generator = np.random.default_rng(4)
    for _ in range(5):
        differences = list(generator.normal(3, 1, 10))
        assert verdict(paired(differences), holm([sign_flip(differences), 1, 1, 1, 1])[0], *UP) == 'better'
