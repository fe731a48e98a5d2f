"""Convolutions that oneDNN's int8 operator gets wrong, and a workaround for each.

Found by ``benchmarks/geometries.py`` with torch 2.13 (oneDNN 3.11): AVX2 is right everywhere; with AVX2-VNNI
and every AVX-512 level the correction for the zero point reads memory that nobody has written, or the process
dies, where no tap of a window lies on the image; AVX-512 also errs with one input channel per group
(a stride that is wider than high and one output column, more than 32 outputs per group, large images) unless
each channel has a filter of its own, and adds a residual wrongly to some grouped convolutions. AMX errs in
more: one output column under a stride, the correction for the zero point in the padding and of groups with
few inputs and many outputs, wide padding, and rows of a kernel that fill several tile rows of 64 bytes to the
last byte, as those of patches do. The rules are wider than what was found wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from modelopt_cli.kernels.saturation import is_depthwise
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d

Sides = tuple[int, ...]
"""Padding of the input before the operator, as ``F.pad`` takes it, which cuts off where it is negative."""
Taps = tuple[int, ...]
"""Number of taps on either side of a kernel, along height and width."""


@dataclass(frozen=True)
class Route:
    """How an image reaches the operator.

    Attributes:
        sides: padding of width, height and channels; empty where the operator takes the image as it is.
        stride: the operator's along height and width, where another than the layer's gives the same.
        taps: columns of zeros on the right of the kernel; the image has their sides.
    """

    sides: Sides = ()
    stride: tuple[int, ...] | None = None
    taps: int = 0


def idle_taps(layer: QuantizedConv2d, size: Sequence[int]) -> Taps:
    """The outermost taps that lie in the padding wherever a window is, as those of wide dilation do.

    They multiply the zero point, which stands for zero, so that the sums are the same without them.

    Args:
        layer: the convolution.
        size: height and width of the image.
    """
    return tuple(_idle(layer, axis, length) for axis, length in enumerate(size))


def _idle(layer: QuantizedConv2d, axis: int, length: int) -> int:
    kernel, stride, padding, dilation = (
        getattr(layer, name)[axis] for name in ("kernel_size", "stride", "padding", "dilation")
    )
    last = length + 2 * padding - dilation * (kernel - 1) - 1  # place of the last window, before strides
    starts = range(-padding, last - padding + 1, stride)

    def idle(tap: int) -> bool:
        return not any(0 <= start + tap * dilation < length for start in starts)

    count = 0
    while count < (kernel - 1) // 2 and padding >= dilation * (count + 1):
        if not (idle(count) and idle(kernel - 1 - count)):
            break
        count += 1
    return count


def route(layer: QuantizedConv2d, height: int, width: int) -> Route | None:
    """A way on which oneDNN's convolution of an image of this size is right; None for another backend."""
    if 1 < layer.groups == layer.in_channels != layer.out_channels:  # one channel per group
        return None
    high, wide = layer.padding
    beyond, stride, taps = wide, None, 0
    spatial = _misses_the_image(layer, 0, height) or _misses_the_image(layer, 1, width)
    if has_amx():
        if _many_outputs_of_few_inputs(layer):
            return None
        column = _one_column(layer, width)
        if column is not None:
            beyond, stride = column, (layer.stride[0], 1)
        taps = int(_fills_rows(layer))
        beyond += taps * layer.dilation[1]
        spatial = spatial or bool(stride or taps) or _padding_errs(layer)
    plane = (wide, beyond, high, high) if spatial else (0, 0, 0, 0)
    sides = (*plane, 0, int(layer.in_channels == 1))
    return Route(sides if any(sides) else (), stride, taps)


def may_fuse_residual(layer: QuantizedConv2d) -> bool:
    """True if the operator adds the residual of such a convolution correctly."""
    return layer.groups == 1 or is_depthwise(tuple(layer.weight.shape), layer.groups)


def _misses_the_image(layer: QuantizedConv2d, axis: int, length: int) -> bool:
    """True if all taps of a window can lie in the padding, before, behind or on both sides of the image.

    The last needs taps further apart than the image is long; a length that just fits counts, too.
    """
    padding, dilation = layer.padding[axis], layer.dilation[axis]
    extent = dilation * (layer.kernel_size[axis] - 1) + 1
    return padding >= extent or (padding > 0 and dilation >= max(length, 2))


@cache
def has_amx() -> bool:
    """True on a CPU whose int8 products oneDNN gives to AMX, as it does wherever there is one."""
    return bool(torch.cpu.get_capabilities().get("amx_int8", False))


def _many_outputs_of_few_inputs(layer: QuantizedConv2d) -> bool:
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return layer.groups > 1 and inputs < 32 and outputs > 30 and layer.input.zero_point != 0


def _one_column(layer: QuantizedConv2d, width: int) -> int | None:
    """Columns to add on the right, or to cut off, for a window that is as wide as the image; else None."""
    kernel, stride, padding = layer.kernel_size[1], layer.stride[1], layer.padding[1]
    beyond = layer.dilation[1] * (kernel - 1) + 1 - padding - width
    return beyond if kernel > 1 and stride > 1 and padding - beyond < stride else None


def _fills_rows(layer: QuantizedConv2d) -> bool:
    inputs = layer.in_channels // layer.groups
    row = inputs * layer.kernel_size[1]
    return inputs < 64 < row and row % 64 == 0


def _padding_errs(layer: QuantizedConv2d) -> bool:
    """True of padding that is wide or of a dilated kernel, and of any around an image whose zero is not 0."""
    if is_depthwise(tuple(layer.weight.shape), layer.groups) or not any(layer.padding):
        return False
    axes = zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
    return layer.input.zero_point != 0 or any(
        pad > 0 and (dilation > 1 or pad > kernel // 2) for pad, dilation, kernel in axes
    )
