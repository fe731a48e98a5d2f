"""The reference backend: int8 layers without an int8 operator, for tests and where those cannot be trusted.

Sums of integers are computed in float64, which holds them exactly in any order up to 2**53, by plain
matrix products; only the scaling after them rounds.
"""

import torch
from torch import Tensor

from modelopt_cli.program.quantization import ACTIVATIONS, QParams, dynamic_qparams, quantize
from modelopt_cli.program.quantized_convolutions import QuantizedConvolution
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear


def convolution_accumulators(x: Tensor, layer: QuantizedConvolution) -> Tensor:
    """Sums of ``(x - zero_point) * weight``, integers in float64 ``(N, O, ...)``."""
    sums = layer.convolve(x.double() - layer.input.zero_point, layer.weight.double())
    return sums.round_()  # an algorithm by transforms would be next to them


def linear_accumulators(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """Sums of ``(x - zero_point) * weight``, integers in float64 ``(..., out_features)``."""
    return (x.double() - zero_point) @ weight.double().t()


def _finish(real: Tensor, activation: str, output: QParams | None) -> Tensor:
    real = ACTIVATIONS[activation](real)
    if output is None:
        return real.float()
    q = (real / output.scale).round() + output.zero_point
    return q.clamp(0, output.top).to(torch.uint8)


def _real(acc: Tensor, scale: Tensor, input_scale: float, bias: Tensor | None, channel_dim: int) -> Tensor:
    shape = [1] * acc.dim()
    shape[channel_dim] = -1
    real = acc * (scale.double() * input_scale).view(shape)
    return real if bias is None else real + bias.double().view(shape)


def convolution(layer: QuantizedConvolution, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """A quantized convolution, exactly."""
    acc = convolution_accumulators(x, layer)
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
    q = dynamic_qparams(x, layer.input_bits)
    acc = linear_accumulators(quantize(x, q), layer.weight, q.zero_point)
    return _finish(_real(acc, layer.scale, q.scale, layer.bias, -1), "none", None)
