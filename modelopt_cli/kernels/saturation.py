"""Bounds on int8 weights that keep convolutions and linears exact on every x86 CPU.

Without VNNI, oneDNN multiplies uint8 activations with int8 weights by ``vpmaddubsw``: it adds
*pairs* of products in a saturating 16-bit register. Two weights of a pair that share their sign and
whose magnitudes add up to more than 128 can exceed it (255 * 129 > 32,767) and the sum is silently
clipped. The pairs are the input channels (0, 1), (2, 3), ... of one kernel position; where the
number of input channels is odd, some kernels pair across positions, so there every pair counts.
Depthwise convolutions widen before they add and have no such limit.

Keeping every pair within 128 therefore makes a layer exact everywhere, with or without VNNI.

The sum itself is an int32 in every kernel and wraps silently beyond 2**31. A channel's positive and
negative weights bound it, whatever the input and the order of the terms.
"""

import torch
from torch import Tensor

PAIR_LIMIT = 128
"""Largest magnitude sum of two same-signed neighbouring weights: 255 * 128 <= 32,767."""

INPUT_LIMIT = 256
"""Larger than any input, shifted to int8 or not, and than any zero point."""
_LARGEST_SUM = 2**31 - 1


def is_depthwise(shape: tuple[int, ...], groups: int) -> bool:
    """True if a conv weight of this shape ``(O, C / groups, KH, KW)`` filters each channel alone."""
    return groups > 1 and shape[1] == 1 and shape[0] == groups


def pair_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the positive and of the negative parts of each neighbouring pair of input channels.

    Args:
        weight: ``(O, C, ...)`` with even C.

    Returns:
        Two tensors ``(O, C / 2, ...)``: the pairs' positive sums and negative sums.
    """
    w = weight.unflatten(1, (-1, 2))
    return w.clamp(min=0).sum(2), w.clamp(max=0).sum(2)


def never_saturates(weight: Tensor, groups: int = 1) -> bool:
    """True if a layer with this int8 weight is exact on every CPU, for any uint8 input.

    Args:
        weight: int8 ``(O, C / groups, KH, KW)`` or ``(O, C)``.
        groups: the convolution's groups.
    """
    if weight.numel() == 0 or is_depthwise(tuple(weight.shape), groups):
        return True
    wide = weight.to(torch.int16)
    if weight.shape[1] % 2:
        return int(wide.abs().max()) <= PAIR_LIMIT // 2
    positive, negative = pair_sums(wide)
    return int(positive.max()) <= PAIR_LIMIT and int(negative.min()) >= -PAIR_LIMIT


def never_wraps(weight: Tensor) -> bool:
    """True if a layer with this int8 weight has sums within int32 for any uint8 input and zero point.

    Args:
        weight: int8 ``(O, C / groups, KH, KW)`` or ``(O, C)``.
    """
    if weight.numel() == 0 or weight[0].numel() * 128 * INPUT_LIMIT <= _LARGEST_SUM:
        return True
    rows = weight.flatten(1)
    positive = rows.clamp(min=0).sum(1, dtype=torch.int64)
    negative = rows.clamp(max=0).sum(1, dtype=torch.int64)
    return int(torch.maximum(positive, -negative).max()) * INPUT_LIMIT <= _LARGEST_SUM
