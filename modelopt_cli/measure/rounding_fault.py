"""Functions, such as a logarithm, that give NaN or infinity of values that are rounded as they should be."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from modelopt_cli.errors import InputError
from modelopt_cli.measure.layer_comparison import ComparedValue, Comparison, is_real, readers, run_through
from modelopt_cli.measure.output_comparison import is_finite
from modelopt_cli.program.input_batch import Inputs
from modelopt_cli.settings import option

_ROUNDED = 0.1
"""Share of the largest value by which rounding may change one: far more than 8 bits of it."""


def refuse_fault_of_rounding(original: nn.Module, made: nn.Module, batches: Iterable[Inputs]) -> None:
    """Refuse a network of which a function needs more than rounded values; see :func:`fault_of_rounding`.

    Raises:
        InputError: names the layer to leave out.
    """
    for x in batches:
        if (found := fault_of_rounding(original, made, x)) is not None:
            layer, function = found
            problem = f"{function} gives NaN or infinity of what this layer computes of rounded values"
            hint = f"leave it out with {option('exclude', layer)}"
            raise InputError(problem, where=f"layer {layer}", hint=hint)


def fault_of_rounding(original: nn.Module, made: nn.Module, x: Inputs) -> tuple[str, str] | None:
    """The function at which a graph begins to give NaN or infinity, of values that are no more than rounded.

    Args:
        original: the graph as it was.
        made: the same with layers that are rounded or have other weights.
        x: a batch.

    Returns:
        The name of the layer before it, and the function. None where a layer itself gives such values, or
        one before it errs by more than ``_ROUNDED`` of the largest value so far: that is no rounding.
    """
    known: dict[str, ComparedValue] = {}
    run_through(original, x, lambda step: known.update({step.key: step}))
    comparison = Comparison(known, {}, readers(made))
    faults: list[ComparedValue] = []
    values: dict[str, Any] = {}
    largest = 0.0

    def see(step: ComparedValue) -> None:
        nonlocal largest
        expected = known[step.key].value if step.key in known else None
        if not faults and not is_finite(step.value):
            if expected is not None and is_finite(expected):
                near = all(_error(known, key, values.get(key)) <= _ROUNDED * largest for key in step.sources)
                faults.append(step if near else replace(step, of_layer=True))
            elif expected is None and all(is_finite(values.get(key)) for key in step.sources):
                faults.append(replace(step, of_layer=True))  # the original has no such function
        if is_real(expected) and expected.numel():
            largest = max(largest, float(expected.nan_to_num(0, 0, 0).abs().max()))
        values[step.key] = step.value
        comparison.see(step)

    run_through(made, x, see)
    fault = next(iter(faults), None)
    layer = None if fault is None or fault.of_layer else comparison.layers[fault.key]
    return None if fault is None or layer in (None, fault.layer) else (str(layer), fault.layer)


def _error(known: dict[str, ComparedValue], key: str, value: Any) -> float:
    """The largest difference of a value from the one that it should be, where both can be compared."""
    expected = known[key].value if key in known else None
    if not is_real(value) or not is_real(expected) or value.shape != expected.shape or not value.numel():
        return 0.0
    return float((value - expected).nan_to_num(0, math.inf, math.inf).abs().max())
