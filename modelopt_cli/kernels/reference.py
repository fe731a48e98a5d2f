"""The reference backend: int8 layers without an int8 operator, for tests and where those cannot be trusted.

Sums of integers are computed in float64, which holds them exactly in any order up to 2**53, by plain
matrix products; only the scaling after them rounds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.program.quantization import ACTIVATIONS, QMAX, QMIN, QParams, dynamic_qparams, quantize
from modelopt_cli.program.quantized import DynamicLinear, QuantizedConv2d, QuantizedLinear


def conv2d_accumulators(x: Tensor, layer: QuantizedConv2d) -> Tensor:
    """Sums of ``(x - zero_point) * weight``, whole numbers in float64 ``(N, O, OH, OW)``."""
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    sums = F.conv2d(x.double() - layer.input.zero_point, layer.weight.double(), None, *geometry)
    return sums.round_()  # an algorithm by transforms would be next to them


def linear_accumulators(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """Sums of ``(x - zero_point) * weight``, whole numbers in float64 ``(..., out_features)``."""
    return (x.double() - zero_point) @ weight.double().t()


def _finish(real: Tensor, activation: str, output: QParams | None) -> Tensor:
    real = ACTIVATIONS[activation](real)
    if output is None:
        return real.float()
    q = (real / output.scale).round() + output.zero_point
    return q.clamp(QMIN, QMAX).to(torch.uint8)


def _real(acc: Tensor, scale: Tensor, input_scale: float, bias: Tensor | None, channel_dim: int) -> Tensor:
    shape = [1] * acc.dim()
    shape[channel_dim] = -1
    real = acc * (scale.double() * input_scale).view(shape)
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
