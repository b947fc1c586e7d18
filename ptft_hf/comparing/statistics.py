"""What can be concluded from a few runs: intervals, tests and the correction for many of them. Pure functions.

A *run* is one training with one seed; ``S`` is a number of seeds, ``M`` of test examples. All tests are two-sided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

MIN_SEEDS = 3
"""With two seeds a t interval is 3.6 times as wide as with three: it says next to nothing."""
BOOTSTRAP_SEEDS = 10
"""A bootstrap over fewer seeds draws the same few values again and again, and its intervals are too narrow."""
RESAMPLES = 9_999
SMALLEST = 1e-12
"""What sums of doubles may be off by, relative to their size."""
POWER = 0.8
"""The chance to detect a true difference that sample sizes are planned for; Cohen's (1988) convention."""

Values = Sequence[float] | npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A mean and the confidence interval around it."""

    mean: float
    low: float
    high: float


def mean_interval(values: Values, confidence: float = 0.95) -> Interval:
    """The mean over seeds with Student's t interval, or from ten seeds on a symmetric bootstrap-t interval.

    Both are ``mean ± q * s / sqrt(S)``; ``q`` comes from the t distribution with ``S - 1`` degrees of freedom, or
    from ``|t*|`` of resamples (Hall 1988, "On symmetric bootstrap confidence intervals"), whose coverage with few
    values is nearer to the nominal one than the percentile method's.

    Args:
        values: [S] one number a seed, at least two.
        confidence: The nominal coverage.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        raise ValueError(f"an interval needs at least two values, not {len(x)}")
    error = _error(x)
    if len(x) >= BOOTSTRAP_SEEDS and error > 0:
        quantile = float(np.quantile(_bootstrap_t(x), confidence))
    else:
        quantile = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1))
    mean = float(x.mean())
    return Interval(mean, mean - quantile * error, mean + quantile * error)


def mean_p_value(values: Values) -> float:
    """The p-value of "the mean is 0", by the same distribution as :func:`mean_interval`.

    Where all values are equal, 1.0 if they are 0 and else 0.0, the limit of t: whether the test rows could have
    fallen so by chance is asked of the rows.

    Args:
        values: [S] one difference a seed, at least two.
    """
    x = np.asarray(values, dtype=np.float64)
    error = _error(x)
    if error == 0:
        return float(abs(x.mean()) <= SMALLEST)
    t = abs(float(x.mean())) / error
    if len(x) >= BOOTSTRAP_SEEDS:
        drawn = _bootstrap_t(x)
        return float((1 + (drawn >= t).sum()) / (1 + len(drawn)))
    return float(2 * stats.t.sf(t, len(x) - 1))


def _error(x: npt.NDArray[np.float64]) -> float:
    """The mean's standard error; 0.0 where values differ by rounding alone."""
    error = float(x.std(ddof=1)) / len(x) ** 0.5
    return error if error > SMALLEST * max(1.0, float(np.abs(x).max())) else 0.0


def _bootstrap_t(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``|t*|`` of resamples about the sample's mean: [at most RESAMPLES]; always the same for the same values."""
    drawn = x[np.random.default_rng(0).integers(0, len(x), (RESAMPLES, len(x)))]
    errors = drawn.std(axis=1, ddof=1) / np.sqrt(len(x))
    kept = errors > SMALLEST * max(1.0, float(np.abs(x).max()))  # a resample of one value alone has no t
    result: npt.NDArray[np.float64] = np.abs((drawn[kept].mean(axis=1) - x.mean()) / errors[kept])
    return result


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's (1947) test in its exact form: do two models err on equally many examples?

    Args:
        only_first: Examples that only the first model has right.
        only_second: Examples that only the second has right.

    Returns:
        The p-value, from the binomial distribution of the discordant examples with probability 1/2.
    """
    both = only_first + only_second
    return float(stats.binomtest(only_first, both, 0.5).pvalue) if both else 1.0


def mcnemar_over_runs(differences: npt.NDArray[np.float64]) -> float:
    """McNemar's test for several runs of each method on the same examples.

    The runs' answers to one example are no independent observations: an example is a cluster. With ``d_i`` the sum
    of its differences, ``(sum d_i)**2 / sum d_i**2`` is chi-squared with one degree of freedom (Durkalski et al.
    2003, "Analysis of clustered matched-pair data"); with one run a method that is McNemar's own
    ``(b - c)**2 / (b + c)``, and then the exact form is used. Scores other than right and wrong may be given.

    Args:
        differences: [S, M] score of the first method minus that of the second, by seed and example.
    """
    if len(differences) == 1 and np.isin(differences, (-1, 0, 1)).all():
        return mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    d = differences.sum(axis=0)
    squares = float((d**2).sum())
    return float(stats.chi2.sf(float(d.sum()) ** 2 / squares, 1)) if squares > 0 else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests: rejecting those up to alpha keeps the chance of *any* false
    rejection at alpha, whatever the tests' dependence (Holm 1979).

    Args:
        p_values: One a test.

    Returns:
        In the same order: of the k-th smallest of m, the largest of ``p * (m - k + 1)`` so far, at most 1.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


def inferiority_p_value(mean: float, error: float, margin: float, freedom: float) -> float:
    """One-sided test of non-inferiority: the p-value of "the difference is ``-margin`` or less".

    Two of them, of ``mean`` and of ``-mean``, are the test of equivalence (Schuirmann 1987).

    Args:
        mean: The difference; higher is better.
        error: Its standard error.
        margin: Above 0.
        freedom: Degrees of freedom of the t distribution; ``inf`` for the normal one.
    """
    if error <= 0:  # the limit of t
        return float(mean <= -margin)
    return float(stats.t.sf((margin + mean) / error, freedom))


def examples_needed(mean: float, deviation: float, level: float) -> float:
    """Test examples with which a true difference of ``mean`` would be found with a chance of :data:`POWER`.

    ``((z(1 - level/2) + z(power)) * deviation / mean)**2``, the usual sum for paired differences; ``inf`` for no
    difference.

    Args:
        mean: Difference of the two methods.
        deviation: Standard deviation of the examples' differences, each averaged over the seeds.
        level: Two-sided level at which the difference is tested.
    """
    if mean == 0:
        return float("inf")
    z = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(POWER)
    return float((z * deviation / mean) ** 2)


def seeds_needed(mean: float, deviation: float, level: float, most: int = 1_000) -> int | None:
    """Seeds with which a paired t test would find a true difference of ``mean`` with a chance of :data:`POWER`.

    Args:
        mean: Difference of the two methods.
        deviation: Standard deviation of the seeds' differences.
        level: Two-sided level of the test.
        most: None if it would take more, or there is no difference.
    """
    if mean == 0:
        return None
    if deviation <= 0:
        return MIN_SEEDS
    n = np.arange(MIN_SEEDS, most + 1)
    effect = abs(mean) / deviation * np.sqrt(n)
    chance = stats.nct.sf(stats.t.ppf(1 - level / 2, n - 1), n - 1, effect)
    enough = np.flatnonzero(chance >= POWER)
    return int(n[enough[0]]) if len(enough) else None
