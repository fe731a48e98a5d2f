"""Random dropping of rounding: each number is rounded or not with a probability of one half.

Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR
2022. A draw of torch's Bernoulli distribution takes longer on a CPU than a convolution of the same values, so
64 numbers share one random integer, and the derivative is written out.
"""

from typing import Any

import torch
from torch import Tensor

_BITS = tuple(1 << bit for bit in range(8))


def dropped(rounded: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Each number of the one or the other tensor.

    Args:
        rounded: any shape; indices are returned as they are.
        real: of the same shape.
        generator: of the choice.
    """
    if not real.is_floating_point():
        return rounded
    kept = random_bits(real.numel(), generator).view(real.shape).to(real.dtype)
    mixed: Tensor = _Mixed.apply(rounded, real, kept)  # type: ignore[no-untyped-call]
    return mixed


def random_bits(count: int, generator: torch.Generator) -> Tensor:
    """Zeros and ones of equal probability, uint8 ``(count,)``."""
    words = torch.empty(-(-count // 64), dtype=torch.int64)
    words.random_(-(1 << 63), (1 << 63) - 1, generator=generator)
    places = torch.tensor(_BITS, dtype=torch.uint8).unsqueeze(1)
    return (words.view(torch.uint8) & places).ne_(0).flatten()[:count]


class _Mixed(torch.autograd.Function):
    """``rounded`` where ``kept`` is 1, ``real`` where it is 0."""

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, real: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return torch.lerp(real, rounded, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (kept,) = ctx.saved_tensors
        of_rounded = grads[0] * kept
        return of_rounded, grads[0] - of_rounded, None
