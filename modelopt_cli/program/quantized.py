"""The quantized layers: ordinary modules that hold int8 weights and pass uint8 activations on.

A uint8 activation ``q`` stands for the real value ``scale * (q - zero_point)`` (per tensor); an int8
weight stands for ``scale[o] * w`` (symmetric, per output channel o). This is the scheme of Jacob et
al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(CVPR 2018), section 2.1, with the bias kept in float32.

A layer computes through ``self.kernel``, which ``modelopt_cli.kernels.prepare`` sets. Then its sums are
those of the integers, whatever the layer and the device. Without one it computes the same values in
float32, up to rounding, and slowly: a Program is right before it is fast.

int8 layers take float32 and uint8 and return those. They have no form in another precision.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.program.fields import checked_config, parse_fields

QMIN, QMAX = 0, 255

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
}
_ANY = "|".join(ACTIVATIONS)
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of a uint8 tensor: real = scale * (q - zero_point)."""

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, float) and _SMALLEST <= self.scale <= _LARGEST):
            raise ValueError(f"scale must be a positive float32, not {self.scale!r}")
        if type(self.zero_point) is not int or not QMIN <= self.zero_point <= QMAX:
            raise ValueError(f"zero_point must be in {QMIN}..{QMAX}, not {self.zero_point!r}")


def quantize(x: Tensor, q: QParams) -> Tensor:
    """Float tensor to uint8: ``clamp(round_half_even(x / scale) + zero_point)``.

    The division is a multiplication by the reciprocal, as in every int8 kernel used here.
    """
    return x.mul(1.0 / q.scale).round_().add_(q.zero_point).clamp_(QMIN, QMAX).to(torch.uint8)


def _require_uint8(x: Tensor) -> None:
    """Where a graph out of a file is tried, refuse what the kernels would not take."""
    if x.is_meta and x.dtype is not torch.uint8:
        raise TypeError(f"a quantized layer reads uint8, not {str(x.dtype).removeprefix('torch.')}")


def _require_images(x: Tensor) -> None:
    _require_uint8(x)
    if x.is_meta and x.dim() != 4:
        raise TypeError(f"a quantized layer reads (N, C, H, W), not {x.dim()} dimensions")


def dequantize(x: Tensor, q: QParams) -> Tensor:
    """uint8 tensor to float32: ``scale * (x - zero_point)``."""
    _require_uint8(x)
    return x.to(torch.float32).sub_(q.zero_point).mul_(q.scale)


def keep_float32(fn: Callable[[Tensor], Tensor]) -> None:
    """Refuse a function for ``Module._apply`` that would change the type of int8 layers' scales.

    Raises:
        UsageError: ``fn`` does not keep float32.
    """
    dtype = fn(torch.empty(0)).dtype
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"int8 layers compute in int8 and float32 and cannot become {name}",
            where="the network",
            hint="move it with .to(device) alone, or convert the float network before it is quantized",
        )


def real_input(x: Tensor) -> Tensor:
    """A floating-point tensor as float32.

    Raises:
        UsageError: it holds something else, pixels of 0 to 255 say, whose scale nobody has said.
    """
    if not x.is_floating_point():
        name = str(x.dtype).removeprefix("torch.")
        raise UsageError(
            f"an int8 network takes preprocessed floating-point input, not {name}",
            where="the input",
            hint="scale and normalise it first, as program.input.preprocess says",
        )
    return x.float()


class Quantized(nn.Module):
    """Base of all quantized layers: hyperparameters as data, and a kernel that can be swapped.

    Attributes:
        fields: the hyperparameters, in constructor order, as ``program.fields`` declares them.
        arity: how many tensors ``forward`` takes.
        kernel: what computes ``forward`` from the layer and its arguments; set by ``kernels.prepare``.
            Copies keep it.
    """

    fields: ClassVar[str] = ""
    arity = 1
    kernel: Callable[..., Tensor] | None

    def __init__(self) -> None:
        super().__init__()
        self.kernel = None

    def config(self) -> dict[str, Any]:
        """Hyperparameters as JSON-able values; ``from_config`` turns them back."""

        def plain(value: Any) -> Any:
            if isinstance(value, QParams):
                return [value.scale, value.zero_point]
            return list(value) if isinstance(value, tuple) else value

        return {field.name: plain(getattr(self, field.name)) for field in parse_fields(self.fields)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The layer with these hyperparameters and uninitialised weights.

        Raises:
            ValueError: a hyperparameter is missing, unknown, out of range or at odds with another.
        """
        fields = parse_fields(cls.fields)
        values = checked_config(fields, config)
        for field in fields:
            if field.type.startswith("q") and values[field.name] is not None:
                values[field.name] = QParams(*values[field.name])
        return cls(**values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        keep_float32(fn)
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.kernel = copy.copy(self.kernel)  # which builds again

    def extra_repr(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in parse_fields(self.fields))

    def forward(self, *args: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(self, *args)
        if len(args) != self.arity:
            raise TypeError(f"takes {self.arity} tensors, not {len(args)}")
        return self.emulate(*args)

    def emulate(self, *args: Tensor) -> Tensor:
        """The layer's values computed in float32 by torch's ordinary operators."""
        raise NotImplementedError


class Weighted(Quantized):
    """A layer with an int8 weight, a float32 scale per output channel and an optional float32 bias."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    activation: str
    output: QParams | None

    def _allocate(self, shape: tuple[int, ...], bias: bool) -> None:
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(shape[0]))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)

    def float_weight(self) -> Tensor:
        """The weight's real values, float32."""
        return self.weight.float() * self.scale.view(-1, *[1] * (self.weight.dim() - 1))

    def check(self) -> None:
        """Make sure that the values of the layer's tensors are what its arithmetic is made for.

        Raises:
            ValueError: a scale that is not positive and finite, or a bias that is not finite.
        """
        if not bool(((self.scale >= _SMALLEST) & (self.scale <= _LARGEST)).all()):
            raise ValueError("a scale is not a positive float32")
        if self.bias is not None and not bool(self.bias.isfinite().all()):
            raise ValueError("a bias is not finite")

    def _finish(self, y: Tensor) -> Tensor:
        y = ACTIVATIONS[self.activation](y)
        return y if self.output is None else quantize(y, self.output)


