"""Sums and means over draws of samples, which the metrics of tasks are made of.

A draw says how often each sample counts: once each for the metric itself, and differently for every draw of
``measure.bootstrap``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
"""How often each sample is in each draw, ``(draws, samples)``."""
Values = NDArray[np.float64]
"""A metric of each draw, ``(draws,)``."""
AT_ONCE = 1 << 22
"""Numbers that are held at a time, so that the memory does not grow with the samples."""


def in_rows(counts: Counts, width: int, value: Callable[[Counts], Values]) -> Values:
    """``value(counts)``, some draws at a time, where it needs ``width`` numbers for each of them."""
    rows = max(1, AT_ONCE // max(1, width))
    return np.concatenate([value(counts[start : start + rows]) for start in range(0, len(counts), rows)])


def mean(kept: NDArray[Any], counts: Counts) -> Values:
    """Mean over the samples of a draw of one number for each, ``(N,)``."""
    return counts @ kept.astype(np.float64) / counts.sum(1)  # type: ignore[no-any-return]


def share(kept: NDArray[Any], counts: Counts) -> Values:
    """The sum of the first column, ``(N, 2)``, over that of the second; NaN where that is 0."""
    total = counts @ kept.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total[:, 1] > 0, total[:, 0] / total[:, 1], np.nan)


def sums(kept: NDArray[Any], counts: Counts) -> NDArray[np.float64]:
    """Sums over the samples of a draw of ``kept`` ``(N, parts, D)``: ``(parts, draws, D)``."""
    return np.moveaxis(np.tensordot(counts, kept, 1), 1, 0)


def nan_mean(parts: Sequence[Values]) -> Values:
    """Mean of the parts that are numbers, at each place; NaN where none is."""
    stacked = np.stack(parts)
    known = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        return np.where(known, stacked, 0).sum(0) / known.sum(0)  # type: ignore[no-any-return]
