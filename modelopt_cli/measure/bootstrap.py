"""Paired bootstrap: the interval of the difference of a metric where no closed form is right.

Samples are drawn with replacement, for both models the same ones, and the metric is computed again for each
draw (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8). A draw is a row of counts: how
often each sample is in it. The ends of the interval are quantiles of the differences, at levels that widen it
as a t distribution and the sample's own standard deviation would (Hesterberg, What Teachers Should Know About
the Bootstrap, The American Statistician 69:371, 2015, section 4.1): plain percentiles are too narrow for few
samples.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelopt_cli.measure.statistics import Z_95

RESAMPLES = 2000
SEED = 20260415
AT_ONCE = 1 << 22
"""Counts that are held at a time, so that the memory does not grow with the samples."""

Counts = NDArray[np.float64]
"""How often each sample is in each draw, ``(draws, samples)``."""
Value = Callable[[Any, Counts], NDArray[np.float64]]
"""A metric of each draw, ``(draws,)``, from what it keeps of the samples."""


@dataclass(frozen=True)
class Spread:
    """95 % interval of a difference.

    Attributes:
        low: lower end.
        high: upper end.
    """

    low: float
    high: float


def bootstrap(value: Value, first: Any, second: Any, samples: int) -> Spread:
    """The interval of ``value(first) - value(second)``.

    Args:
        value: the metric.
        first: what the metric keeps of the samples for one model.
        second: the same for another model, of the same samples in the same order.
        samples: number of samples, or of whatever is drawn.

    Returns:
        The interval. Draws for which the metric is not a number, of samples without a positive say, do not
        count; where none counts, or of fewer than two samples, the interval is endless.
    """
    if samples < 2:
        return Spread(-math.inf, math.inf)
    parts = [value(first, counts) - value(second, counts) for counts in draws(samples)]
    differences = np.concatenate(parts)
    differences = differences[np.isfinite(differences)]
    if not differences.size:
        return Spread(-math.inf, math.inf)
    tail = expanded_tail(samples)
    low, high = np.quantile(differences, (tail, 1 - tail))
    return Spread(float(low), float(high))


def draws(samples: int, count: int = RESAMPLES, seed: int = SEED) -> Iterator[Counts]:
    """Counts of ``count`` draws of as many samples as there are, some at a time; always the same ones."""
    generator = np.random.default_rng((seed, samples))
    rows = max(1, min(count, AT_ONCE // max(1, samples)))
    for start in range(0, count, rows):
        here = min(rows, count - start)
        picked = generator.integers(samples, size=(here, samples))
        picked += np.arange(here)[:, None] * samples
        yield np.bincount(picked.ravel(), minlength=here * samples).reshape(here, samples).astype(np.float64)


def once(samples: int) -> Counts:
    """Counts of the samples as they are, ``(1, samples)``."""
    return np.ones((1, samples))


def expanded_tail(samples: int) -> float:
    """Share of the draws outside the interval, on each side: 0.025 for endless samples, less for few."""
    stretched = math.sqrt(samples / (samples - 1)) * t_quantile(samples - 1)
    return NormalDist().cdf(-stretched)


def t_quantile(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution, to four digits.

    From a table below five degrees of freedom, by an expansion around the normal distribution from there on
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    """
    if degrees < len(_EXACT):
        return _EXACT[degrees]
    z, n = Z_95, float(degrees)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / n**power for power, term in enumerate(terms))


_EXACT = (math.inf, 12.706205, 4.302653, 3.182446, 2.776445)


def in_rows(
    counts: Counts, width: int, value: Callable[[Counts], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """``value(counts)``, some draws at a time, where it needs ``width`` numbers for each of them."""
    rows = max(1, AT_ONCE // max(1, width))
    return np.concatenate([value(counts[start : start + rows]) for start in range(0, len(counts), rows)])
