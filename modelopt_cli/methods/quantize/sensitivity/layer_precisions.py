"""The precisions that a layer can have: what each takes, and how a layer computes in it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

from torch import fx, nn

from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.quantize.sensitivity.layer_times import LayerTime
from modelopt_cli.methods.quantize.sensitivity.rounded_layer import cast_calls, rounded_calls
from modelopt_cli.methods.quantize.static import Calibrated
from modelopt_cli.methods.quantize.widths import BYTE, Widths

_FLOAT_BITS = 32
BITS = (6, 5, 4, 3)
"""Bits of weights that are tried between 8 and the least."""


@dataclass(frozen=True)
class LayerPrecision:
    """A precision that a layer can have.

    Attributes:
        name: in tables and the history.
        weight_bits: of a weight, of which a layer's other tensors have 32.
        milliseconds: of a layer's times, the one in this precision.
        widths: of weight and input, where they are integers.
        float_type: the half-precision type that weights are stored in.
    """

    name: str
    weight_bits: int
    milliseconds: Callable[[LayerTime], float]
    widths: Widths | None = None
    float_type: str | None = None

    @property
    def integer(self) -> bool:
        """True if weights are multiplied as integers."""
        return self.widths is not None

    def with_inputs(self, bits: int) -> "LayerPrecision":
        """The same with inputs of so many bits, where they are integers."""
        return self if self.widths is None else of_integers(replace(self.widths, activation=bits))

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of a layer's tensors: weights, for integers a scale for each output, and biases in float."""
        weights = [tensor for tensor in module.parameters() if tensor.dim() > 1]
        rest = sum(tensor.nbytes for tensor in module.parameters() if tensor.dim() <= 1)
        if self.integer:
            rest += sum(4 * getattr(module, "out_channels", len(tensor)) for tensor in weights)
        return sum(-(-tensor.numel() * self.weight_bits // 8) for tensor in weights) + rest

    def calls(self, ready: Calibrated, name: str, nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
        """Computation of all calls of a layer in this precision, real values in and out."""
        if self.widths is not None:
            return dict(rounded_calls(ready, name, nodes, self.widths))
        assert self.float_type is not None
        return cast_calls(ready, name, nodes, self.float_type)


_in_int8 = attrgetter("int8")


def _in_half(time: LayerTime, float_type: str) -> float:
    return time.half[float_type]


FLOAT32 = LayerPrecision("float32", _FLOAT_BITS, attrgetter("float32"))
HALVES = tuple(
    LayerPrecision(
        row.name, row.weight_bits, partial(_in_half, float_type=row.float_type), float_type=row.float_type
    )
    for row in SCHEMES.values()
    if row.float_type and row.of_layers
)


def of_integers(widths: Widths) -> LayerPrecision:
    """The precision of integers; those of fewer than 8 bits are multiplied as bytes, and take as long."""
    name = "int8" if widths == Widths() else str(widths)
    return LayerPrecision(name, widths.weight, _in_int8, widths)


INT8 = of_integers(Widths())


def integers_down_to(least: int) -> tuple[LayerPrecision, ...]:
    """Precisions of integers by falling bits of the weight from 8; inputs have 8."""
    bits = sorted({BYTE, least, *BITS}, reverse=True)
    return tuple(of_integers(Widths(each)) for each in bits if each >= least)
