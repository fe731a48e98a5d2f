"""Biases of an int8 network, corrected by what rounding does to the means of its layers' outputs."""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, fx

from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.calibration import calibrate
from modelopt_cli.methods.quantize.precision_plan import PrecisionPlan, Unit
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source
from modelopt_cli.program.parted import interpret
from modelopt_cli.program.quantization import ACTIVATIONS
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConvolution

SAMPLES = 64
"""Samples that are looked at, all at once: each layer is corrected before the next one sees its outputs."""


class ChannelMean:
    """Mean of each channel, float64 ``(C,)``.

    Args:
        dim: dimension of the channels.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.mean = dim, torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Take the means of a batch."""
        self.mean = _mean(x.detach(), self.dim)


def correct_by_data(
    integer: Program, program: Program, plan: PrecisionPlan, shared: Collection[str], context: Context
) -> None:
    """Give the sums of each int8 layer the means of the float layer's, channel by channel.

    The sums are those before the activation, with what is added to them. A layer's inputs come through the
    int8 layers before it, as they are once corrected.

    Args:
        integer: the int8 form of ``program``; its biases are changed.
        program: the float Program.
        plan: made one of the other.
        shared: parameters whose equal values stay equal: such biases are left alone.
        context: calibration data.
    """
    units = {name: unit for name, unit in _units(plan).items() if f"{name}.bias" not in shared}
    called = {name: integer.get_submodule(name) for name in units}
    layers = {name: layer for name, layer in called.items() if isinstance(layer, Weighted)}
    layers = {name: layer for name, layer in layers.items() if layer.bias is not None}
    if not layers:
        return
    assert context.data is not None
    sample = context.data.sample(SAMPLES, context.seed)
    batch = next(iter(input_batches(sample, replace(context, batch_size=SAMPLES))))
    means = {name: ChannelMean(_channels(layer)) for name, layer in layers.items()}
    calibrate(program, {_sums(units[name]): [mean] for name, mean in means.items()}, [batch])
    for name, layer in layers.items():
        layer._finish = _correcting(layer, means[name])  # type: ignore[assignment, method-assign]
    try:
        with torch.no_grad():  # writes in inference mode would leave no trace
            interpret(fx.Interpreter(integer), integer, batch)
    finally:
        for layer in layers.values():
            del layer._finish


def _units(plan: PrecisionPlan) -> dict[str, Unit]:
    """The units of layers that are called once, by name."""
    calls = [str(unit.head.target) for unit in plan.layers.values()]
    return {name: unit for unit in plan.layers.values() if calls.count(name := str(unit.head.target)) == 1}


def _sums(unit: Unit) -> fx.Node:
    """The value that a unit's activation is applied to."""
    return unit.output if ACTIVATIONS[unit.activation].idle else source(unit.output)


def _channels(layer: object) -> int:
    return 1 if isinstance(layer, QuantizedConvolution) else -1


def _mean(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).flatten(1).mean(1, dtype=torch.float64)


def _correcting(layer: Weighted, wanted: ChannelMean) -> Callable[[Tensor], Tensor]:
    finish = layer._finish

    def corrected(sums: Tensor) -> Tensor:
        assert layer.bias is not None
        missing = (wanted.mean - _mean(sums, wanted.dim)).float()
        layer.bias += missing
        shape = [1] * sums.dim()
        shape[wanted.dim] = -1
        return finish(sums + missing.view(shape))

    return corrected
