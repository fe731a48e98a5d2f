"""A trial of each packed layer against the reference backend, on a small input of extreme values.

An operator that is wrong for a shape, or on a CPU, that nobody has tried yet is then met as a slow layer
and not as a wrong result. One trial serves all layers of the same form in this process; a few dozen forms
make up a network, and a trial takes about a millisecond.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from modelopt_cli.kernels import reference
from modelopt_cli.kernels.routes import Route
from modelopt_cli.program.fields import parse_fields
from modelopt_cli.program.quantization import ACTIVATIONS, QParams
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear

Make = Callable[..., Callable[..., Tensor]]
_Layer = TypeVar("_Layer", bound=Weighted)

_CHANNELS = 32
"""Output channels (or groups) that are compared, evenly spread: the reference is slow."""
_STEPS = 6
"""Outputs along one dimension: as many as the layer has, at most about this many."""
_ROWS = 5
_LEVEL = 1
_TOLERANCE = 1e-5

_outcomes: dict[tuple[Any, ...], bool] = {}


def variant(layer: _Layer, **changes: Any) -> _Layer:
    """A layer over the same tensors, with other hyperparameters or tensors."""
    changed = copy.copy(layer)
    changed._buffers = dict(layer._buffers)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def conv2d(layer: QuantizedConv2d, way: Route, shape: Sequence[int], make: Make) -> bool:
    """True if a convolution agrees with the reference for inputs ``(N, C, H, W)`` of a shape.

    Args:
        layer: the convolution.
        way: of its input to the operator.
        shape: of the input; the trial is no larger than it takes to see a few outputs.
        make: the kernel under trial, from a layer with the same weight and ``may_overwrite_residual``.
    """
    n = 2 if shape[0] > 1 else 1
    height, width = (_enough(layer, axis, shape[axis + 2]) for axis in (0, 1))
    form = (type(layer), *_values(layer), way, n, height, width)
    if form not in _outcomes:
        x = _extremes(n, layer.in_channels, height, width).contiguous(memory_format=torch.channels_last)
        _outcomes[form] = _agrees(layer, x, lambda probe: make(probe, may_overwrite_residual=False))
    return _outcomes[form]


def linear(layer: QuantizedLinear | DynamicLinear, make: Make) -> bool:
    """True if a linear layer agrees with the reference.

    Args:
        layer: static or dynamic.
        make: the kernel under trial, from a static layer with the same weight.
    """
    form = (type(layer), *_values(layer))
    if form not in _outcomes:
        static = layer if isinstance(layer, QuantizedLinear) else _static(layer)
        _outcomes[form] = _agrees(static, _extremes(_ROWS, layer.in_features), make)
    return _outcomes[form]


def _values(layer: Weighted) -> tuple[Any, ...]:
    """Hyperparameters, of scales and zero points only presence, bits and whether the zero point is 0."""
    values = (getattr(layer, field.name) for field in parse_fields(layer.fields))
    return tuple(("q", v.zero_point == 0, v.bits) if isinstance(v, QParams) else v for v in values)


def _static(layer: DynamicLinear) -> QuantizedLinear:
    shape = (layer.in_features, layer.out_features, layer.has_bias)
    with torch.device("meta"):
        static = QuantizedLinear(*shape, QParams(1.0, 128), None)
    static._buffers = dict(layer._buffers)
    return static


def _enough(layer: QuantizedConv2d, axis: int, length: int) -> int:
    extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    return min(length, extent + _STEPS * layer.stride[axis])


def _extremes(*shape: int) -> Tensor:
    """Mostly 0 and 255, so that sums are as large as they get."""
    drawn = torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(0))
    return (drawn - 384).clamp_(0, 255).to(torch.uint8)


def _agrees(layer: QuantizedConv2d | QuantizedLinear, x: Tensor, make: Make) -> bool:
    """True if the sums are exact, and the outputs made of them right to one quantization level."""
    channels, part, seen = _part(layer, x)
    kind: Callable[..., Tensor] = (
        reference.convolution if isinstance(layer, QuantizedConv2d) else reference.linear
    )
    unit = torch.ones_like(layer.scale)
    sums: dict[str, Any] = {
        "input": QParams(1.0, layer.input.zero_point),
        "output": None,
        "activation": "none",
        "bias": None,
    }
    if isinstance(layer, QuantizedConv2d):
        sums["residual"] = None
    exact = kind(variant(part, scale=unit[channels], **sums), seen)
    dim = 1 if x.dim() == 4 else -1
    got = make(variant(layer, scale=unit, **sums))(x).index_select(dim, channels)
    if not torch.allclose(got, exact, rtol=_TOLERANCE, atol=0):
        return False
    if layer.output is None and ACTIVATIONS[layer.activation].idle:
        return True
    # Scales with which the results spread over the output's range instead of lying beyond it.
    largest = exact.abs().max().clamp(min=1)
    wanted = layer.output.scale * layer.output.top * 0.4 if layer.output is not None else 4.0
    scale = unit * (wanted / (float(largest) * layer.input.scale))
    residual = []
    if isinstance(layer, QuantizedConv2d) and layer.residual is not None:
        residual = [_extremes(got.shape[0], layer.out_channels, *got.shape[2:])]
    expected = kind(variant(part, scale=scale[channels]), seen, *(r[:, channels] for r in residual))
    got = make(variant(layer, scale=scale))(x, *residual).index_select(dim, channels)
    if layer.output is None:
        return torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
    return int((got.int() - expected.int()).abs().max()) <= _LEVEL


def _part(layer: _Layer, x: Tensor) -> tuple[Tensor, _Layer, Tensor]:
    """Some output channels, the layer that has only those, and the input that it reads."""
    groups = layer.groups if isinstance(layer, QuantizedConv2d) else 1
    per_group = len(layer.weight) // groups
    if groups == 1:
        channels = _spread(len(layer.weight))
    else:
        chosen = _spread(groups)
        channels = (chosen[:, None] * per_group + torch.arange(per_group)).flatten()
        inputs = (chosen[:, None] * layer.weight.shape[1] + torch.arange(layer.weight.shape[1])).flatten()
        x = x.index_select(1, inputs)
    tensors = {n: b[channels] for n, b in layer._buffers.items() if b is not None}
    part = variant(layer, **tensors)
    if isinstance(part, QuantizedConv2d) and groups > 1:
        part.groups = len(chosen)
    return channels, part, x


def _spread(n: int) -> Tensor:
    places: Tensor = torch.linspace(0, n - 1, min(n, _CHANNELS)).round().long().unique()
    return places
