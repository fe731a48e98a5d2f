"""Values of an activation during calibration, summarised in bounded memory."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modelopt_cli.methods.batches import numbers_of
from modelopt_cli.program.quantization import BITS, QParams, levels_of, qparams_from_range

BINS = 4096
WIDENINGS = (0, 1 / 3, 2 / 3, 1)
"""Parts of the way from an observer's range to the whole one that are candidates."""
COUNTED = 1 << 18
"""Values of a batch that are counted, about. The smallest and the largest are those of all."""


class Histogram:
    """Smallest and largest value of an activation and, for an observer that needs them, counts by size.

    The range of ``counts`` doubles when a value falls outside, by merging neighbouring bins, so that what is
    held does not grow with the number of samples. Exact zeros, which a ReLU makes in masses and every range
    represents exactly, are counted apart. Of a batch with more than ``COUNTED`` values every k-th is counted,
    k times.

    Attributes:
        low: smallest value seen, at most 0.
        high: largest value seen, at least 0.
        counts: of values within ``-limit .. limit`` in ``BINS`` equal bins, float64 ``(BINS,)``.
        limit: upper end of the last bin.
        zeros: how many values were zero.
        whole: all values were whole numbers.
        levels: how many values the quantized activation can have.

    Args:
        choose: an observer's choice of the range.
        counting: the observer looks at how values are distributed.
        bits: of the quantized activation.
    """

    def __init__(
        self,
        choose: Callable[["Histogram"], tuple[float, float]],
        counting: bool = True,
        bits: int = BITS,
    ) -> None:
        self._choose, self._counting = choose, counting
        self.bits, self.levels = bits, levels_of(bits)
        self.low = self.high = self.limit = 0.0
        self.zeros = 0
        self.whole = True
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in one batch, a float tensor of any shape."""
        numbers = numbers_of(x)
        if x.numel():
            low, high = torch.aminmax(numbers)
            self.low = min(self.low, float(low))
            self.high = max(self.high, float(high))
            self.whole = self.whole and not bool(numbers.frac().any())
        if self._counting:
            every = _spacing(len(numbers))
            self._count(numbers[::every].float(), every)

    def _count(self, sample: Tensor, weight: int) -> None:
        extreme = max(-self.low, self.high)
        if extreme == 0.0:
            self.zeros += weight * len(sample)
            return
        if self.limit == 0.0:
            self.limit = extreme
        while self.limit < extreme:
            self._double()
        # What is out of range is not counted; a copy without the zeros would take longer.
        values = sample.masked_fill(sample == 0, math.inf)
        counts = torch.histc(values, BINS, -self.limit, self.limit).cpu().double()
        self.zeros += weight * (len(sample) - int(counts.sum()))
        self.counts += weight * counts

    def _double(self) -> None:
        """Cover twice the range with the same number of bins."""
        pairs = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[BINS // 4 : BINS // 4 + BINS // 2] = pairs
        self.limit *= 2

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, float64 ``(BINS,)``."""
        width = 2 * self.limit / BINS
        return -self.limit + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def range(self) -> tuple[float, float]:
        """The real range that uint8 should cover; it contains zero."""
        if self._counting and not bool(self.counts.any()):  # only zeros, or nothing at all
            return self.low, self.high
        return self._choose(self)

    def qparams(self) -> QParams:
        """Scale and zero point of that range or, of whole numbers, of one at which they are exact."""
        return qparams_from_range(*(self._exact_range() or self.range()), self.bits)

    def candidates(self) -> list[QParams]:
        """Scales and zero points to choose from: that of :meth:`qparams`, then wider ones, all different."""
        if self._exact_range() is not None:
            return [self.qparams()]
        low, high = self.range()
        ranges = [(low + part * (self.low - low), high + part * (self.high - high)) for part in WIDENINGS]
        return [*dict.fromkeys(qparams_from_range(*each, self.bits) for each in ranges)]

    def _exact_range(self) -> tuple[float, float] | None:
        """The smallest range in steps of 1, 1/2, 1/3, ... with all values, if these are whole numbers.

        At other steps each count is shifted, the same way for every sample: at 12 / 255, 3 becomes 3.01.
        There is nothing to be gained by clipping them. None where they span more than there are levels.
        """
        span, steps = self.high - self.low, self.levels - 1
        if not self.whole or not 0 < span <= steps:
            return None
        return self.low, self.low + steps / (steps // span)


def _spacing(numel: int) -> int:
    """The k by which every k-th of a tensor's numbers is about ``COUNTED`` of them, from all over it.

    It has no divisor in common with the sizes of the dimensions: a multiple of the number of channels would
    meet the same channel each time.
    """
    every = max(1, math.ceil(numel / COUNTED))
    while math.gcd(every, numel) > 1:
        every += 1
    return every
