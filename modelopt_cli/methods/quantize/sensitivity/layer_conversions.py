"""Conversions that become necessary between two layers where one has integers and the other floats."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, fx

from modelopt_cli.methods.quantize.precision.precision_allocation import Conversions
from modelopt_cli.methods.quantize.sensitivity.layer_times import clock
from modelopt_cli.methods.quantize.static import Calibrated
from modelopt_cli.program.calls import source
from modelopt_cli.program.quantization import QParams, dequantize, quantize

RUNS = 12
_Q = QParams(0.02, 128)


def conversions_between(ready: Calibrated) -> dict[tuple[int, int], Conversions]:
    """Milliseconds of conversions between layers that pass integers on in the network that has most of them.

    Where a float operation stands between two layers, they convert in any case, which is part of their own
    time. A value that several layers read counts for each, so that the model rather keeps layers together.

    Args:
        ready: the float network with its scales and the plan in which all layers have integers.

    Returns:
        By the numbers, in ``ready.selected``, of the layer that makes a value and of the one that reads it.
    """
    number = {name: i for i, name in enumerate(ready.selected)}
    between: dict[tuple[int, int], Conversions] = {}
    for unit in ready.plan.layers.values():
        reader, start = number[str(unit.head.target)], source(unit.head)
        if start not in ready.plan.int8:
            continue
        shape = _shape(ready, start)
        for value in _made_by_layers(start, ready):
            maker = number[str(ready.plan.layers[value].head.target)]
            if maker != reader:
                to_float, to_integer = _milliseconds(_shape(ready, value))[0], _milliseconds(shape)[1]
                between[maker, reader] = Conversions(to_float, to_integer)
    return between


def _made_by_layers(start: fx.Node, ready: Calibrated) -> set[fx.Node]:
    """The outputs of layers that a uint8 value is made from, by operations that take and give uint8."""
    found, seen, waiting = set[fx.Node](), set[fx.Node](), [start]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in ready.plan.layers:
            found.add(node)
            continue
        unit = ready.plan.adds.get(node)
        sources = (node if unit is None else unit.head).all_input_nodes
        waiting += [each for each in sources if each in ready.plan.int8]
    return found


def _shape(ready: Calibrated, node: fx.Node) -> tuple[int, ...]:
    """The shape of a value for one sample."""
    value = ready.plan.values[node]
    assert isinstance(value, Tensor)
    return (1, *value.shape[1:])


@cache
def _milliseconds(shape: tuple[int, ...]) -> tuple[float, float]:
    """Least times of turning a tensor of this shape back to float, and into integers."""
    real = torch.zeros(shape)
    if len(shape) == 4:
        real = real.contiguous(memory_format=torch.channels_last)
    integers = quantize(real, _Q)
    return _least(lambda: dequantize(integers, _Q)), _least(lambda: quantize(real, _Q))


def _least(call: Callable[[], Tensor]) -> float:
    times, now = [], clock()
    with torch.inference_mode():
        for _ in range(RUNS):
            start = now()
            call()
            times.append((now() - start) / 1e6)
    return min(times)
