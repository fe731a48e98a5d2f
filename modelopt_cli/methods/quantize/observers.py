"""Observers: how the range of an activation is chosen from the values that calibration shows.

One row each. Imports no torch, so that the command line reads it, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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
    error = _errors_of_steps(seen) if seen.levels >= FINE else partial(_errors_of_rounding, seen)
    lows, highs = _clipped(seen.low, seen.levels), _clipped(seen.high, seen.levels)
    low, high = lows[-1], highs[-1]
    # Two passes of coordinate descent; the other side's choice hardly moves this one's.
    for _ in (1, 2):
        low = lows[error(lows, high).argmin()]
        high = highs[error(low, highs).argmin()]
    return float(low), float(high)


def _errors_of_rounding(seen: "Histogram", low: "Tensor", high: "Tensor") -> "Tensor":
    """Squared error of each range, where most values may be smaller than a step: its error says too much."""
    step = ((high - low) / (seen.levels - 1)).unsqueeze(-1)
    rounded = (seen.centres.clamp(low.unsqueeze(-1), high.unsqueeze(-1)) / step).round() * step
    return (seen.centres - rounded).square() @ seen.counts


def _errors_of_steps(seen: "Histogram") -> "Callable[[Tensor, Tensor], Tensor]":
    """Squared error of ranges of which a step is far smaller than most values: step^2 / 12, and clipping.

    From the sums of 1, x and x^2 over the values up to each bin, a range takes a few operations.
    """
    import torch

    centres = seen.centres
    powers = centres.unsqueeze(1) ** torch.arange(3)
    sums = torch.cat([torch.zeros(1, 3), (seen.counts.unsqueeze(1) * powers).cumsum(0)])

    def error(low: "Tensor", high: "Tensor") -> "Tensor":
        up_to_low = sums[torch.searchsorted(centres, low)]
        up_to_high = sums[torch.searchsorted(centres, high, right=True)]
        kept = (up_to_high - up_to_low)[..., 0]
        step = (high - low) / (seen.levels - 1)
        return _squares(up_to_low, low) + kept * step.square() / 12 + _squares(sums[-1] - up_to_high, high)

    return error


def _squares(sums: "Tensor", end: "Tensor") -> "Tensor":
    """Sum of (x - end)^2, from the sums ``(..., 3)`` of 1, x and x^2."""
    of_ones, of_values, of_squares = sums.unbind(-1)
    return of_squares - 2 * end * of_values + end.square() * of_ones


def _entropy(seen: "Histogram") -> Range:
    """Minimise the divergence of the clipped histogram from its projection onto the quantization levels."""
    lows, highs = (_clipped(extreme, seen.levels).tolist() for extreme in (seen.low, seen.high))
    ranges = zip(lows, highs, strict=True)
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


def _clipped(extreme: float, levels: int) -> "Tensor":
    """Candidate ends of a range, float64, up to the observed extreme: from a fifth of it, or less for few
    levels.
    """
    import torch

    least, count = (0.2, 81) if levels >= FINE else (0.02, 99)
    return torch.linspace(least, 1.0, count, dtype=torch.float64) * extreme


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
