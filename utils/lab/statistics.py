"""Is the difference between two settings more than chance: intervals, exact p-values, a verdict.

Two groups of runs are compared by Welch's interval. Runs of the same seed share their training images, initial weights
and order of batches, so their differences are compared too, which is the sharper test where the seed draws the images:
by a BCa bootstrap interval (Efron, JASA 1987) and an exact sign-flip test, which assumes that the differences are
independent and symmetric about 0 if the method does nothing. Holm's correction (Scandinavian Journal of Statistics
1979) keeps the chance of any false claim about a metric at 5% in a table, and in a grid in each of its rows.

For few pairs the BCa interval is short: of 2000 draws from a normal distribution the nominal 95% covered the mean in
0.88 with 8 pairs, 0.89 with 9, 0.92 with 10 and 0.93 with 16, Student's interval in 0.95 to 0.96. So a verdict needs
the test too.
"""
import statistics
import warnings
from typing import NamedTuple

import numpy as np

# scipy.stats is imported where it is used: it takes a second or more, which a mistake in the flags should not pay.

LEVEL = 0.05  # the chance of a false claim
RESAMPLES = 9999  # of the bootstrap
FLIPS = 99999  # of the signs: all of them up to 16 pairs, else drawn ones
FEWEST_FOR_INTERVAL, FEWEST_FOR_P = 3, 6  # pairs; the smallest p of 5 pairs is 2 / 2^5 = 0.0625


class Interval(NamedTuple):
    """A mean and its 95% interval."""
    mean: float
    low: float
    high: float


def welch(values, baseline):
    """The difference of the means of two lists with Welch's interval; None if either has a single number.

    (m1 - m2) -+ t_0.975(f) s with s^2 = s1^2 / n1 + s2^2 / n2 and f as in Welch (Biometrika 1947).
    """
    if min(len(values), len(baseline)) < 2:
        return None
    from scipy import stats

    difference = statistics.fmean(values) - statistics.fmean(baseline)
    if len(set(values)) == len(set(baseline)) == 1:
        return Interval(difference, difference, difference)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Precision loss occurred')  # where one of the lists is constant
        low, high = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval(1 - LEVEL)
    return Interval(difference, float(low), float(high))


def paired(differences):
    """The mean of a list of differences, one for each seed, with its BCa bootstrap interval; None below 3 pairs."""
    if len(differences) < FEWEST_FOR_INTERVAL:
        return None
    from scipy import stats

    mean, largest = statistics.fmean(differences), np.abs(differences).max()
    if np.ptp(differences) <= 1e-12 * largest:  # equal but for rounding: nothing to draw from
        return Interval(mean, mean, mean)
    _, exponent = np.frexp(largest)  # a power of 2, which rounds nothing: the cubes of what is very small would be 0
    result = stats.bootstrap((np.ldexp(differences, -exponent),), np.mean, method='BCa', n_resamples=RESAMPLES,
                             random_state=np.random.default_rng(0))
    return Interval(mean, *(float(np.ldexp(end, exponent)) for end in result.confidence_interval))


def sign_flip(differences):
    """The two-sided p of the mean of a list of differences under all changes of their signs; None below 6 pairs."""
    if len(differences) < FEWEST_FOR_P:
        return None
    from scipy import stats

    # Sums that are equal but for rounding count as equal: binary numbers only approach hundredths, as accuracies are.
    scaled = np.array(differences) / (np.abs(differences).max() or 1)
    return float(stats.permutation_test((scaled,), lambda x, axis=-1: np.mean(x, axis=axis).round(10),
                                        permutation_type='samples', n_resamples=FLIPS,
                                        random_state=np.random.default_rng(0)).pvalue)


def holm(ps):
    """A list of p-values, each corrected for the number of all; None stays and does not count."""
    known = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    corrected, largest = list(ps), 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def verdict(interval, p, above, below):
    """The word `above` or `below` if the paired interval is above or below 0 and the corrected p is at most 0.05; else
    'not shown'.
    """
    if interval is None or p is None or p > LEVEL:
        return 'not shown'
    return above if interval.low > 0 else below if interval.high < 0 else 'not shown'


def needed(pairs):
    """None if so many pairs of each method can show something, otherwise how many of each can."""
    tested = [number for number in pairs if number >= FEWEST_FOR_P] or pairs  # the others have no p to correct for
    fewest = fewest_pairs(len(tested))
    return fewest if fewest > max(tested, default=fewest) else None


def fewest_pairs(methods):
    """How many pairs can show anything among so many methods: the least n with methods * 2 / 2^n <= 5%."""
    pairs = FEWEST_FOR_P
    while methods * 2 / 2 ** pairs > LEVEL:
        pairs += 1
    return pairs
