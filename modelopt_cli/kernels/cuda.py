"""int8 on CUDA through ``torch._int_mm``: linears, 1x1 convolutions, other convolutions unfolded.

``_int_mm`` multiplies int8 by int8 into int32, wants more than 16 rows and both other sizes to be
multiples of 8, and knows no zero points. So activations are shifted from 0..255 to -128..127, rows
and columns are padded with zeros, and the zero point is taken off with the weights' column sums.
Weights that are 2:4 sparse go through ``sparse24`` instead where the device has kernels for that.
Depthwise and grouped convolutions run in float32 on the integers themselves, which is exact: their
sums stay below 2**24.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.kernels import sparse24
from modelopt_cli.kernels.im2col import im2col
from modelopt_cli.program.quantization import ACTIVATIONS, QParams, dequantize, dynamic_qparams, quantize
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear

SHIFT = 128
MIN_ROWS = 17
MULTIPLE = 8
EXACT_FLOAT32 = 1 << 24


def _round_up(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE


class IntMatmul:
    """``(rows - zero_point) @ weight.T`` in int32, for a fixed int8 weight.

    Args:
        weight: int8 ``(out, in)``.
        layer: whose weight it is; where it is 2:4 sparse, the kernels for that are used if they can be.
    """

    def __init__(self, weight: Tensor, layer: Weighted) -> None:
        self.out, self.inner = weight.shape
        self.sums = weight.sum(1, dtype=torch.int32)
        self.sparse = sparse24.int_product(layer, weight)
        padding = (0, _round_up(self.inner) - self.inner, 0, _round_up(self.out) - self.out)
        # _int_mm wants its right operand column-major, which the transpose of a contiguous one is.
        self.columns = F.pad(weight, padding).contiguous().t()

    def __call__(self, rows: Tensor, zero_point: int) -> Tensor:
        """Multiply.

        Args:
            rows: uint8 ``(M, in)``.
            zero_point: of the rows.

        Returns:
            int32 ``(M, out)``.
        """
        signed = (rows ^ SHIFT).view(torch.int8)
        acc = self._dense(signed) if self.sparse is None else self.sparse(signed)
        return acc + self.sums * (SHIFT - zero_point)

    def _dense(self, signed: Tensor) -> Tensor:
        m = signed.shape[0]
        padded = F.pad(signed, (0, self.columns.shape[0] - self.inner, 0, max(MIN_ROWS - m, 0)))
        return torch._int_mm(padded.contiguous(), self.columns)[:m, : self.out]


def _finish(acc: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    real = acc.to(torch.float32) * scale
    if bias is not None:
        real += bias
    return ACTIVATIONS[activation](real)


def _store(real: Tensor, output: QParams | None) -> Tensor:
    return real if output is None else quantize(real, output)


def linear(layer: QuantizedLinear) -> Callable[..., Tensor]:
    """The kernel of a linear layer."""
    matmul, scale = IntMatmul(layer.weight, layer), layer.scale * layer.input.scale

    def run(x: Tensor) -> Tensor:
        acc = matmul(x.reshape(-1, layer.in_features), layer.input.zero_point)
        y = _store(_finish(acc, scale, layer.bias, layer.activation), layer.output)
        return y.view(*x.shape[:-1], layer.out_features)

    return run


def dynamic_linear(layer: DynamicLinear) -> Callable[..., Tensor]:
    """The kernel of a linear layer that quantizes its input at every call."""
    matmul = IntMatmul(layer.weight, layer)

    def run(x: Tensor) -> Tensor:
        q = dynamic_qparams(x, layer.input_bits)
        acc = matmul(quantize(x.reshape(-1, layer.in_features), q), q.zero_point)
        y = _finish(acc, layer.scale * q.scale, layer.bias, "none")
        return y.view(*x.shape[:-1], layer.out_features)

    return run


def conv2d(layer: QuantizedConv2d) -> Callable[..., Tensor]:
    """The kernel of a convolution."""
    accumulate = _grouped(layer) if layer.groups > 1 else _unfolded(layer)
    scale = layer.scale * layer.input.scale

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        real = accumulate(x).to(torch.float32) * scale
        if layer.bias is not None:
            real += layer.bias
        real = real.permute(0, 3, 1, 2)
        if layer.residual is not None and residual is not None:
            real += dequantize(residual, layer.residual)
        return _store(ACTIVATIONS[layer.activation](real), layer.output)

    return run


def _unfolded(layer: QuantizedConv2d) -> Callable[[Tensor], Tensor]:
    """int32 accumulators ``(N, OH, OW, O)`` by one matrix product over unfolded patches."""
    zero_point = layer.input.zero_point
    matmul = IntMatmul(layer.weight.permute(0, 2, 3, 1).reshape(layer.out_channels, -1), layer)

    def accumulate(x: Tensor) -> Tensor:
        rows, (n, oh, ow) = im2col(
            x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, zero_point
        )
        return matmul(rows, zero_point).view(n, oh, ow, layer.out_channels)

    return accumulate


def _grouped(layer: QuantizedConv2d) -> Callable[[Tensor], Tensor]:
    """Accumulators ``(N, OH, OW, O)`` by a floating-point convolution of the integers."""
    kh, kw = layer.kernel_size
    terms = layer.in_channels // layer.groups * kh * kw
    exact = terms * 255 * 127 < EXACT_FLOAT32
    dtype = torch.float32 if exact else torch.float64
    weight = layer.weight.to(dtype)

    def accumulate(x: Tensor) -> Tensor:
        y = F.conv2d(
            x.to(dtype) - layer.input.zero_point,
            *(weight, None, layer.stride, layer.padding, layer.dilation, layer.groups),
        )
        return y.permute(0, 2, 3, 1)

    return accumulate
