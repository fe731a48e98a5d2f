"""Shapes of the most common calls by simple rules, where torch would take a hundred times as long.

torch computes shapes on the meta device in Python, and imports its compiler for it. A rule applies only where
it is certain; for all else ``None`` says to ask torch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvolution,
)
from modelopt_cli.program.quantized_operations import Dequantize, Quantize

_UNARY = frozenset(
    {
        "relu", "relu6", "sigmoid", "tanh", "silu", "gelu", "hardswish", "hardsigmoid", "mish", "softplus",
        "leaky_relu", "elu", "selu", "neg", "abs", "exp", "sqrt",
    }
)  # fmt: skip
_BINARY = frozenset(["add", "sub", "mul", "truediv"])
_UNARY_LAYERS = (
    nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Mish,
    nn.LeakyReLU, nn.Dropout, nn.Identity,
)  # fmt: skip
_NORMS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_CONVS: dict[type, int] = {
    **{nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3},
    **{QuantizedConv1d: 1, QuantizedConv2d: 2, QuantizedConv3d: 3},
}


def quick_result(call: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
    """The result of a call on the meta device, without asking torch; None where no rule is certain.

    Args:
        call: a leaf layer, function or method.
        name: of the function or method; empty for a layer.
        args: positional arguments; tensors are on the meta device.
        kwargs: keyword arguments.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors or any(value.is_floating_point() != _reads_float(call) for value in tensors):
        return None
    if isinstance(call, nn.Module):
        return _layer(call, tensors[0]) if len(args) == 1 and not kwargs else None
    if len(args) + len(kwargs) == 1 and name in _UNARY:
        return tensors[0]
    if len(args) == 2 and not kwargs and name in _BINARY:
        plain = len(tensors) == 1 and all(type(v) in (int, float) for v in args if v is not tensors[0])
        same = (
            len(tensors) == 2
            and tensors[0].shape == tensors[1].shape
            and tensors[0].dtype == tensors[1].dtype
        )
        return tensors[0] if plain or same else None
    return None


def _reads_float(call: Callable[..., Any]) -> bool:
    return not isinstance(call, QuantizedConvolution | Dequantize)


def _layer(layer: nn.Module, x: Tensor) -> Tensor | None:
    if type(layer) in _UNARY_LAYERS:
        return x
    if type(layer) in _NORMS:
        fits = x.dim() in _NORMS[type(layer)] and x.shape[1] == layer.num_features
        return x if fits else None
    if type(layer) in _CONVS:
        return _convolution(layer, x)
    if isinstance(layer, Quantize):
        return torch.empty(x.shape, dtype=torch.uint8, device="meta")
    if isinstance(layer, Dequantize):
        return torch.empty(x.shape, device="meta")
    if type(layer) is nn.MaxPool2d and not layer.ceil_mode and not layer.return_indices and x.dim() == 4:
        settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        kernel, stride, padding, dilation = ((v, v) if isinstance(v, int) else v for v in settings)
        room = all(2 * p <= k for k, p in zip(kernel, padding, strict=True))
        return _windowed(x, x.shape[1], kernel, stride, padding, dilation) if room else None
    if type(layer) is nn.AdaptiveAvgPool2d and x.dim() == 4 and layer.output_size in (1, (1, 1)):
        return torch.empty(*x.shape[:2], 1, 1, device="meta") if min(x.shape) > 0 else None
    if type(layer) is nn.Linear and x.dim() > 0 and x.shape[-1] == layer.in_features:
        return torch.empty(*x.shape[:-1], layer.out_features, device="meta")
    return None


def _convolution(layer: Any, x: Tensor) -> Tensor | None:
    rank = _CONVS[type(layer)]
    plain = isinstance(layer.padding, tuple) and getattr(layer, "padding_mode", "zeros") == "zeros"
    if (
        not plain
        or x.dim() != rank + 2
        or x.shape[1] != layer.in_channels
        or getattr(layer, "residual", None)
    ):
        return None
    result = _windowed(x, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if result is not None and isinstance(layer, QuantizedConvolution) and layer.output is not None:
        return torch.empty(result.shape, dtype=torch.uint8, device="meta")
    return result


def _windowed(
    x: Tensor, channels: int, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> Tensor | None:
    """Result of windows that slide over ``x``; None where it would be empty."""
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    if min(sides) < 1 or not math.prod(x.shape) or math.prod(sides) > 2**40:
        return None
    return torch.empty(x.shape[0], channels, *sides, device="meta")
