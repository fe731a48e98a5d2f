"""Weights stored as integers: a scale for each output channel or group of inputs, and perhaps zero points."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.artifact.codecs.cast import HALVES, Cast
from modelopt_cli.methods.quantize.rounding import CHUNK, SMALLEST, narrow_ranges, quantize_weight
from modelopt_cli.methods.quantize.widths import BYTE
from modelopt_cli.program import Encoding
from modelopt_cli.program.quantization import weight_limits


@dataclass(frozen=True)
class WeightSteps:
    """Steps that a stored weight is put onto.

    Attributes:
        bits: of the integers, 2 to 8.
        group: input features that have a scale of their own; None: all of an output. Only of matrices.
        asymmetric: each scale has a zero point.
        bounded: the weight is multiplied as integers and keeps to the bound of ``kernels.saturation``.
        shared: equal weights of an output stay equal.
        half_scales: scales are bfloat16.
    """

    bits: int = BYTE
    group: int | None = None
    asymmetric: bool = False
    bounded: bool = False
    shared: bool = False
    half_scales: bool = False

    def group_of(self, weight: Tensor) -> int | None:
        """Features of a group of this weight; None where an output has one scale."""
        divides = weight.dim() == 2 and self.group is not None and self.group < weight.shape[1]
        return self.group if divides else None


def store_weight(weight: Tensor, steps: WeightSteps, float_type: str | None) -> tuple[Tensor, Encoding]:
    """A weight as it is to be stored, and how.

    Args:
        weight: float, of two or more dimensions; it is not changed.
        steps: of the integers that it becomes.
        float_type: the half-precision type that it is cast to in place of that, if it is.
    """
    if float_type is None:
        return encode_weight(weight, steps)
    return weight.to(HALVES[float_type]).float(), Encoding(Cast.name, {"dtype": float_type})


def encode_weight(weight: Tensor, steps: WeightSteps) -> tuple[Tensor, Encoding]:
    """Round a weight to integer steps.

    Args:
        weight: float, of two or more dimensions, its first that of outputs; it is not changed.
        steps: that it is put onto.

    Returns:
        The rounded weight, in its own dtype, and how it is to be stored, with its integers.
    """
    group = steps.group_of(weight)
    rounded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    parts: dict[str, list[Tensor]] = {}
    rows = max(CHUNK // max(weight[:1].numel(), 1), 1)
    for start in range(0, len(weight), rows):  # so that a large embedding is never copied whole
        some = weight[start : start + rows]
        by_scale = _in_groups(some, group)
        values, scale, zero = _rounded(by_scale, steps)
        around = (-1, *[1] * (by_scale.dim() - 1))
        if steps.half_scales:
            scale = scale.to(torch.bfloat16).float()
            nearest = (by_scale.float() / scale.view(around)).round_()
            nearest = nearest if zero is None else nearest.add_(zero.view(around))
            values = nearest.clamp_(*_limits(steps)).to(torch.int8)
        relative = values.to(torch.float32)
        if zero is not None:
            relative -= zero.view(around)
            parts.setdefault("zero_point", []).append(_by_row(zero, len(some), group))
        stored = scale.to(torch.bfloat16) if steps.half_scales else scale
        parts.setdefault("scale", []).append(_by_row(stored, len(some), group))
        integers[start : start + rows] = _ungrouped(values, some)
        rounded[start : start + rows] = _ungrouped(relative * scale.view(around), some).to(weight.dtype)
    params = {"bits": steps.bits, "axis": 0 if group is None else None, "group": group}
    return rounded, Encoding(Affine.name, params, {n: torch.cat(part) for n, part in parts.items()}, integers)


def _limits(steps: WeightSteps) -> tuple[int, int]:
    low, high = weight_limits(steps.bits)
    return (-high - 1 if steps.asymmetric else low), high


def _rounded(weight: Tensor, steps: WeightSteps) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers, scales and zero points of rows that have a scale each."""
    if steps.asymmetric:
        return quantize_asymmetric(weight, steps.bits)
    options = {"exact_everywhere": steps.bounded, "shared": steps.shared}
    return *quantize_weight(weight, bits=steps.bits, **options), None


def quantize_asymmetric(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to integers with a scale and a zero point for each row, of least squared error.

    The range is that of the row's values and zero or, below 8 bits, a part of it.

    Args:
        weight: float ``(R, ...)``.
        bits: of the integers, 2 to 8.

    Returns:
        int8 integers from -2^(bits-1) to 2^(bits-1) - 1 of the same shape, float32 scales ``(R,)`` and int8
        zero points ``(R,)``; ``scale * (integer - zero point)`` approximates the weight.
    """
    half = 1 << bits - 1
    rows = weight.detach().float().flatten(1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    flat = high - low <= SMALLEST
    low, high = low.masked_fill(flat, 0), high.masked_fill(flat, 1)
    best_q = torch.zeros_like(rows, dtype=torch.int8)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low, dtype=torch.int8)
    best_error = torch.full_like(low, torch.inf)
    for part in narrow_ranges(bits):
        scale = (high - low) * (part / (2 * half - 1))
        zero = (-low * part / scale).round_() - half
        q = ((rows / scale[:, None]).round_() + zero[:, None]).clamp_(-half, half - 1)
        error = (
            ((q - zero[:, None]) * scale[:, None] - rows).div_(high[:, None] - low[:, None]).square_().sum(1)
        )
        better = error < best_error
        best_q[better], best_zero[better] = q[better].to(torch.int8), zero[better].to(torch.int8)
        best_scale[better], best_error[better] = scale[better], error[better]
    return best_q.view(weight.shape), best_scale, best_zero


def _in_groups(weight: Tensor, group: int | None) -> Tensor:
    """Rows that have a scale each: the groups of a matrix, the last of an output filled up with zeros."""
    if group is None:
        return weight
    filled = F.pad(weight, (0, -weight.shape[1] % group))
    return filled.reshape(-1, group)


def _ungrouped(rows: Tensor, like: Tensor) -> Tensor:
    """The matrix again, of the rows of :func:`_in_groups`."""
    return rows if rows.shape == like.shape else rows.reshape(len(like), -1)[:, : like.shape[1]]


def _by_row(numbers: Tensor, rows: int, group: int | None) -> Tensor:
    return numbers if group is None else numbers.view(rows, -1)
