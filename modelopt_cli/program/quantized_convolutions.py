"""Quantized convolutions over one, two or three dimensions of space.

Their kernels compute all of them as 2-D convolutions (``kernels.lowering``); the float32 forms here do not.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Size, Tensor

from modelopt_cli.program.quantization import (
    ACTIVATIONS,
    BITS,
    QParams,
    dequantize,
    form_of_maps,
    require_maps,
)
from modelopt_cli.program.quantized import WEIGHT_BITS, Weighted

_FUNCTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d}


def _fields(rank: int, rest: str = "residual:q?") -> str:
    windows = f"kernel_size:countsx{rank} stride:countsx{rank} padding:sizesx{rank} dilation:countsx{rank}"
    form = f"groups:count has_bias:bool input:q output:q? activation:{'|'.join(ACTIVATIONS)}"
    return f"in_channels:count out_channels:count {windows} {form} {rest} {WEIGHT_BITS}"


def transposed_convolution(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A transposed convolution in floating point with the geometry of a layer, torch's or ours."""
    windows = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    y: Tensor = _TRANSPOSED[len(layer.kernel_size)](x, weight, bias, *windows)
    return y


def turned(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight in the form of a transposed one, or the other way round.

    Args:
        weight: ``(O, C / groups, ...)`` or ``(C, O / groups, ...)``.
        groups: of the convolution.
    """
    by_group: Tensor = weight.unflatten(0, (groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1)


class QuantizedConvolution(Weighted):
    """Convolution, uint8 ``(N, C, ...)`` in; uint8 or, where ``output`` is None, float32 out.

    ``residual`` adds a second uint8 input to the result before the activation.

    Attributes:
        rank: number of dimensions of space.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        has_bias: bool,
        input: QParams,
        output: QParams | None,
        activation: str = "none",
        residual: QParams | None = None,
        weight_bits: int = BITS,
    ) -> None:
        super().__init__()
        if residual is not None and output is None:
            raise ValueError("a fused residual needs a quantized output")
        if in_channels % groups or out_channels % groups:
            raise ValueError("the channels cannot be divided by groups")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel_size, stride
        self.padding, self.dilation, self.groups = padding, dilation, groups
        self.has_bias = has_bias
        self.input, self.output, self.residual = input, output, residual
        self.arity = 1 if residual is None else 2
        self.activation, self.weight_bits = activation, weight_bits
        self._allocate(self.weight_shape, out_channels, has_bias)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape that the weight must have."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups, as torch's functions take them."""
        return self.stride, self.padding, self.dilation, self.groups

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution itself, in floating point: ``x`` and ``weight`` are of one type."""
        y: Tensor = _FUNCTIONS[self.rank](x, weight, bias, *self.geometry)
        return y

    def takes(self, shape: Size) -> bool:
        return len(shape) == 2 + self.rank and shape[1] == self.in_channels

    @property
    def input_form(self) -> str:
        return form_of_maps(self.in_channels, self.rank)

    def emulate(self, *args: Tensor) -> Tensor:
        require_maps(args[0], self.rank)
        y = self.convolve(dequantize(args[0], self.input), self.float_weight(), self.bias)
        if self.residual is not None:
            if args[1].shape != y.shape:
                raise ValueError(f"the residual has the shape {tuple(args[1].shape)}, not {tuple(y.shape)}")
            y = y + dequantize(args[1], self.residual)
        return self._finish(y)


class QuantizedConv1d(QuantizedConvolution):
    """1-D convolution of ``(N, C, L)``."""

    rank, fields = 1, _fields(1)


class QuantizedConv2d(QuantizedConvolution):
    """2-D convolution of ``(N, C, H, W)``."""

    rank, fields = 2, _fields(2)


def stacked(weight: Tensor, depth: int) -> Tensor:
    """A 3-D convolution's weight in the form of a 2-D one, or the other way round.

    The taps along depth become input channels, those of one tap next to each other, as they are multiplied.

    Args:
        weight: ``(O, C / groups, depth, KH, KW)`` or ``(O, depth * C / groups, KH, KW)``.
        depth: of the kernel.
    """
    if weight.dim() == 5:
        return weight.transpose(1, 2).flatten(1, 2)
    by_tap: Tensor = weight.unflatten(1, (depth, -1))
    return by_tap.transpose(1, 2)


class QuantizedConv3d(QuantizedConvolution):
    """3-D convolution of ``(N, C, D, H, W)``."""

    rank, fields = 3, _fields(3)

    def turned(self, weight: Tensor) -> Tensor:
        return stacked(weight, self.kernel_size[0])


class QuantizedTransposed(QuantizedConvolution):
    """Transposed convolution, uint8 ``(N, C, ...)`` in; uint8 or, where ``output`` is None, float32 out.

    Its weight is ``(C, O / groups, ...)``, as torch has it; there is a scale for each output channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        has_bias: bool,
        input: QParams,
        output: QParams | None,
        activation: str,
        output_padding: tuple[int, ...],
        weight_bits: int = BITS,
    ) -> None:
        windows = (kernel_size, stride, padding, dilation, groups)
        precision = (input, output, activation, None, weight_bits)
        super().__init__(in_channels, out_channels, *windows, has_bias, *precision)
        self.output_padding = output_padding

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def turned(self, weight: Tensor) -> Tensor:
        return turned(weight, self.groups)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return transposed_convolution(self, x, weight, bias)


class QuantizedConvTranspose1d(QuantizedTransposed):
    """Transposed 1-D convolution of ``(N, C, L)``."""

    rank, fields = 1, _fields(1, "output_padding:sizesx1")


class QuantizedConvTranspose2d(QuantizedTransposed):
    """Transposed 2-D convolution of ``(N, C, H, W)``."""

    rank, fields = 2, _fields(2, "output_padding:sizesx2")
