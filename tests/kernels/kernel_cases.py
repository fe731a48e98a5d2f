"""Quantized layers with random weights, and what they compute, worked out in float64 from integers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.methods.quantize.rounding import quantize_weight
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d, QuantizedTransposed
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": lambda y: y.clamp(min=0),
    "relu6": lambda y: y.clamp(0, 6),
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
    "silu": lambda y: y / (1 + (-y).exp()),
    "gelu": lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_uint8(*shape: int, seed: int = 0, bits: int = 8) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator(seed))


def _weights(layer: Any, groups: int, seed: int) -> None:
    g = generator(seed)
    drawn = layer.turned(torch.randn(layer.weight.shape, generator=g))
    weight, _ = quantize_weight(drawn, groups, bits=layer.weight_bits)
    layer.weight.copy_(layer.turned(weight))
    fan = layer.weight[0].numel()
    layer.scale.copy_((0.5 + torch.rand(len(layer.scale), generator=g)) / (40 * fan**0.5))
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(len(layer.bias), generator=g))


def conv(kind: type = QuantizedConv2d, **changes: Any) -> Any:
    """A convolution; integers serve every dimension of space."""
    options: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 12,
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "groups": 1,
        "has_bias": True,
        "input": QParams(0.02, 113),
        "output": QParams(0.023, 101),
    } | changes
    seed = options.pop("seed", 1)
    if issubclass(kind, QuantizedTransposed):
        options = {"output_padding": 0, "activation": "none"} | options
    for name in ("kernel_size", "stride", "padding", "dilation", "output_padding"):
        if isinstance(options.get(name), int):
            options[name] = (options[name],) * kind.rank
    layer = kind(**options)
    _weights(layer, layer.groups, seed)
    return layer


def linear(
    in_features: int = 24, out_features: int = 10, bias: bool = True, **options: Any
) -> QuantizedLinear:
    values = {"input": QParams(0.02, 113), "output": QParams(0.023, 101)} | options
    layer = QuantizedLinear(in_features, out_features, bias, **values)
    _weights(layer, 1, 2)
    return layer


def dynamic(in_features: int = 24, out_features: int = 10, bias: bool = True) -> DynamicLinear:
    layer = DynamicLinear(in_features, out_features, bias)
    _weights(layer, 1, 3)
    return layer


def exact_sums(layer: Any, x: Tensor) -> Tensor:
    """The integer sums of a convolution, float64."""
    rank = layer.rank
    if isinstance(layer, QuantizedTransposed):
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        function: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[rank]
    else:
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    sums: Tensor = function(x.double() - layer.input.zero_point, layer.weight.double(), None, *geometry)
    assert torch.equal(sums, sums.round())
    return sums


def exact_conv(layer: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The layer's real output before it is rounded, float64."""
    sums = exact_sums(layer, x)
    by_channel = (-1, *[1] * (sums.dim() - 2))
    real = sums * layer.input.scale * layer.scale.double().view(by_channel)
    if layer.bias is not None:
        real = real + layer.bias.double().view(by_channel)
    if layer.residual is not None and residual is not None:
        real = real + layer.residual.scale * (residual.double() - layer.residual.zero_point)
    return ACTIVATIONS[layer.activation](real)


def exact_linear(layer: QuantizedLinear | DynamicLinear, x: Tensor, q: QParams) -> Tensor:
    """The layer's real output for a uint8 input, before it is rounded, float64."""
    sums = torch.einsum("...i,oi->...o", x.double() - q.zero_point, layer.weight.double())
    real = sums * q.scale * layer.scale.double()
    if layer.bias is not None:
        real = real + layer.bias.double()
    return ACTIVATIONS[layer.activation](real)


def assert_matches(got: Tensor, real: Tensor, output: QParams | None) -> None:
    """``got`` is ``real``, rounded: another level is accepted only right next to a tie."""
    got = got.cpu()
    assert got.shape == real.shape
    if output is None:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), real, rtol=1e-5, atol=2e-5)
        return
    assert got.dtype == torch.uint8
    level = (real / output.scale + output.zero_point).clamp(0, output.top)
    distance = (got.double() - level).abs()
    assert distance.max() <= 0.5 + 2e-3, f"{(distance > 0.502).sum()} of {got.numel()} are wrong"
    assert got.double().std() > 0
