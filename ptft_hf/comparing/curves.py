"""Learning curves: what twice as many labels would bring, and how well such a forecast has worked so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ptft_hf.comparing.statistics import MIN_SEEDS, Interval, mean_interval

MIN_SIZES = 4
"""A power law has three numbers: with four sizes one can be hidden and the law still be fitted."""
EXPONENTS = np.geomspace(0.05, 2.0, 200)
"""Searched. Error falls with exponents of about 0.07 to 0.35 in published curves (Hestness et al. 2017), and with
larger ones where a small data set is nearly learnt."""

Numbers = npt.NDArray[np.float64]


class Law(NamedTuple):
    """``quality(n) = limit - gain * n ** -exponent``"""

    limit: float
    gain: float
    exponent: float

    def at(self, size: float) -> float:
        """The quality with so many labels."""
        return float(self.limit - self.gain * size**-self.exponent)


class Forecast(NamedTuple):
    """Of one method, with twice the labels of its largest training set."""

    size: int
    expected: Interval
    """The law fitted to each seed's curve; mean and t interval over the seeds."""
    hidden: list[int]
    """Sizes that were hidden for the check, the largest ones."""
    predicted: float
    """Mean over the seeds of what the smaller sizes foretold of the largest."""
    measured: float
    without_law: float
    """What "it stays as it is at the largest size not hidden" would have foretold."""

    @property
    def held(self) -> bool:
        """Whether the law came nearer to the hidden point than "it stays as it is"."""
        return abs(self.predicted - self.measured) <= abs(self.without_law - self.measured)


def fit(sizes: Sequence[int] | Numbers, quality: Numbers, ceiling: float = np.inf) -> Law:
    """The inverse power law of learning curves (Cortes et al. 1994; Figueroa et al. 2012), by least squares.

    For each exponent the other two numbers are a linear fit, so the search has one dimension and cannot get stuck.
    Curves that fall get a flat law.

    Args:
        sizes: [K] training rows, at least three.
        quality: [K] higher is better.
        ceiling: The highest quality there is.
    """
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    best, least = Law(float(y.mean()), 0.0, 1.0), float(((y - y.mean()) ** 2).sum())
    for exponent in EXPONENTS:
        x = n**-exponent
        slope, limit = np.polyfit(x, y, 1)
        if limit > ceiling:  # as high as it may be, and the slope that is best then
            limit, slope = ceiling, -float(x @ (ceiling - y) / (x @ x))
        left = float(((limit + slope * x - y) ** 2).sum())
        if slope < 0 and left < least:
            best, least = Law(float(limit), float(-slope), float(exponent)), left
    return best


def forecast(sizes: Sequence[int], quality: Numbers, ceiling: float = np.inf) -> Forecast | None:
    """What twice the labels would bring, and the same forecast of the largest sizes from the smaller ones.

    Args:
        sizes: [K] training rows, ascending.
        quality: [S, K] by seed and size, higher is better.
        ceiling: The highest quality there is.

    Returns:
        None with fewer than :data:`MIN_SIZES` sizes, or seeds than an interval needs.
    """
    if len(sizes) < MIN_SIZES or len(quality) < MIN_SEEDS:
        return None
    kept = len(sizes) - max(1, len(sizes) // 3)
    target = 2 * sizes[-1]
    expected = mean_interval([fit(sizes, curve, ceiling).at(target) for curve in quality])
    return Forecast(
        target,
        expected._replace(high=min(expected.high, ceiling)),
        list(sizes[kept:]),
        float(np.mean([fit(sizes[:kept], curve[:kept], ceiling).at(sizes[-1]) for curve in quality])),
        float(quality[:, -1].mean()),
        float(quality[:, kept - 1].mean()),
    )
