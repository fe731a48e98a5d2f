"""Arithmetic of int8 networks: scales, zero points, rounding, and the activations that follow sums.

A uint8 activation ``q`` stands for the real value ``scale * (q - zero_point)`` (per tensor); an int8
weight stands for ``scale[o] * w`` (symmetric, per output channel o). This is the scheme of Jacob et
al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(CVPR 2018), section 2.1, with the bias kept in float32.

Integers have 8 bits or fewer. Those of fewer are multiplied as bytes, too: an activation of b bits is a uint8
from 0 to 2^b - 1, a weight of b bits an int8 from -2^(b-1) to 2^(b-1) - 1, but of 8 bits from -127.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import UsageError, a_or_an

BITS = 8
"""Bits of integers where nothing else is said."""
LEAST_BITS = 2


@dataclass(frozen=True)
class Activation:
    """An activation that int8 layers apply to their sums; called with a tensor, it computes it.

    Attributes:
        function: of real values.
        layer: of a float network that computes the same.
        idle: it changes nothing.
        rectifies: it is the larger of a value and 0.
    """

    function: Callable[[Tensor], Tensor]
    layer: type[nn.Module] | None = None
    idle: bool = False
    rectifies: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda x: x, idle=True),
    "relu": Activation(F.relu, nn.ReLU, rectifies=True),
    "relu6": Activation(F.relu6, nn.ReLU6),
    "hardswish": Activation(F.hardswish, nn.Hardswish),
    "silu": Activation(F.silu, nn.SiLU),
    "gelu": Activation(F.gelu, nn.GELU),
}
"""Name of an activation, which is that of torch's operation, too, to its row."""

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_SCALE_OF_ZEROS = 1e-12
"""Scale of an activation that is always zero, for which any would do."""


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of a uint8 tensor: real = scale * (q - zero_point), with q from 0 to ``top``.

    Attributes:
        scale: a positive float32.
        zero_point: 0 to ``top``.
        bits: of the integers, 2 to 8.
    """

    scale: float
    zero_point: int
    bits: int = BITS

    def __post_init__(self) -> None:
        require_bits(self.bits)
        if not (isinstance(self.scale, float) and SMALLEST_SCALE <= self.scale <= LARGEST_SCALE):
            raise ValueError(f"scale must be a positive float32, not {self.scale!r}")
        if type(self.zero_point) is not int or not 0 <= self.zero_point <= self.top:
            raise ValueError(f"zero_point must be in 0..{self.top}, not {self.zero_point!r}")

    @property
    def top(self) -> int:
        """The largest integer."""
        return levels_of(self.bits) - 1

    @property
    def numbers(self) -> list[float | int]:
        """The fields as a list, as files have them: bits are left out where they are 8."""
        return [self.scale, self.zero_point, *([] if self.bits == BITS else [self.bits])]


def require_bits(bits: int) -> None:
    """Raise ValueError unless integers can have so many bits."""
    if type(bits) is not int or not LEAST_BITS <= bits <= BITS:
        raise ValueError(f"bits must be {LEAST_BITS} to {BITS}, not {bits!r}")


def levels_of(bits: int) -> int:
    """Number of values that an activation of so many bits can have."""
    return 1 << bits


def weight_limits(bits: int) -> tuple[int, int]:
    """The smallest and the largest integer of a weight of so many bits; of 8 bits both are as large."""
    half = 1 << bits - 1
    return (1 if bits == BITS else 0) - half, half - 1


def width_label(scheme: str, weight_bits: int, activation_bits: int | None) -> str:
    """The widths of a layer and its arithmetic, in reports; of 8 bits the arithmetic alone."""
    if weight_bits == BITS and activation_bits in (None, BITS):
        return scheme
    activations = "" if activation_bits is None else f"A{activation_bits}"
    return f"W{weight_bits}{activations} in {scheme}"


def quantize(x: Tensor, q: QParams, *, reuse: bool = False) -> Tensor:
    """Float tensor to uint8: ``clamp(round_half_even(x / scale) + zero_point)``, from 0 to ``q.top``.

    The division is a multiplication by the reciprocal, as in every int8 kernel used here.

    Args:
        x: the tensor.
        q: scale and zero point.
        reuse: nobody reads ``x`` afterwards, so its memory may be written to.
    """
    scaled = x.mul_(1.0 / q.scale) if reuse else x.mul(1.0 / q.scale)
    return scaled.round_().add_(q.zero_point).clamp_(0, q.top).to(torch.uint8)


def require_uint8(x: Tensor) -> None:
    """Refuse, where a graph out of a file is tried, what the kernels would not take."""
    if x.is_meta and x.dtype is not torch.uint8:
        raise TypeError(f"a quantized layer reads uint8, not {str(x.dtype).removeprefix('torch.')}")


def form_of_maps(channels: int | str, rank: int) -> str:
    """The shape of maps of so many channels, with ``rank`` dimensions of space, such as ``(N, 3, H, W)``."""
    return f"(N, {channels}, {', '.join('L' if rank == 1 else 'DHW'[-rank:])})"


def require_maps(x: Tensor, rank: int) -> None:
    """Refuse, where a graph out of a file is tried, what is no uint8 ``(N, C, ...)`` of this rank."""
    require_uint8(x)
    if x.is_meta and x.dim() != rank + 2:
        wanted = form_of_maps("C", rank)
        raise TypeError(f"a quantized layer reads {wanted}, not {x.dim()} dimensions")


def dequantize(x: Tensor, q: QParams) -> Tensor:
    """uint8 tensor to float32: ``scale * (x - zero_point)``."""
    require_uint8(x)
    return x.to(torch.float32).sub_(q.zero_point).mul_(q.scale)


class NotFiniteError(ValueError):
    """An activation holds NaN or infinity, which no uint8 stands for."""


def dynamic_qparams(x: Tensor, bits: int = BITS) -> QParams:
    """QParams of so many bits that cover the values of ``x`` and zero.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    known = x.numel() and not x.is_meta  # on the meta device only shapes are asked for
    low, high = (v.item() for v in torch.aminmax(x)) if known else (0.0, 0.0)
    if not (isfinite(low) and isfinite(high)):
        raise NotFiniteError
    return qparams_from_range(low, high, bits)


def qparams_from_range(low: float, high: float, bits: int = BITS) -> QParams:
    """The QParams of so many bits whose range covers ``low..high`` and represents zero exactly."""
    low, high, top = min(low, 0.0), max(high, 0.0), levels_of(bits) - 1
    span = high - low
    scale = max(span / top, SMALLEST_SCALE) if span else _SCALE_OF_ZEROS
    return QParams(scale, min(max(round(-low / scale), 0), top), bits)


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
        UsageError: it is no tensor, or holds something else, pixels of 0 to 255 say, whose scale nobody has
            said.
    """
    if not isinstance(x, Tensor):
        hint = "give a batch (N, *program.input.shape)"
        raise UsageError(
            f"an int8 network takes a tensor, not {a_or_an(type(x).__name__)}", where="the input", hint=hint
        )
    if not x.is_floating_point():
        name = str(x.dtype).removeprefix("torch.")
        raise UsageError(
            f"an int8 network takes preprocessed floating-point input, not {name}",
            where="the input",
            hint="scale and normalise it first, as program.input.preprocess says",
        )
    return x.float()
