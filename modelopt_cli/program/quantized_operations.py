"""Quantized layers without weights: conversions, sums, products and pools of uint8 activations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.program.quantization import (
    ACTIVATIONS,
    QParams,
    dequantize,
    quantize,
    real_input,
    require_images,
)
from modelopt_cli.program.quantized import Quantized

_ANY = "|".join(ACTIVATIONS)


class Quantize(Quantized):
    """float32 to uint8."""

    fields = "output:q"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.output = output

    def real(self, *args: Tensor) -> Tensor:
        """The value, before it is rounded."""
        return real_input(args[0])

    def emulate(self, *args: Tensor) -> Tensor:
        q = quantize(self.real(*args), self.output)
        # The convolutions that follow read channels-last; one byte an element is the cheapest to move.
        return q.contiguous(memory_format=torch.channels_last) if q.dim() == 4 else q


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
        return quantize(total, self.output)


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
        return quantize(self.real(*args), self.output)


class QuantizedMaxPool2d(Quantized):
    """Max pooling of uint8 ``(N, C, H, W)``; scale and zero point pass through.

    Padding takes part as 0, the smallest uint8, as minus infinity does in float.
    """

    fields = "kernel_size:countsx2 stride:countsx2 padding:sizesx2 dilation:countsx2 ceil_mode:bool"

    def __init__(
        self,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode

    def emulate(self, *args: Tensor) -> Tensor:
        require_images(args[0])
        # torch's own uint8 max_pool2d refuses planes of more than 255 elements.
        x = args[0].float()
        y = F.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return y.to(torch.uint8)


class QuantizedAvgPool2d(Quantized):
    """Average pooling of uint8 ``(N, C, H, W)``, uint8 out with a scale of its own.

    ``output_size`` set: adaptive pooling to that size. Otherwise a window, as in ``nn.AvgPool2d``.
    Averages span a narrower range than what they average, hence their own scale. Padding counts
    as real zeros.
    """

    fields = (
        "input:q output:q output_size:targetsx2? kernel_size:countsx2? stride:countsx2? padding:sizesx2 "
        "ceil_mode:bool count_include_pad:bool keepdim:bool"
    )

    def __init__(
        self,
        input: QParams,
        output: QParams,
        output_size: tuple[int | None, int | None] | None = None,
        kernel_size: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        padding: tuple[int, int] = (0, 0),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        keepdim: bool = True,
    ) -> None:
        super().__init__()
        if (output_size is None) == (kernel_size is None):
            raise ValueError("give output_size or kernel_size")
        self.input, self.output = input, output
        self.output_size, self.kernel_size, self.stride = output_size, kernel_size, stride
        self.padding, self.ceil_mode = padding, ceil_mode
        self.count_include_pad, self.keepdim = count_include_pad, keepdim

    def real(self, *args: Tensor) -> Tensor:
        """The averages of real values, before they are rounded."""
        if self.output_size is not None:
            y = F.adaptive_avg_pool2d(args[0], self.output_size)
        else:
            assert self.kernel_size is not None
            y = F.avg_pool2d(
                args[0], self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
            )
        return y if self.keepdim else y.flatten(1)

    def emulate(self, *args: Tensor) -> Tensor:
        require_images(args[0])
        return quantize(self.real(dequantize(args[0], self.input)), self.output)
