"""Rounding of weights to integers: symmetric, one scale per output channel, and exact on every CPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modelopt_cli.errors import UsageError
from modelopt_cli.kernels.saturation import PAIR_LIMIT, is_depthwise
from modelopt_cli.program.quantization import BITS, weight_limits
from modelopt_cli.settings import option

WMAX = 127
CANDIDATES = 16
NARROW_CANDIDATES = 46
"""Ranges that are tried below 8 bits: up to the largest weight, from a tenth (2 bits) or more (7: 0.6)."""
SMALLEST = 1e-35
"""Weights below this are zeros: a 127th of it would hardly be a normal float32."""
CHUNK = 1 << 18
"""Elements worked on at once: bounds the memory of the search."""


def quantize_weight(
    weight: Tensor, groups: int = 1, *, bits: int = 8, exact_everywhere: bool = True, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Round a weight to integers with the per-channel scale of least squared error.

    The largest weight of a channel need not be 127: a larger scale leaves fewer neighbouring pairs
    over the bound of ``kernels.saturation``, and those that remain over it are pulled back onto it. The
    scale is searched between ``max / 127``, where many pairs are pulled back, and ``max / 64``,
    where none is (that is plain 7-bit quantization, so the result is never worse than that). Of fewer than 8
    bits no pair can be over the bound, and the scale is searched among smaller ones, which clip the largest
    weights and round the others less.

    Args:
        weight: float ``(O, C / groups, ...)``.
        groups: of the convolution.
        bits: of the integers, 2 to 8.
        exact_everywhere: keep to the pair bound. Not needed where the weight is only stored.
        shared: equal weights of a channel stay equal: only scales count at which no pair is over the bound.

    Returns:
        int8 weights of the same shape and float32 scales ``(O,)``; ``scale * int8`` approximates
        the weight.
    """
    flat = weight.detach().float()
    if flat.numel() == 0:
        return torch.zeros_like(flat, dtype=torch.int8), flat.new_ones(len(flat))
    bounded = exact_everywhere and bits == BITS and not is_depthwise(tuple(weight.shape), groups)
    rows = flat.split(max(CHUNK // flat[0].numel(), 1))

    def rounded(some: Tensor) -> tuple[Tensor, Tensor]:
        if bits < BITS:
            steps = [part / weight_limits(bits)[1] for part in narrow_ranges(bits)]
            return _least_error(*_unit(some), steps, bits)
        return _bounded(*_unit(some), shared) if bounded else _nearest(*_unit(some), WMAX)

    parts = [rounded(some) for some in rows]
    return torch.cat([q for q, _ in parts]), torch.cat([s for _, s in parts])


def narrow_ranges(bits: int) -> list[float]:
    """Parts of a range that are tried for weights of so many bits; of 8 the whole of it."""
    if bits == BITS:
        return [1.0]
    parts: list[float] = torch.linspace(1.0, (bits - 1) / 10, NARROW_CANDIDATES).tolist()
    return parts


def _unit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight with channels of unit range, whose squares neither overflow nor vanish, and those ranges."""
    extreme = weight.flatten(1).abs().amax(1)
    # A channel of zeros, or next to them, keeps a harmless scale.
    extreme = torch.where(extreme > SMALLEST, extreme, torch.ones_like(extreme))
    return weight / extreme.view(-1, *[1] * (weight.dim() - 1)), extreme


def _nearest(unit: Tensor, extreme: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    step = 1 / largest
    return unit.div_(step).round_().clamp_(-largest, largest).to(torch.int8), extreme * step


def _bounded(unit: Tensor, extreme: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    widest = WMAX / (PAIR_LIMIT // 2)
    steps = [factor / WMAX for factor in torch.linspace(1.0, widest, CANDIDATES).tolist()]
    return _least_error(unit, extreme, steps, BITS, within_bound, shared)


def _least_error(
    unit: Tensor,
    extreme: Tensor,
    steps: Sequence[float],
    bits: int,
    bound: Callable[[Tensor], Tensor] | None = None,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Integers and scales of the step with the least squared error, channel by channel."""
    low, high = weight_limits(bits)
    best_q = torch.zeros_like(unit, dtype=torch.int8)
    best_scale = extreme / high
    best_error = torch.full_like(extreme, torch.inf)
    for step in steps:
        nearest = (unit / step).round_().clamp_(low, high)
        q = nearest if bound is None else bound(nearest)
        error = (q * step - unit).square_().flatten(1).sum(1)
        if shared:
            error[(q != nearest).flatten(1).any(1)] = torch.inf
        better = error < best_error
        best_q[better] = q[better].to(torch.int8)
        best_scale[better], best_error[better] = extreme[better] * step, error[better]
    return best_q, best_scale


def within_bound(q: Tensor) -> Tensor:
    """Pull neighbouring pairs back onto the bound of ``kernels.saturation``, each by half of the excess.

    Args:
        q: integers from -127 to 127, in floating point, ``(O, C / groups, ...)``.

    Returns:
        The same shape; what is within the bound is as it was, and so is every zero.
    """
    if q.shape[1] % 2:
        return q.clamp(-(PAIR_LIMIT // 2), PAIR_LIMIT // 2)
    first, second = q.unflatten(1, (-1, 2)).unbind(2)
    excess = (first + second).abs_().sub_(PAIR_LIMIT).clamp_(min=0)
    # Weights of opposite signs never add up to more than 127, so an excess implies equal signs.
    from_first = (excess / 2).ceil_()
    first = first - first.sign() * from_first
    second = second - second.sign() * (excess - from_first)
    return torch.stack((first, second), 2).flatten(1, 2)


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: its name without the last component."""
    return parameter.rpartition(".")[0] or parameter


def require_nonzero(name: str, before: Tensor, after: Tensor) -> None:
    """Refuse to round all of a weight to zero, or to infinity.

    Raises:
        UsageError: its values are too small for a scale in float32, or too large for a half-precision type.
    """
    hint = f"leave it out with {option('exclude', layer_of(name))}"
    values = f"has values up to {float(before.detach().abs().amax()) if before.numel() else 0:.2g}"
    if not bool(after.isfinite().all()) and bool(before.isfinite().all()):
        problem = f"{values}, which is beyond the half-precision type"
        raise UsageError(problem, where=name, hint=hint)
    if not bool(after.any()) and bool(before.any()):
        problem = f"{values}, which int8 and a float32 scale cannot hold"
        raise UsageError(problem, where=name, hint=hint)
