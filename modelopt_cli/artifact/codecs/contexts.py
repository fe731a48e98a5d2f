"""Expected sizes of the symbols of a weight matrix, from those that came before.

The integers of a weight are read as a matrix: a row for each output, a column for each weight of one
output. How far from the middle the next one will be is told by its row so far, its column in the rows before,
and two of its row's symbols: the one before it and one that is ``lag`` before it, in a convolution the one
above it in the kernel. That expectation chooses one of a few distributions, its context. Everything is
computed with integers.

The idea is that of context modelling in image coders (Wu and Memon, "Context-based, adaptive, lossless image
coding", 1997); that a weight's size is about a product of a row's and a column's is the assumption of
factored second moments (Shazeer and Stern, "Adafactor", 2018).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from modelopt_cli.artifact.codecs.rans import SCALE_BITS

Integers = npt.NDArray[np.int64]

LARGEST = 255
"""Larger sizes count as this one."""
SIZE = 1 << 7
"""A size of 1 in sums of rows and columns."""
EXPECTED = 8 * SIZE
"""An expected size of 1."""
UNIT = 1 << 12
"""One in means and in the weights of columns."""
LOWEST_WEIGHT, HIGHEST_WEIGHT = UNIT >> 6, UNIT * LARGEST
GAIN_BITS = 20
TRUST = 4
"""Rows, or columns, of ordinary size that a column, or row, is taken to have had already."""


def _limits() -> list[int]:
    limits = [EXPECTED // 256]
    while limits[-1] < EXPECTED * LARGEST // 2:
        limits.append(limits[-1] * 3 // 2)
    return limits


LIMITS = _limits()
"""Between the contexts: 4, 6, 9, 13 and so on, each a half more than the one before, rounded down."""
_BASES = np.searchsorted(LIMITS, np.arange(LIMITS[-1] + 1), side="right") << SCALE_BITS
"""For each expectation, which slot is the first of its context when those of all contexts are counted."""


def sizes_of(symbols: npt.NDArray[np.integer[Any]], mirror: int) -> Integers:
    """Distances of symbols from the middle, ``mirror / 2``, in units of ``1 / SIZE``."""
    twice = np.abs(2 * symbols.astype(np.int64) - mirror)
    return np.minimum(twice, 2 * LARGEST) * (SIZE // 2)


def bases_of(sums: Integers, gains: Integers, offsets: Integers, left: Integers, above: Integers) -> Integers:
    """The first slots of the contexts of some symbols.

    Args:
        sums: of the sizes in their rows so far, in units of ``1 / SIZE``, like ``left`` and ``above``.
        gains: of their columns, see :class:`Columns`.
        offsets: of their columns.
        left: the sizes before them in their rows.
        above: the sizes ``lag`` before them in their rows.
    """
    expected = sums * gains
    expected >>= GAIN_BITS
    expected += offsets
    expected += left
    expected += above
    return _BASES.take(expected, mode="clip")


class Columns:
    """Statistics of the columns of the rows so far, for the next rows.

    Attributes:
        gains: how much of the sum of a row so far is expected in each column, ``(columns, 1)``.
        offsets: what is expected there of a row without a sum, ``(columns, 1)``.
        mean: of the sizes, in units of ``1 / SIZE``; stands for those to the left of a row.
    """

    def __init__(self, columns: int, reach: int) -> None:
        self._sums = np.zeros(columns, np.int64)
        self._rows = 0
        self._expect(np.full(columns, UNIT, np.int64), max(reach * UNIT // 5, 1))

    def see(self, sums: Integers, rows: int) -> None:
        """Take note of some more rows.

        Args:
            sums: of the sizes in each column of these rows, in units of ``1 / SIZE``.
            rows: how many there are.
        """
        self._sums += sums
        self._rows += rows
        total, columns = max(int(self._sums.sum()), 1), len(sums)
        ratios = np.minimum(self._sums * UNIT * columns // total, HIGHEST_WEIGHT)
        weights = (ratios * self._rows + TRUST * UNIT) // (self._rows + TRUST)
        mean = total * (UNIT // SIZE) // (self._rows * columns)
        self._expect(np.maximum(weights, LOWEST_WEIGHT), max(mean, 1))

    def _expect(self, weights: Integers, mean: int) -> None:
        """Three quarters of an expectation come from the row and the column, the rest from neighbours."""
        before = np.cumsum(weights) - weights
        gains = (6 * weights << GAIN_BITS) // (before + TRUST * UNIT)
        self.mean = mean * SIZE // UNIT
        self.gains = gains[:, None]
        self.offsets = (TRUST * mean * gains >> GAIN_BITS)[:, None] * SIZE // UNIT
