"""Other convolutions as 2-D ones of the same integers, so that each backend needs one kernel for all.

A transposed convolution of stride ``s`` is an ordinary one of stride 1: each of its ``s`` phases (the output
places ``s j + r``) sees only every ``s``-th tap of the kernel. So the phases are as many sets of output
channels, and a shuffle puts them into their places (Shi et al., "Is the deconvolution layer the same as a
convolutional layer?", 2016).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvolution,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedTransposed,
)


@dataclass(frozen=True)
class Lowered:
    """Another convolution that computes what a layer does.

    Attributes:
        conv: the convolution.
        before: makes its input of the layer's.
        after: makes the layer's output of its own, and of the layer's input, whose shape it may need.
        residual: makes its residual of the layer's.
    """

    conv: QuantizedConvolution
    before: Callable[[Tensor], Tensor]
    after: Callable[[Tensor, Tensor], Tensor]
    residual: Callable[[Tensor], Tensor] = lambda residual: residual

    def around(self, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer's kernel, of the kernel of the other convolution."""
        before, after, changed = self.before, self.after, self.residual
        if self.conv.residual is None:
            return lambda x: after(kernel(before(x)), x)
        return lambda x, residual: after(kernel(before(x), changed(residual)), x)


def _convolution(
    kind: type[QuantizedConvolution], layer: QuantizedConvolution, tensors: dict[str, Tensor], **options: Any
) -> QuantizedConvolution:
    """A convolution with a layer's hyperparameters and tensors but for these."""
    kept = ("in_channels", "out_channels", "groups", "has_bias", "input", "output", "activation", "residual")
    with torch.device("meta"):
        conv = kind(**{name: getattr(layer, name) for name in kept} | options)
    conv._buffers = {**layer._buffers, **tensors}
    return conv


# --- rows ----------------------------------------------------------------------------------------------


def _of_rows(layer: QuantizedConv1d) -> Lowered:
    """Rows as images of height 1; nothing is copied but the windows of a single channel."""
    if layer.in_channels == 1:
        return _of_windows(layer)
    windows: dict[str, Any] = {n: (1, *getattr(layer, n)) for n in ("kernel_size", "stride", "dilation")}
    windows["padding"] = (0, *layer.padding)
    conv = _convolution(QuantizedConv2d, layer, {"weight": layer.weight.unsqueeze(2)}, **windows)
    image: Callable[[Tensor], Tensor] = lambda x: x.unsqueeze(2)  # noqa: E731
    return Lowered(conv, image, lambda y, x: y.squeeze(2), image)


