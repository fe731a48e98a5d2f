"""Max pooling of uint8 on the CPU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.program.quantized_operations import QuantizedMaxPool


def max_pool(layer: QuantizedMaxPool) -> Callable[..., Tensor] | None:
    """Separable max pooling by maxima of shifted slices: vectorised on bytes, exact.

    None for dilated or rounded-up windows, which are rare, and for windows of one element, where the result
    would be a view of the input.
    """
    if max(layer.dilation) > 1 or layer.ceil_mode or max(layer.kernel_size) == 1:
        return None
    windows = list(enumerate(zip(layer.kernel_size, layer.stride, strict=True), start=2))
    sides = [side for padding in reversed(layer.padding) for side in (padding, padding)]

    def run(x: Tensor) -> Tensor:
        if any(sides):
            x = F.pad(x, sides)
        for dim, (kernel, stride) in windows:
            x = _slice_max(x, dim, kernel, stride)
        return x

    return run


def _slice_max(x: Tensor, dim: int, kernel: int, stride: int) -> Tensor:
    length = (x.shape[dim] - kernel) // stride + 1
    index: list[slice] = [slice(None)] * x.dim()

    def shifted(offset: int) -> Tensor:
        index[dim] = slice(offset, offset + (length - 1) * stride + 1, stride)
        return x[tuple(index)]

    y = shifted(0)
    for offset in range(1, kernel):
        y = torch.maximum(y, shifted(offset))
    return y
