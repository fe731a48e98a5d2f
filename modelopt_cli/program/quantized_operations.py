"""Quantized layers without weights: conversions, sums, products and pools of uint8 activations."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.program.quantization import (
    ACTIVATIONS,
    QParams,
    dequantize,
    form_of_maps,
    quantize,
    real_input,
    require_maps,
)
from modelopt_cli.program.quantized import Quantized

_ANY = "|".join(ACTIVATIONS)


class Quantize(Quantized):
    """float32 to uint8.

    Attributes:
        for_rows: linear layers read its output, so that its last dimension stays last in memory;
            ``kernels.prepare`` finds out.
    """

    fields = "output:q"
    for_rows = False

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.output = output

    def real(self, *args: Tensor) -> Tensor:
        """The value, before it is rounded."""
        return real_input(args[0])

    def emulate(self, *args: Tensor) -> Tensor:
        q = quantize(self.real(*args), self.output)
        if q.dim() != 4 or self.for_rows:
            return q
        # The convolutions that follow read channels-last; one byte an element is the cheapest to move.
        return q.contiguous(memory_format=torch.channels_last)


class Dequantize(Quantized):
    """uint8 to float32."""

    fields = "input:q"

    def __init__(self, input: QParams) -> None:
        super().__init__()
        self.input = input

    def emulate(self, *args: Tensor) -> Tensor:
        return dequantize(args[0], self.input)


class QuantizedAdd(Quantized):
    """Sum of two uint8 tensors of one shape (or broadcastable), with an activation, uint8 out."""

    fields = f"input:q other:q output:q activation:{_ANY}"
    arity = 2

    def __init__(self, input: QParams, other: QParams, output: QParams, activation: str = "none") -> None:
        super().__init__()
        self.input, self.other, self.output = input, other, output
        self.activation = activation

    def real(self, *args: Tensor) -> Tensor:
        """The sum of real values, before it is rounded."""
        return ACTIVATIONS[self.activation](args[0] + args[1])

    def emulate(self, *args: Tensor) -> Tensor:
        total = self.real(dequantize(args[0], self.input), dequantize(args[1], self.other))
        return quantize(total, self.output, reuse=True)


class QuantizedMul(Quantized):
    """Product of two float tensors (a squeeze-excitation gate, say), uint8 out.

    The factors stay float32 because a table look-up costs more on a CPU than this product does.
    """

    fields = "output:q"
    arity = 2

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.output = output

    def real(self, *args: Tensor) -> Tensor:
        """The product, before it is rounded."""
        return args[0] * args[1]

    def emulate(self, *args: Tensor) -> Tensor:
        return quantize(self.real(*args), self.output, reuse=True)


class QuantizedMaxPool(Quantized):
    """Max pooling of uint8 ``(N, C, ...)``; scale and zero point pass through.

    Padding takes part as 0, the smallest uint8, as minus infinity does in float.

    Attributes:
        rank: number of dimensions of space.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode

    def takes(self, shape: torch.Size) -> bool:
        return len(shape) == 2 + self.rank

    @property
    def input_form(self) -> str:
        return form_of_maps("C", self.rank)

    def emulate(self, *args: Tensor) -> Tensor:
        require_maps(args[0], self.rank)
        # torch's own uint8 max_pool2d refuses planes of more than 255 elements.
        x = args[0].float()
        windows = (self.kernel_size, self.stride, self.padding, self.dilation)
        y: Tensor = _MAX_POOLS[self.rank](x, *windows, self.ceil_mode)
        return y.to(torch.uint8)


_MAX_POOLS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _max_fields(rank: int) -> str:
    windows = f"kernel_size:countsx{rank} stride:countsx{rank} padding:sizesx{rank} dilation:countsx{rank}"
    return f"{windows} ceil_mode:bool"


class QuantizedMaxPool1d(QuantizedMaxPool):
    """Max pooling of uint8 ``(N, C, L)``."""

    rank, fields = 1, _max_fields(1)


class QuantizedMaxPool2d(QuantizedMaxPool):
    """Max pooling of uint8 ``(N, C, H, W)``."""

    rank, fields = 2, _max_fields(2)


class QuantizedMaxPool3d(QuantizedMaxPool):
    """Max pooling of uint8 ``(N, C, D, H, W)``."""

    rank, fields = 3, _max_fields(3)


class QuantizedAvgPool(Quantized):
    """Average pooling of uint8 ``(N, C, ...)``, uint8 out with a scale of its own.

    ``output_size`` set: adaptive pooling to that size. Otherwise a window, as in ``nn.AvgPool2d``.
    Averages span a narrower range than what they average, hence their own scale. Padding counts
    as real zeros.

    Attributes:
        rank: number of dimensions of space.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        input: QParams,
        output: QParams,
        output_size: tuple[int | None, ...] | None = None,
        kernel_size: tuple[int, ...] | None = None,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | None = None,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        keepdim: bool = True,
    ) -> None:
        super().__init__()
        if (output_size is None) == (kernel_size is None):
            raise ValueError("give output_size or kernel_size")
        self.input, self.output = input, output
        self.output_size, self.kernel_size, self.stride = output_size, kernel_size, stride
        self.padding, self.ceil_mode = padding or (0,) * self.rank, ceil_mode
        self.count_include_pad, self.keepdim = count_include_pad, keepdim

    def real(self, *args: Tensor) -> Tensor:
        """The averages of real values, before they are rounded."""
        adaptive, windowed = _AVERAGES[self.rank]
        if self.output_size is not None:
            y: Tensor = adaptive(args[0], self.output_size)
        else:
            windows = (self.kernel_size, self.stride, self.padding)
            y = windowed(args[0], *windows, self.ceil_mode, self.count_include_pad)
        return y if self.keepdim else y.flatten(1)

    def emulate(self, *args: Tensor) -> Tensor:
        require_maps(args[0], self.rank)
        return quantize(self.real(dequantize(args[0], self.input)), self.output, reuse=True)


_AVERAGES: dict[int, Any] = {
    1: (F.adaptive_avg_pool1d, F.avg_pool1d),
    2: (F.adaptive_avg_pool2d, F.avg_pool2d),
    3: (F.adaptive_avg_pool3d, F.avg_pool3d),
}
"""By rank: adaptive averages, and those of windows."""


def _average_fields(rank: int) -> str:
    sizes = f"output_size:targetsx{rank}? kernel_size:countsx{rank}? stride:countsx{rank}?"
    options = f"padding:sizesx{rank} ceil_mode:bool count_include_pad:bool keepdim:bool"
    return f"input:q output:q {sizes} {options}"


class QuantizedAvgPool1d(QuantizedAvgPool):
    """Average pooling of uint8 ``(N, C, L)``."""

    rank, fields = 1, _average_fields(1)


class QuantizedAvgPool2d(QuantizedAvgPool):
    """Average pooling of uint8 ``(N, C, H, W)``."""

    rank, fields = 2, _average_fields(2)


class QuantizedAvgPool3d(QuantizedAvgPool):
    """Average pooling of uint8 ``(N, C, D, H, W)``."""

    rank, fields = 3, _average_fields(3)