def _of_windows(layer: QuantizedConv1d) -> Lowered:
    """The taps of each window on a single channel as channels, which int8 operators multiply in fours."""
    (taps,), (stride,), (padding,), (dilation,) = (
        getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    single: dict[str, Any] = dict.fromkeys(("kernel_size", "stride", "dilation"), (1, 1))
    windows = {**single, "padding": (0, 0), "in_channels": taps}
    weight = layer.weight.view(-1, taps, 1, 1)
    conv = _convolution(QuantizedConv2d, layer, {"weight": weight}, **windows)

    def before(x: Tensor) -> Tensor:
        x = F.pad(x, (padding, padding), value=layer.input.zero_point) if padding else x
        n, _, length = x.shape
        count = (length - dilation * (taps - 1) - 1) // stride + 1
        along = x.stride(2)
        steps = (x.stride(0), along * stride, along * stride, along * dilation)
        rows = x.as_strided((n, 1, count, taps), steps, x.storage_offset())
        return rows.contiguous().permute(0, 3, 1, 2)

    image: Callable[[Tensor], Tensor] = lambda r: r.unsqueeze(2)  # noqa: E731
    return Lowered(conv, before, lambda y, x: y.squeeze(2), image)


# --- volumes -------------------------------------------------------------------------------------------


def _of_volumes(layer: QuantizedConv3d) -> Lowered:
    """Slices as images, the taps of the kernel along depth as more channels of each."""
    depth, stride, padding, dilation = (
        getattr(layer, name)[0] for name in ("kernel_size", "stride", "padding", "dilation")
    )
    windows: dict[str, Any] = {
        name: getattr(layer, name)[1:] for name in ("kernel_size", "stride", "padding", "dilation")
    }
    windows["in_channels"] = layer.in_channels * depth
    weight = layer.turned(layer.weight).contiguous()
    conv = _convolution(QuantizedConv2d, layer, {"weight": weight}, **windows)

    def before(x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 4, 1)  # (N, D, H, W, C)
        if depth > 1 or stride > 1 or padding:
            sides = (0, 0, 0, 0, 0, 0, padding, padding)
            x = F.pad(x, sides, value=layer.input.zero_point) if padding else x.contiguous()
            x = x.contiguous()
            n, length, height, width, channels = x.shape
            count = (length - dilation * (depth - 1) - 1) // stride + 1
            sn, sd, sh, sw, sc = x.stride()
            shape = (n, count, height, width, layer.groups, depth, channels // layer.groups)
            steps = (sn, sd * stride, sh, sw, sc * (channels // layer.groups), sd * dilation, sc)
            x = x.as_strided(shape, steps, x.storage_offset()).flatten(4)
        return x.flatten(0, 1).movedim(-1, 1)

    def after(y: Tensor, x: Tensor) -> Tensor:
        slices: Tensor = y.unflatten(0, (len(x), -1))
        return slices.transpose(1, 2)

    return Lowered(conv, before, after, lambda r: r.transpose(1, 2).flatten(0, 1))


# --- transposed convolutions ---------------------------------------------------------------------------

_ORDINARY: dict[int, type[QuantizedConvolution]] = {1: QuantizedConv1d, 2: QuantizedConv2d}


@dataclass(frozen=True)
class _Side:
    """One dimension of a transposed convolution: its kernel, stride and so on."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    output_padding: int

    @property
    def reach(self) -> int:
        """Distance from the first tap to the last."""
        return self.dilation * (self.kernel - 1)

    @property
    def widest_padding(self) -> int:
        """Padding beyond which any number of outputs would be computed to be thrown away."""
        return self.reach if 1 in (self.stride, self.dilation) else self.reach // 2

    @property
    def taps(self) -> int:
        """Taps that a phase sees, at most."""
        return -(-self.kernel // self.stride)

    @property
    def shift(self) -> int:
        """Places by which the phases begin before the input: enough for the first and the last output."""
        seen = self.stride * (self.dilation * (self.taps - 1) + 1)
        missing = self.output_padding + 1 + self.reach - self.padding - seen
        return max(-(self.padding // self.stride), -(-missing // self.stride))

    def length(self, length: int) -> int:
        """Length of the output."""
        return (length - 1) * self.stride - 2 * self.padding + self.reach + self.output_padding + 1


def sides_of(layer: Any) -> list[_Side]:
    """The dimensions of a transposed convolution, torch's or ours."""
    windows = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding)
    return [_Side(*side) for side in zip(*windows, strict=True)]


def overpadded(layer: Any) -> bool:
    """True for a transposed convolution whose padding takes away more than its kernel adds."""
    return any(side.padding > side.widest_padding for side in sides_of(layer))


def _of_transposed(layer: QuantizedTransposed) -> Lowered | None:
    """Phases, or zeros between the inputs where phases would be odd; None for too much padding."""
    sides = sides_of(layer)
    if overpadded(layer):
        return None
    spread = any(side.stride > 1 and (side.dilation > 1 or side.stride > side.kernel) for side in sides)
    # A phase of a depthwise convolution would be one of several outputs of a group, which kernels do badly.
    one_input = layer.groups > 1 and layer.groups == layer.in_channels
    return _with_zeros(layer, sides) if spread or one_input else _in_phases(layer, sides)


def _with_zeros(layer: QuantizedTransposed, sides: list[_Side]) -> Lowered:
    """Zeros between the inputs, and the kernel turned round."""
    space = range(2, 2 + layer.rank)
    weight = layer.turned(layer.weight).flip(*space)
    windows = {
        "kernel_size": layer.kernel_size,
        "stride": (1,) * layer.rank,
        "padding": tuple(side.reach - side.padding for side in sides),
        "dilation": layer.dilation,
    }
    places = (slice(None), *(slice(None, None, side.stride) for side in sides))

    def before(x: Tensor) -> Tensor:
        lengths = [(n - 1) * side.stride + 1 for n, side in zip(x.shape[2:], sides, strict=True)]
        more = [n + side.output_padding for n, side in zip(lengths, sides, strict=True)]
        zeros = x.new_full((len(x), *more, x.shape[1]), layer.input.zero_point)
        inner = zeros[(slice(None), *(slice(0, n) for n in lengths))]
        inner[places] = x.movedim(1, -1)
        return zeros.movedim(-1, 1)

    conv = _convolution(_ORDINARY[layer.rank], layer, {"weight": weight}, **windows)
    return Lowered(conv, before, lambda y, x: y)


def _in_phases(layer: QuantizedTransposed, sides: list[_Side]) -> Lowered:
    """A set of output channels for each phase, in the order (group, phases, channel)."""
    phases = math.prod(layer.stride)
    windows = {
        "kernel_size": tuple(side.taps for side in sides),
        "stride": (1,) * layer.rank,
        "padding": tuple(side.dilation * (side.taps - 1) + side.shift for side in sides),
        "dilation": layer.dilation,
        "out_channels": layer.out_channels * phases,
    }
    tensors = {"weight": _phases_of(layer, sides)}
    for name in ("scale", "bias"):
        values = layer._buffers[name]
        if values is not None:
            tensors[name] = values.view(layer.groups, 1, -1).repeat(1, phases, 1).flatten()
    conv = _convolution(_ORDINARY[layer.rank], layer, tensors, **windows)
    return Lowered(conv, lambda x: x, lambda y, x: _shuffled(y, x, layer, sides))


def _phases_of(layer: QuantizedTransposed, sides: list[_Side]) -> Tensor:
    """The weight ``(groups * phases * O / groups, C / groups, taps...)``, its taps in the order of inputs."""
    weight = layer.turned(layer.weight)
    ends = [n for s in reversed(sides) for n in (0, s.taps * s.stride - s.kernel)]
    weight = F.pad(weight, ends).unflatten(0, (layer.groups, -1))
    for at, side in enumerate(sides):  # (g, O / g, C / g, taps, phase, taps, phase, ...)
        weight = weight.unflatten(3 + 2 * at, (side.taps, side.stride)).flip(3 + 2 * at)
    taps, phases = (range(start, 3 + 2 * layer.rank, 2) for start in (3, 4))
    by_phase: Tensor = weight.permute(0, *phases, 1, 2, *taps).flatten(0, 1 + layer.rank).contiguous()
    return by_phase


def _shuffled(y: Any, x: Tensor, layer: QuantizedTransposed, sides: list[_Side]) -> Tensor:
    """Phases side by side put into their places; channels stay last in memory."""
    rank, inputs = layer.rank, x.shape[2:]
    y = y.movedim(1, -1).unflatten(-1, (layer.groups, *layer.stride, -1))
    places = [dim for at in range(rank) for dim in (1 + at, 2 + rank + at)]
    y = y.permute(0, *places, 1 + rank, 2 + 2 * rank)
    lengths = [side.stride * n for n, side in zip(y.shape[1 : 1 + 2 * rank : 2], sides, strict=True)]
    y = y.reshape(len(y), *lengths, layer.out_channels)
    for dim, (side, length) in enumerate(zip(sides, inputs, strict=True), 1):
        y = y.narrow(dim, side.padding + side.stride * side.shift, side.length(length))
    placed: Tensor = y.movedim(-1, 1)
    return placed


LOWERINGS: dict[type, Callable[[Any], Lowered | None]] = {
    QuantizedConv1d: _of_rows,
    QuantizedConv3d: _of_volumes,
    QuantizedConvTranspose1d: _of_transposed,
    QuantizedConvTranspose2d: _of_transposed,
}
"""Class of a layer to its form as a convolution that has a kernel, or a form in its turn."""
