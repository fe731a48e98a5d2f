"""int8 on the CPU through oneDNN's operators on plain tensors, those Inductor itself lowers to.

A convolution is packed at the first call for the shape it meets there: oneDNN lays the weight out
for one input shape and is right, only slower, for others. What is packed is checked before it is used
(``trials``); what fails there runs through the reference backend.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from modelopt_cli.kernels import reference, trials
from modelopt_cli.kernels.routes import Route, Taps, idle_taps, may_fuse_residual, route
from modelopt_cli.kernels.trials import variant
from modelopt_cli.program.quantization import (
    ACTIVATIONS,
    BITS,
    QParams,
    dequantize,
    dynamic_qparams,
    quantize,
)
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear

_conv = torch.ops.onednn.qconv2d_pointwise.default
_conv_sum = torch.ops.onednn.qconv2d_pointwise.binary
_linear = torch.ops.onednn.qlinear_pointwise.default


@dataclass(frozen=True)
class PostOp:
    """An activation as oneDNN's operators apply it themselves; the float32 ones take every row.

    Attributes:
        name, scalars, algorithm: oneDNN's.
        conv, conv_sum, linear: int8 operators that take it: convolution, convolution with a residual, linear.
    """

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""
    conv: bool = False
    conv_sum: bool = False
    linear: bool = False

    @property
    def arguments(self) -> tuple[str, list[float], str]:
        """The last three arguments of an operator."""
        return self.name, list(self.scalars), self.algorithm


POST_OPS: dict[str, PostOp] = {
    "none": PostOp("none", conv=True, conv_sum=True, linear=True),
    "relu": PostOp("relu", conv=True, conv_sum=True, linear=True),
    "relu6": PostOp("hardtanh", (0.0, 6.0), conv=True),
    "hardswish": PostOp("hardswish", conv=True),
    "silu": PostOp("swish", conv=True),
    "gelu": PostOp("gelu", algorithm="none", linear=True),
}
"""Activation to what applies it. What an operator does not take is computed after it."""


def _target(output: QParams | None) -> tuple[float, int, torch.dtype]:
    """Output scale, zero point and dtype as the operators want them; float output has none."""
    return (1.0, 0, torch.float32) if output is None else (output.scale, output.zero_point, torch.uint8)


def _narrowed(run: Callable[..., Tensor], output: QParams | None) -> Callable[..., Tensor]:
    """An operator's result, which it clamps at 255, within the levels of an output of fewer bits."""
    if output is None or output.bits == BITS:
        return run
    top = output.top

    def narrowed(*args: Tensor) -> Tensor:
        return run(*args).clamp_(max=top)

    return narrowed


def conv2d(layer: QuantizedConv2d, *, may_overwrite_residual: bool) -> Callable[..., Tensor]:
    """The kernel of a convolution.

    Args:
        layer: the convolution; its weights are read once, at the first call.
        may_overwrite_residual: nobody reads the residual after this layer. The operator adds in
            place, so otherwise the residual is copied first.
    """
    packings: dict[tuple[Taps, Route], _PackedConv] = {}
    kernels: dict[torch.Size, Callable[..., Tensor]] = {}

    def kernel_for(x: Tensor) -> Callable[..., Tensor]:
        taps = idle_taps(layer, x.shape[2:])
        reduced = _of_taps(layer, taps)
        way = route(reduced, x.shape[2], x.shape[3])
        if way is not None:
            packed = packings.setdefault((taps, way), _PackedConv(reduced, way))
            packed.lay_out(x)
            if trials.conv2d(reduced, way, x.shape, partial(_any_activation, packed=packed)):
                return _any_activation(reduced, packed, may_overwrite_residual)
        return partial(reference.convolution, reduced)

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        kernel = kernels.get(x.shape[2:])
        if kernel is None:
            kernel = kernels[x.shape[2:]] = kernel_for(x)
        return kernel(x, *residual)

    return run


def _of_taps(layer: QuantizedConv2d, taps: Taps) -> QuantizedConv2d:
    """The convolution without its outermost taps, as many on either side, and without what they read."""
    if not any(taps):
        return layer
    kernel = tuple(size - 2 * count for size, count in zip(layer.kernel_size, taps, strict=True))
    sides = zip(layer.padding, layer.dilation, taps, strict=True)
    padding = tuple(pad - dilation * count for pad, dilation, count in sides)
    (top, left), (high, wide) = taps, kernel
    weight = layer.weight[:, :, top : top + high, left : left + wide].contiguous()
    return variant(layer, weight=weight, kernel_size=kernel, padding=padding)


class _PackedConv:
    """A convolution's weight as oneDNN wants it, and the input that fits it.

    Args:
        layer: whose weight it is.
        way: of the input to the operator.
    """

    def __init__(self, layer: QuantizedConv2d, way: Route) -> None:
        self.layer, self.sides, self.taps = layer, way.sides, way.taps
        padding = [0, 0] if any(way.sides[:4]) else list(layer.padding)
        self.geometry = (list(way.stride or layer.stride), padding, list(layer.dilation), layer.groups)
        self.zeros = torch.zeros(layer.out_channels, dtype=torch.int8)
        self.weight: Tensor | None = None

    def lay_out(self, x: Tensor) -> None:
        """Pack the weight, once, for the shape of an input."""
        if self.weight is None:
            layer, source = self.layer, (self.layer.input.scale, self.layer.input.zero_point)
            more = (0, self.taps, 0, 0, *self.sides[4:])
            weight = F.pad(layer.weight, more) if any(more) else layer.weight
            shape = list(self.padded(x).shape)
            self.weight = torch.ops.onednn.qconv_prepack(weight, layer.scale, *source, *self.geometry, shape)

    def padded(self, x: Tensor) -> Tensor:
        """The input with its sides."""
        return F.pad(x, self.sides, value=self.layer.input.zero_point) if self.sides else x