class QuantizedConv2d(Weighted):
    """2-D convolution, uint8 ``(N, C, H, W)`` in; uint8 or, where ``output`` is None, float32 out.

    ``residual`` adds a second uint8 input to the result before the activation.
    """

    fields = (
        "in_channels:count out_channels:count kernel_size:countsx2 stride:countsx2 padding:sizesx2 "
        f"dilation:countsx2 groups:count has_bias:bool input:q output:q? activation:{_ANY} residual:q?"
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        has_bias: bool,
        input: QParams,
        output: QParams | None,
        activation: str = "none",
        residual: QParams | None = None,
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
        self.activation = activation
        self._allocate((out_channels, in_channels // groups, *kernel_size), has_bias)

    def emulate(self, *args: Tensor) -> Tensor:
        _require_images(args[0])
        x = dequantize(args[0], self.input)
        y = F.conv2d(x, self.float_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.residual is not None:
            if args[1].shape != y.shape:
                raise ValueError(f"the residual has the shape {tuple(args[1].shape)}, not {tuple(y.shape)}")
            y = y + dequantize(args[1], self.residual)
        return self._finish(y)


class QuantizedLinear(Weighted):
    """Linear layer, uint8 ``(..., in_features)`` in; uint8 or, where ``output`` is None, float32 out."""

    fields = f"in_features:count out_features:count has_bias:bool input:q output:q? activation:{_ANY}"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        input: QParams,
        output: QParams | None,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.has_bias = has_bias
        self.input, self.output = input, output
        self.activation = activation
        self._allocate((out_features, in_features), has_bias)

    def emulate(self, *args: Tensor) -> Tensor:
        return self._finish(F.linear(dequantize(args[0], self.input), self.float_weight(), self.bias))


class NotFiniteError(ValueError):
    """An activation holds NaN or infinity, which no uint8 stands for."""


def dynamic_qparams(x: Tensor) -> QParams:
    """QParams that cover the values of ``x`` and zero.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    known = x.numel() and not x.is_meta  # on the meta device only shapes are asked for
    low, high = (v.item() for v in torch.aminmax(x)) if known else (0.0, 0.0)
    if not (isfinite(low) and isfinite(high)):
        raise NotFiniteError
    return qparams_from_range(low, high)


def qparams_from_range(low: float, high: float) -> QParams:
    """The uint8 QParams whose range covers ``low..high`` and represents zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (QMAX - QMIN), 1e-12)
    return QParams(scale, min(max(round(-low / scale), QMIN), QMAX))


class DynamicLinear(Weighted):
    """Linear layer, float in and out, whose input is quantized per tensor at every call."""

    fields = "in_features:count out_features:count has_bias:bool"

    def __init__(self, in_features: int, out_features: int, has_bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.has_bias = has_bias
        self.activation, self.output = "none", None
        self._allocate((out_features, in_features), has_bias)

    def forward(self, *args: Tensor) -> Tensor:
        x = real_input(args[0])
        try:
            return super().forward(x)
        except NotFiniteError:
            # As the float layer would: what went wrong before must stay visible behind.
            return F.linear(x, self.float_weight(), self.bias)

    def emulate(self, *args: Tensor) -> Tensor:
        q = dynamic_qparams(args[0])
        return F.linear(dequantize(quantize(args[0], q), q), self.float_weight(), self.bias)


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
        _require_images(args[0])
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
        _require_images(args[0])
        return quantize(self.real(dequantize(args[0], self.input)), self.output)
