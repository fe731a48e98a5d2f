"""Choosing the range of an activation from what flows through it, in bounded memory.

Every observer keeps the running minimum and maximum; all but ``minmax`` also keep a histogram of
fixed size whose range doubles when a value falls outside, by merging neighbouring bins. What it
holds does not grow with the number of samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from modelopt_cli.program.quantization import QMAX, QMIN, QParams, qparams_from_range

BINS = 4096
LEVELS = QMAX - QMIN + 1
FRACTIONS = torch.linspace(0.2, 1.0, 81, dtype=torch.float64)
"""Candidate clipping points, as fractions of the observed extreme."""


class Observer(ABC):
    """Watches the batches of one activation and proposes its QParams."""

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0

    def update(self, x: Tensor) -> None:
        """Take in one batch, a float tensor of any shape."""
        if x.numel():
            low, high = torch.aminmax(x.detach())
            self.low = min(self.low, float(low))
            self.high = max(self.high, float(high))

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """The real range that uint8 should cover; it contains zero."""

    def qparams(self) -> QParams:
        """Scale and zero point of the proposed range."""
        return qparams_from_range(*self.range())


class MinMax(Observer):
    """The whole observed range (Jacob et al., CVPR 2018, section 3)."""

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class Histogram(Observer):
    """Base of the observers that need to know how values are distributed.

    ``counts`` covers ``-limit .. limit`` in ``BINS`` equal bins. Exact zeros, which a ReLU makes in
    masses and every range represents exactly, are counted apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.limit = 0.0
        self.zeros = 0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        super().update(x)
        extreme = max(-self.low, self.high)
        if extreme == 0.0:
            self.zeros += x.numel()
            return
        if self.limit == 0.0:
            self.limit = extreme
        while self.limit < extreme:
            self._double()
        flat = x.detach().reshape(-1).float()
        values = flat[flat != 0]
        self.zeros += flat.numel() - values.numel()
        self.counts += torch.histc(values, BINS, -self.limit, self.limit).cpu().double()

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


class Percentile(Histogram):
    """The range that leaves out the outermost 0.001 % of values on either side.

    Wu et al., "Integer Quantization for Deep Learning Inference" (2020), section 3.3.
    """

    fraction = 0.99999

    def range(self) -> tuple[float, float]:
        if self.counts.sum() == 0:
            return self.low, self.high
        counts = self.counts.clone()
        counts[BINS // 2] += self.zeros
        cumulative = counts.cumsum(0) / counts.sum()
        edges = torch.linspace(-self.limit, self.limit, BINS + 1, dtype=torch.float64)
        low = edges[int(torch.searchsorted(cumulative, 1 - self.fraction, right=True))]
        high = edges[min(int(torch.searchsorted(cumulative, self.fraction)) + 1, BINS)]
        return min(max(float(low), self.low), 0.0), max(min(float(high), self.high), 0.0)


class MeanSquaredError(Histogram):
    """The range with the least expected squared error of clipping and rounding.

    Banner et al., "Post training 4-bit quantization of convolutional networks" (NeurIPS 2019),
    section 3, minimised on the observed histogram instead of a fitted distribution.
    """

    def range(self) -> tuple[float, float]:
        if self.counts.sum() == 0:
            return self.low, self.high
        low, high = self.low, self.high
        # Two passes of coordinate descent; the other side's choice hardly moves this one's.
        for _ in (1, 2):
            low = self._best(self.low, partial(self._error, high=high))
            high = self._best(self.high, partial(self._error, low))
        return low, high

    def _best(self, extreme: float, error: Callable[[float], float]) -> float:
        if extreme == 0.0:
            return 0.0
        candidates = [float(f) * extreme for f in FRACTIONS]
        return min(candidates, key=error)

    def _error(self, low: float, high: float) -> float:
        step = (high - low) / (LEVELS - 1)
        clipped = (self.centres - self.centres.clamp(low, high)).square()
        inside = (self.centres >= low) & (self.centres <= high)
        return float((self.counts * (clipped + inside * (step * step / 12))).sum())


class Entropy(Histogram):
    """The range whose quantized distribution diverges least from the observed one.

    Migacz, "8-bit Inference with TensorRT" (GTC 2017): Kullback-Leibler divergence between the
    clipped histogram and its projection onto the quantization levels.
    """

    def range(self) -> tuple[float, float]:
        if self.counts.sum() == 0:
            return self.low, self.high
        best = min((float(f) for f in FRACTIONS), key=lambda f: self._divergence(f * self.low, f * self.high))
        return best * self.low, best * self.high

    def _divergence(self, low: float, high: float) -> float:
        centres = self.centres
        inside = (centres >= low) & (centres <= high)
        if not inside.any():
            return float("inf")
        p = self.counts[inside].clone()
        # What is clipped lands on the outermost bins, which is what clipping does to it.
        p[0] += self.counts[centres < low].sum()
        p[-1] += self.counts[centres > high].sum()
        kept = self.counts[inside]
        level = ((centres[inside] - low) / (high - low) * (LEVELS - 1)).round().long()
        used = (kept > 0).double()
        mass = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, kept)
        bins = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, used)
        q = (mass / bins.clamp(min=1))[level] * used
        p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
        seen = p > 0
        return float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "entropy": Entropy,
}