def _any_activation(
    layer: QuantizedConv2d, packed: _PackedConv, may_overwrite_residual: bool
) -> Callable[..., Tensor]:
    """The operator with its post-ops; where it lacks those, its sums and the rest after it."""
    if layer.residual is None:
        fuses = POST_OPS[layer.activation].conv
    else:
        fuses = POST_OPS[layer.activation].conv_sum and may_fuse_residual(layer)
    if fuses:
        return _conv_operator(layer, packed, may_overwrite_residual)
    plain = _conv_operator(variant(layer, activation="none", residual=None, output=None), packed, False)

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        return _finish(layer, plain(x), *residual)

    return run


def _finish(layer: Weighted, y: Tensor, residual: Tensor | None = None) -> Tensor:
    if residual is not None and isinstance(layer, QuantizedConv2d) and layer.residual is not None:
        y = y + dequantize(residual, layer.residual)
    y = ACTIVATIONS[layer.activation](y)
    return y if layer.output is None else quantize(y, layer.output, reuse=True)


def _conv_operator(
    layer: QuantizedConv2d, packed: _PackedConv, may_overwrite_residual: bool
) -> Callable[..., Tensor]:
    post_op = POST_OPS[layer.activation].arguments
    source, target = (layer.input.scale, layer.input.zero_point), _target(layer.output)
    geometry, weight = packed.geometry, packed.weight
    scale, zeros, bias = layer.scale, packed.zeros, layer.bias
    padded = packed.padded if packed.sides else None
    rest = (*source, weight, scale, zeros, bias, *geometry, *target, *post_op)

    def plain(x: Tensor) -> Tensor:
        y: Tensor = _conv(x if padded is None else padded(x), *rest)
        return y

    def summed(x: Tensor, residual: Tensor) -> Tensor:
        if padded is not None:
            x = padded(x)
        assert layer.residual is not None
        # In any other layout the operator would add to a copy of its own and return the residual itself.
        laid_out = residual.contiguous(memory_format=torch.channels_last)
        if laid_out is residual and not may_overwrite_residual:
            laid_out = residual.clone()
        y: Tensor = _conv_sum(
            *(x, *source, weight, scale, zeros, laid_out, bias, *geometry, *target),
            *(layer.residual.scale, layer.residual.zero_point),
            *("sum", 1.0, *post_op),
        )
        return y

    return _narrowed(plain if layer.residual is None else summed, layer.output)


_packed_weights: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()


def _packed_weight(weight: Tensor) -> Tensor:
    """A linear layer's weight as oneDNN wants it, the same for all layers that share it."""
    version = None if weight.is_inference() else weight._version
    known = _packed_weights.get(weight)
    if known is not None and known[0] == version:
        return known[1]
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    if version is not None:
        _packed_weights[weight] = version, packed
    return packed


def linear(layer: QuantizedLinear) -> Callable[..., Tensor]:
    """The kernel of a linear layer."""
    packed = _packed_weight(layer.weight)
    if not trials.linear(layer, lambda probe: _linear_kernel(probe, packed)):
        return partial(reference.linear, layer)
    return _linear_kernel(layer, packed)


def _linear_kernel(layer: QuantizedLinear, packed: Tensor) -> Callable[..., Tensor]:
    fuses = POST_OPS[layer.activation].linear
    fused, output = (layer.activation, layer.output) if fuses else ("none", None)
    post_op = POST_OPS[fused].arguments
    source, target = (layer.input.scale, layer.input.zero_point), _target(output)
    scale, bias = layer.scale, layer.bias
    zeros = torch.zeros(layer.out_features, dtype=torch.int8)

    rest = (*source, packed, scale, zeros, bias, *target, *post_op)

    def plain(x: Tensor) -> Tensor:
        y: Tensor = _linear(x, *rest)
        return y if fuses else _finish(layer, y)

    of_rows = _narrowed(plain, output)

    def run(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return of_rows(x)
        return of_rows(x.reshape(-1, layer.in_features)).view(*x.shape[:-1], layer.out_features)

    return run


def dynamic_linear(layer: DynamicLinear) -> Callable[..., Tensor]:
    """The kernel of a linear layer that quantizes its input at every call."""
    packed = _packed_weight(layer.weight)
    if not trials.linear(layer, lambda probe: _linear_kernel(probe, packed)):
        return partial(reference.dynamic_linear, layer)
    scale, bias = layer.scale, layer.bias
    zeros = torch.zeros(layer.out_features, dtype=torch.int8)
    target, post_op = _target(None), POST_OPS["none"].arguments

    def run(x: Tensor) -> Tensor:
        q = dynamic_qparams(x, layer.input_bits)
        rows = quantize(x.reshape(-1, layer.in_features), q)
        y: Tensor = _linear(rows, q.scale, q.zero_point, packed, scale, zeros, bias, *target, *post_op)
        return y.view(*x.shape[:-1], layer.out_features)

    return run
