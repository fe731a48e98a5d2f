"""Float32 layers whose weights oneDNN lays out once, with the activation and the addition that follow them.

They compute what the layers that they hold do, up to the rounding of float32 sums. What the operators do not
take, gain nothing by or, at the first input, compute differently is left to the layers themselves.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.kernels.im2col import output_size
from modelopt_cli.kernels.onednn import POST_OPS
from modelopt_cli.kernels.own_gradients import with_own_gradients
from modelopt_cli.program.quantization import ACTIVATIONS

_conv = torch.ops.mkldnn._convolution_pointwise.default
_conv_add = torch.ops.mkldnn._convolution_pointwise.binary
_linear = torch.ops.mkldnn._linear_pointwise.default

Run = Callable[..., Tensor]

TOLERANCE = 1e-3
"""Largest difference from the layer itself, as a fraction of its largest value; rounding makes less."""
FEW_PRODUCTS = 10_000_000
"""Multiplications up to which a matrix product is left to torch, whose call costs less (measured, AVX512)."""
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(x: Tensor) -> Tensor:
    """A batch of images or volumes with channels last in memory, as the operators want it."""
    return x.contiguous(memory_format=_LAYOUTS.get(x.dim(), torch.contiguous_format))


class Packed(nn.Module):
    """A layer with what follows it, for one weight, which is packed for the shape of the input.

    Another shape packs again, so that the values of an input depend on nothing that came before. A copy packs
    its own.

    Args:
        layer: float32, on the CPU.
        activation: a key of ``ACTIVATIONS``.
    """

    def __init__(self, layer: Any, activation: str) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation
        self.post_op = POST_OPS[activation].arguments
        self._built: tuple[torch.Size, Run] | None = None
        self._right: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None, "_right": None}

    def forward(self, x: Tensor, *other: Tensor) -> Tensor:
        if self._built is None or x.shape != self._built[0]:
            self._built = x.shape, self._build(x, *other)
        run = self._built[1]
        if torch.is_grad_enabled():
            return with_own_gradients(self.layer, self.own, run, x, *other)
        return run(x, *other)

    def own(self, x: Tensor, *other: Tensor) -> Tensor:
        """The values by ordinary operators."""
        y: Tensor = self.layer(x)
        return ACTIVATIONS[self.activation](y + other[0] if other else y)

    def _build(self, x: Tensor, *other: Tensor) -> Run:
        """The operator with its packed weight, or ``own`` where that is quicker or the operator wrong."""
        if not (type(x) is Tensor and self.takes(x)) or self.products(x) <= FEW_PRODUCTS:
            return self.own
        with torch.no_grad():
            try:
                run = self.operator(x)
                if self._right is None:  # a sample tells: all are computed alike
                    first = (each[:1] for each in (x, *other))
                    self._right = _agrees(run(x, *other)[:1], self.own(*first))
            except (RuntimeError, NotImplementedError):
                self._right = False
        return run if self._right else self.own

    def takes(self, x: Tensor) -> bool:
        """True if the operator takes inputs of this shape."""
        raise NotImplementedError

    def products(self, x: Tensor) -> float:
        """Multiplications of an input's matrix product; without end where the layer is none."""
        raise NotImplementedError

    def operator(self, x: Tensor) -> Run:
        """The operator with the weight packed for an input's shape."""
        raise NotImplementedError


class PackedConvolution(Packed):
    """A convolution with its activation, and with an addition before that if called with two inputs.

    Rows are images of height 1, which oneDNN's operator takes.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, activation: str) -> None:
        super().__init__(conv, activation)
        self.of_rows = isinstance(conv, nn.Conv1d)
        self.rank = conv.weight.dim() - 2
        padding = [0] * self.rank if isinstance(conv.padding, str) else list(conv.padding)
        high = [1] if self.of_rows else []
        self.kernel_size = (*high, *conv.kernel_size)
        self.geometry = (
            [0] * len(high) + padding,
            [*high, *conv.stride],
            [*high, *conv.dilation],
            conv.groups,
        )

    def takes(self, x: Tensor) -> bool:
        return x.dim() == self.rank + 2 and x.numel() > 0

    def products(self, x: Tensor) -> float:
        padding, stride, _, groups = self.geometry
        is_product = groups == 1 and {*self.kernel_size, *stride} == {1} and not any(padding)
        return x.numel() * self.layer.out_channels if is_product else math.inf

    def operator(self, x: Tensor) -> Run:
        if not self.of_rows:
            return self._of_images(x, self.layer.weight.detach())
        run = self._of_images(x.unsqueeze(-2), self.layer.weight.detach().unsqueeze(2))
        return lambda *inputs: run(*(each.unsqueeze(-2) for each in inputs)).squeeze(-2)

    def _of_images(self, x: Tensor, weight: Tensor) -> Run:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(x.shape))
        shape, bias, after = self._output_shape(x), self.layer.bias, ACTIVATIONS[self.activation]
        rest = (packed, bias, *self.geometry)
        added: tuple[Any, ...] = (*rest, "add", None, None if after.idle else self.post_op[0], [], None)

        def run(x: Tensor, other: Tensor | None = None) -> Tensor:
            y: Tensor
            if other is None:
                y = _conv(laid_out(x), *rest, *self.post_op)
            elif other.shape == shape:
                y = _conv_add(laid_out(x), laid_out(other), *added)
            else:
                y = after(_conv(laid_out(x), *rest, *POST_OPS["none"].arguments) + other)
            return y

        return run

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        padding, stride, dilation, _ = self.geometry
        windows = zip(x.shape[2:], self.kernel_size, stride, padding, dilation, strict=True)
        sides = (output_size(*side) for side in windows)
        return (x.shape[0], self.layer.out_channels, *sides)


class PackedLinear(Packed):
    """A linear layer with its activation."""

    def takes(self, x: Tensor) -> bool:
        return x.dim() > 1 and x.numel() > 0

    def products(self, x: Tensor) -> float:
        return float(x.numel() * self.layer.out_features)

    def operator(self, x: Tensor) -> Run:
        packed = torch.ops.mkldnn._reorder_linear_weight(self.layer.weight.detach(), None)
        rest = (packed, self.layer.bias, *self.post_op)
        return lambda x: _linear(x, *rest)


def packed_layer(layer: nn.Module, activation: str) -> Packed | None:
    """The packed form of a layer with its activation, or None where it has none."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype is not torch.float32 or not weight.is_cpu:
        return None
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer, activation)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    plain = layer.padding_mode == "zeros" and layer.padding != "same"
    return PackedConvolution(layer, activation) if plain else None


def _agrees(y: Tensor, own: Tensor) -> bool:
    largest = float(own.abs().nan_to_num(0.0, 0.0).max())
    return torch.allclose(y, own, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)
