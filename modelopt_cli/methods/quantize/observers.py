"""Observers: how the range of an activation is chosen from the values that calibration shows.

One row each. Imports no torch, so that the command line reads it, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelopt_cli.methods.quantize.histogram import Histogram

Range = tuple[float, float]
FINE = 256
"""Levels from which on a step is far smaller than most values."""


@dataclass(frozen=True)
class Observer:
    """One way to choose the range of an activation.

    Attributes:
        name: in ``--observer`` and the history.
        help: one line.
        paper: where it is described.
        choose: the real range that uint8 should cover, of the values seen; it contains zero.
        needs_counts: it looks at how values are distributed, not only at the smallest and the largest.
        judges: ranges from that up to the whole one are tried, and the one stays by which the operations
            that read the value lose the least (``reader_errors``).
    """

    name: str
    help: str
    paper: str
    choose: "Callable[[Histogram], Range]"
    needs_counts: bool = True
    judges: bool = False


def _minmax(seen: "Histogram") -> Range:
    return seen.low, seen.high


def _percentile(seen: "Histogram") -> Range:
    """Leave out the outermost 0.001 % of the values on either side."""
    import torch

    kept, bins = 0.99999, len(seen.counts)
    counts = seen.counts.clone()
    counts[bins // 2] += seen.zeros
    cumulative = counts.cumsum(0) / counts.sum()
    edges = torch.linspace(-seen.limit, seen.limit, bins + 1, dtype=torch.float64)
    low = edges[int(torch.searchsorted(cumulative, 1 - kept, right=True))]
    high = edges[min(int(torch.searchsorted(cumulative, kept)) + 1, bins)]
    return min(max(float(low), seen.low), 0.0), max(min(float(high), seen.high), 0.0)


def _mean_squared_error(seen: "Histogram") -> Range:
    """Minimise the squared error of clipping and rounding on the histogram, not on a fitted distribution."""
    low, high = seen.low, seen.high
    # Two passes of coordinate descent; the other side's choice hardly moves this one's.
    for _ in (1, 2):
        low = _best(seen.low, seen.levels, partial(_squared_error, seen, high=high))
        high = _best(seen.high, seen.levels, partial(_squared_error, seen, low))
    return low, high


def _best(extreme: float, levels: int, error: Callable[[float], float]) -> float:
    candidates = _clipped(extreme, levels)
    return min(candidates, key=error) if extreme else 0.0


def _squared_error(seen: "Histogram", low: float, high: float) -> float:
    step = (high - low) / (seen.levels - 1)
    centres = seen.centres
    if seen.levels < FINE:
        # Most values may be smaller than a step, which the error of a step says too much of.
        rounded = (centres.clamp(low, high) / step).round() * step
        return float((seen.counts * (centres - rounded).square()).sum())
    clipped = (centres - centres.clamp(low, high)).square()
    inside = (centres >= low) & (centres <= high)
    return float((seen.counts * (clipped + inside * (step * step / 12))).sum())


def _entropy(seen: "Histogram") -> Range:
    """Minimise the divergence of the clipped histogram from its projection onto the quantization levels."""
    ranges = zip(_clipped(seen.low, seen.levels), _clipped(seen.high, seen.levels), strict=True)
    return min(ranges, key=lambda each: _divergence(seen, *each))


def _divergence(seen: "Histogram", low: float, high: float) -> float:
    import torch

    centres = seen.centres
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return float("inf")
    p = seen.counts[inside].clone()
    # Clipped values land on the outermost bins.
    p[0] += seen.counts[centres < low].sum()
    p[-1] += seen.counts[centres > high].sum()
    kept = seen.counts[inside]
    level = ((centres[inside] - low) / (high - low) * (seen.levels - 1)).round().long()
    used = (kept > 0).double()
    mass = torch.zeros(seen.levels, dtype=torch.float64).index_add_(0, level, kept)
    bins = torch.zeros(seen.levels, dtype=torch.float64).index_add_(0, level, used)
    q = (mass / bins.clamp(min=1))[level] * used
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
    positive = p > 0
    return float((p[positive] * (p[positive] / q[positive].clamp(min=1e-12)).log()).sum())


def _clipped(extreme: float, levels: int) -> list[float]:
    """Candidate ends of a range, up to the observed extreme: from a fifth of it, or less for few levels."""
    import torch

    least, count = (0.2, 81) if levels >= FINE else (0.02, 99)
    fractions = torch.linspace(least, 1.0, count, dtype=torch.float64).tolist()
    return [fraction * extreme for fraction in fractions]


_ROWS = (
    Observer(
        name="minmax",
        help="the whole observed range",
        paper='Jacob et al., "Quantization and Training of Neural Networks for Efficient '
        'Integer-Arithmetic-Only Inference", CVPR 2018, section 3',
        choose=_minmax,
        needs_counts=False,
    ),
    Observer(
        name="percentile",
        help="the range without the outermost 0.001 % of the values on either side",
        paper='Wu et al., "Integer Quantization for Deep Learning Inference", 2020, section 3.3',
        choose=_percentile,
    ),
    Observer(
        name="mse",
        help="the range with the least squared error of clipping and rounding",
        paper='Banner et al., "Post training 4-bit quantization of convolutional networks", NeurIPS 2019, '
        "section 3",
        choose=_mean_squared_error,
    ),
    Observer(
        name="entropy",
        help="the range whose quantized distribution diverges least from the observed one",
        paper='Migacz, "8-bit Inference with TensorRT", GTC 2017',
        choose=_entropy,
    ),
    Observer(
        name="outputs",
        help="of ranges from that of mse to the whole one, that by which the readers of the value lose least",
        paper='Wu et al., "EasyQuant: Post-training Quantization via Scale Optimization", 2020, section 3',
        choose=_mean_squared_error,
        judges=True,
    ),
)
OBSERVERS = {row.name: row for row in _ROWS}
"""By name."""
