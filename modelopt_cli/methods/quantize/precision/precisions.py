"""Ways to give each layer its precision, one row each. Imports no torch: the command line reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelopt_cli.lazy_names import deferred

if TYPE_CHECKING:
    from modelopt_cli.methods.context import Context, MethodResult
    from modelopt_cli.program import Program


@dataclass(frozen=True)
class Precisions:
    """A way to give each layer its precision.

    Attributes:
        help: one line.
        choose: quantizes a Program with the precisions that it chooses; None where the scheme says them.
    """

    help: str
    choose: "Callable[[Program, Any, Context], MethodResult] | None" = None


PRECISIONS = {
    "uniform": Precisions("that of the scheme for every layer"),
    "auto": Precisions(
        "float32, bfloat16 or integers for each layer, by what it loses, takes and saves, within a budget",
        deferred("modelopt_cli.methods.quantize.precision.choosing_precisions", "choose"),
    ),
}


@dataclass(frozen=True)
class Preference:
    """Quantity that an allocation of precisions makes as small as it can.

    Attributes:
        help: one line.
        cost: of a layer in a precision, from its ``layer_sensitivity.Loss``.
        of_time: the cost is a time, so that conversions between layers count.
        unit: of the cost, after the number.
        alone: may be asked for without a budget.
    """

    help: str
    cost: Callable[[Any], float]
    of_time: bool = False
    unit: str = ""
    alone: bool = False


PREFERENCES = {
    "size": Preference("the smallest file", lambda loss: float(loss.bytes), unit=" bytes"),
    "speed": Preference(
        "the shortest time for one sample: what is slower in int8, conversions included, stays in float",
        lambda loss: loss.milliseconds or 0.0,
        of_time=True,
        unit=" ms",
        alone=True,
    ),
}
