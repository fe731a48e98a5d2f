"""Convolutions that oneDNN's int8 operator gets wrong, and a workaround for each.

Found by ``benchmarks/geometries.py`` with torch 2.13 (oneDNN 3.11): AVX2 is right everywhere; with AVX2-VNNI
and every AVX-512 level the correction for the zero point reads memory that nobody has written, or the process
dies, where no tap of a window lies on the image; AVX-512 also errs with one input channel per group
(a stride that is wider than high and one output column, more than 32 outputs per group, large images) unless
each channel has a filter of its own, and adds a residual wrongly to some grouped convolutions. The rules are
wider than what was found wrong.
"""

from collections.abc import Sequence

from modelopt_cli.kernels.saturation import is_depthwise
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d

Sides = tuple[int, ...]
"""Padding of the input before the operator, as ``F.pad`` takes it; empty for none."""
Taps = tuple[int, ...]
"""Number of taps on either side of a kernel, along height and width."""


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


def sides_to_pad(layer: QuantizedConv2d, height: int, width: int) -> Sides | None:
    """Padding that an image of this size needs so that oneDNN's convolution of it is right.

    Returns:
        Padding of width, height and channels, () where the operator takes the image as it is, None where
        another backend must do it.
    """
    one_channel = layer.in_channels == layer.groups and layer.out_channels != layer.groups
    if one_channel and layer.groups > 1:
        return None
    spatial = _misses_the_image(layer, 0, height) or _misses_the_image(layer, 1, width)
    if not (spatial or one_channel or layer.in_channels == 1):
        return ()
    high, wide = layer.padding if spatial else (0, 0)
    return (wide, wide, high, high, 0, int(layer.in_channels == 1))


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
