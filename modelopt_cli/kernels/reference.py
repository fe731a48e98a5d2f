"""The reference backend: int8 layers in 64-bit integer arithmetic, for tests and as last resort.

Slow and obvious. Accumulators are exact; only the scaling after them is floating point, in float64.
"""

import torch
from torch import Tensor

from modelopt_cli.kernels.im2col import im2col
from modelopt_cli.program.quantized import (
    ACTIVATIONS,
    QMAX,
    QMIN,
    DynamicLinear,
    QParams,
    QuantizedConv2d,
    QuantizedLinear,
    dynamic_qparams,
    quantize,
)


def conv2d_accumulators(x: Tensor, layer: QuantizedConv2d) -> Tensor:
    """Sums of ``(x - zero_point) * weight``, int64 ``(N, O, OH, OW)``."""
    zero = layer.input.zero_point
    outputs = []
    for xs, w in zip(x.chunk(layer.groups, 1), layer.weight.chunk(layer.groups, 0), strict=True):
        rows, (n, oh, ow) = im2col(
            xs.long() - zero, layer.kernel_size, layer.stride, layer.padding, layer.dilation, 0
        )
        columns = w.long().permute(2, 3, 1, 0).reshape(-1, w.shape[0])
        outputs.append((rows @ columns).view(n, oh, ow, -1).permute(0, 3, 1, 2))
    return torch.cat(outputs, 1)


def linear_accumulators(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """Sums of ``(x - zero_point) * weight``, int64 ``(..., out_features)``."""
    return (x.long() - zero_point) @ weight.long().t()


def _finish(real: Tensor, activation: str, output: QParams | None) -> Tensor:
    real = ACTIVATIONS[activation](real)
    if output is None:
        return real.float()
    q = (real / output.scale).round() + output.zero_point
    return q.clamp(QMIN, QMAX).to(torch.uint8)


def _real(acc: Tensor, scale: Tensor, input_scale: float, bias: Tensor | None, channel_dim: int) -> Tensor:
    shape = [1] * acc.dim()
    shape[channel_dim] = -1
    real = acc.double() * (scale.double() * input_scale).view(shape)
    return real if bias is None else real + bias.double().view(shape)


def conv2d(layer: QuantizedConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """A quantized convolution, exactly."""
    acc = conv2d_accumulators(x, layer)
    real = _real(acc, layer.scale, layer.input.scale, layer.bias, 1)
    if layer.residual is not None and residual is not None:
        real = real + (residual.double() - layer.residual.zero_point) * layer.residual.scale
    return _finish(real, layer.activation, layer.output)


def linear(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """A quantized linear layer, exactly."""
    acc = linear_accumulators(x, layer.weight, layer.input.zero_point)
    return _finish(_real(acc, layer.scale, layer.input.scale, layer.bias, -1), layer.activation, layer.output)


def dynamic_linear(layer: DynamicLinear, x: Tensor) -> Tensor:
    """A dynamically quantized linear layer, exactly, from the input's own scale on."""
    q = dynamic_qparams(x)
    acc = linear_accumulators(quantize(x, q), layer.weight, q.zero_point)
    return _finish(_real(acc, layer.scale, q.scale, layer.bias, -1), "none", None)
