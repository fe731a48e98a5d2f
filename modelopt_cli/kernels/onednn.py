"""int8 on the CPU through oneDNN's operators on plain tensors, those Inductor itself lowers to.

A convolution is packed at the first call for the shape it meets there: oneDNN lays the weight out
for one input shape and is right, only slower, for others.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.kernels.post_ops import POST_OPS
from modelopt_cli.program.quantized import (
    DynamicLinear,
    QParams,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedMaxPool2d,
    dynamic_qparams,
    quantize,
)

_conv = torch.ops.onednn.qconv2d_pointwise.default
_conv_sum = torch.ops.onednn.qconv2d_pointwise.binary
_linear = torch.ops.onednn.qlinear_pointwise.default

# What the int8 operators take of them; the float32 ones take all.
CONV_ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")
LINEAR_ACTIVATIONS = ("none", "relu", "gelu")


def _target(output: QParams | None) -> tuple[float, int, torch.dtype]:
    """Output scale, zero point and dtype as the operators want them; float output has none."""
    return (1.0, 0, torch.float32) if output is None else (output.scale, output.zero_point, torch.uint8)


def conv2d(layer: QuantizedConv2d, *, may_overwrite_residual: bool) -> Callable[..., Tensor] | None:
    """The kernel of a convolution, or None where oneDNN has none for it.

    Args:
        layer: the convolution; its weights are read once, at the first call.
        may_overwrite_residual: nobody reads the residual after this layer. The operator adds in
            place, so otherwise the residual is copied first.
    """
    if layer.activation not in CONV_ACTIVATIONS:
        return None
    if layer.residual is not None and layer.activation not in ("none", "relu"):
        return None
    attr, scalars, algorithm = POST_OPS[layer.activation]
    sides = _padded_first(layer)
    padding = [0, 0] if sides else list(layer.padding)
    geometry = (list(layer.stride), padding, list(layer.dilation), layer.groups)
    source, target = (layer.input.scale, layer.input.zero_point), _target(layer.output)
    scale, bias = layer.scale, layer.bias
    zeros = torch.zeros(layer.out_channels, dtype=torch.int8)
    packed: Tensor | None = None

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, sides, value=layer.input.zero_point) if sides else x

    def pack(x: Tensor) -> Tensor:
        shape = list(x.shape)
        weight: Tensor = torch.ops.onednn.qconv_prepack(layer.weight, scale, *source, *geometry, shape)
        return weight

    def plain(x: Tensor) -> Tensor:
        nonlocal packed
        x = padded(x)
        if packed is None:
            packed = pack(x)
        y: Tensor = _conv(
            x, *source, packed, scale, zeros, bias, *geometry, *target, attr, scalars, algorithm
        )
        return y

    def summed(x: Tensor, residual: Tensor) -> Tensor:
        nonlocal packed
        x = padded(x)
        if packed is None:
            packed = pack(x)
        assert layer.residual is not None
        # In any other layout the operator would add to a copy of its own and return the residual itself.
        laid_out = residual.contiguous(memory_format=torch.channels_last)
        if laid_out is residual and not may_overwrite_residual:
            laid_out = residual.clone()
        y: Tensor = _conv_sum(
            *(x, *source, packed, scale, zeros, laid_out, bias, *geometry, *target),
            *(layer.residual.scale, layer.residual.zero_point),
            *("sum", 1.0, attr, scalars, algorithm),
        )
        return y

    return plain if layer.residual is None else summed


def _padded_first(layer: QuantizedConv2d) -> list[int]:
    """What to pad before the kernel, as ``F.pad`` takes it; nothing where the kernel may pad itself.

    Where a window can lie in the padding alone, oneDNN's correction for the zero point reads memory that
    nobody has written, and the outputs there are anything (torch 2.13 on AVX-512, few channels).
    """
    high, wide = layer.padding
    extents = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [wide, wide, high, high] if high >= extents[0] or wide >= extents[1] else []


def linear(layer: QuantizedLinear) -> Callable[..., Tensor] | None:
    """The kernel of a linear layer, or None where oneDNN has none for it."""
    if layer.activation not in LINEAR_ACTIVATIONS:
        return None
    attr, scalars, algorithm = POST_OPS[layer.activation]
    source, target = (layer.input.scale, layer.input.zero_point), _target(layer.output)
    scale, bias = layer.scale, layer.bias
    zeros = torch.zeros(layer.out_features, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(layer.weight, None)

    def run(x: Tensor) -> Tensor:
        rows = x.reshape(-1, layer.in_features)
        y: Tensor = _linear(rows, *source, packed, scale, zeros, bias, *target, attr, scalars, algorithm)
        return y.view(*x.shape[:-1], layer.out_features)

    return run


def dynamic_linear(layer: DynamicLinear) -> Callable[..., Tensor]:
    """The kernel of a linear layer that quantizes its input at every call."""
    scale, bias = layer.scale, layer.bias
    zeros = torch.zeros(layer.out_features, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(layer.weight, None)
    target = _target(None)

    def run(x: Tensor) -> Tensor:
        q = dynamic_qparams(x)
        rows = quantize(x.reshape(-1, layer.in_features), q)
        y: Tensor = _linear(rows, q.scale, q.zero_point, packed, scale, zeros, bias, *target, "none", [], "")
        return y.view(*x.shape[:-1], layer.out_features)

    return run


def max_pool2d(layer: QuantizedMaxPool2d) -> Callable[..., Tensor] | None:
    """Separable max pooling by maxima of shifted slices: vectorised on bytes, exact.

    None for dilated or rounded-up windows, which are rare, and for 1x1 windows, where the result
    would be a view of the input.
    """
    if layer.dilation != (1, 1) or layer.ceil_mode or layer.kernel_size == (1, 1):
        return None
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding

    def run(x: Tensor) -> Tensor:
        if ph or pw:
            x = F.pad(x, (pw, pw, ph, ph))
        return _slice_max(_slice_max(x, 2, kh, sh), 3, kw, sw)

    return run


def _slice_max(x: Tensor, dim: int, kernel: int, stride: int) -> Tensor:
    length = (x.shape[dim] - kernel) // stride + 1
    index: list[slice] = [slice(None)] * 4

    def shifted(offset: int) -> Tensor:
        index[dim] = slice(offset, offset + (length - 1) * stride + 1, stride)
        return x[tuple(index)]

    y = shifted(0)
    for offset in range(1, kernel):
        y = torch.maximum(y, shifted(offset))
    return y
