"""Biases of an int8 network, corrected by what rounding does to the means of its layers' outputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.calibration import calibrate
from modelopt_cli.methods.quantize.precision_plan import Unit
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import batch_size
from modelopt_cli.program.parted import interpret
from modelopt_cli.program.quantization import ACTIVATIONS, Activation
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConvolution

if TYPE_CHECKING:
    from modelopt_cli.methods.quantize.static import Calibrated

SAMPLES = 64
"""Samples that are looked at, all at once: each layer is corrected before the next one sees its outputs."""
PLACES = 65_536
"""Places in the maps of all samples that are looked at, at equal distances: neighbours tell the same."""
STEPS = 3
"""Steps of Newton's method, by which a bias is found; the means are nearly linear in it."""
LEAST_SLOPE = 0.05
"""Mean slope of an activation below which a channel is left alone: hardly anything passes."""


class SampleMeans:
    """Mean of each channel in each sample, float64 ``(N, C)``, of some ``PLACES`` values.

    Args:
        dim: dimension of the channels; that of the samples is 0.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.means = dim, torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Take the means of a batch."""
        self.means = self.rows(x.detach()).mean(2, dtype=torch.float64)

    def rows(self, x: Tensor) -> Tensor:
        """The values that are looked at, ``(N, C, places)``."""
        rows = x.movedim(self.dim, 1).reshape(len(x), x.shape[self.dim], -1)
        return rows[..., :: max(1, len(x) * rows.shape[2] // PLACES)]


def correct_by_data(integer: Program, ready: "Calibrated", context: Context) -> None:
    """Give the outputs of each int8 layer the means of the float layer's, channel by channel.

    The outputs are those behind the activation: what a ReLU takes away has no say. Of a mean difference only
    as much is corrected as is surely one, by its standard error over the samples (James and Stein,
    "Estimation with Quadratic Loss", 1961: a factor of 1 - error^2 / mean^2, at least 0). A layer's inputs
    come through the int8 layers before it, as they are once corrected.

    Args:
        integer: the int8 form of ``ready.program``; its biases are changed.
        ready: what it was made of.
        context: calibration data; of a single sample nothing is learned.
    """
    units = correctable(integer, ready)
    layers = {name: layer for name in units if isinstance(layer := integer.get_submodule(name), Weighted)}
    if not layers:
        return
    assert context.data is not None
    sample = context.data.sample(SAMPLES, context.seed)
    batch = next(iter(input_batches(sample, replace(context, batch_size=SAMPLES))))
    if batch_size(batch) == 1:
        return
    wanted = {name: SampleMeans(_channels(layer)) for name, layer in layers.items()}
    calibrate(ready.program, {units[name].output: [means] for name, means in wanted.items()}, [batch])
    for name, layer in layers.items():
        layer._finish = _correcting(layer, wanted[name], layer.activation)  # type: ignore[assignment, method-assign]
    try:
        with torch.no_grad():  # writes in inference mode would leave no trace
            interpret(fx.Interpreter(integer), integer, batch)
    finally:
        for layer in layers.values():
            del layer._finish


def correct_layer(layer: Weighted, sums: Tensor, rounded: Tensor, activation: str) -> None:
    """Correct the bias of an int8 layer that is alone in a float network, as :func:`correct_by_data` does.

    Args:
        layer: without an activation; its bias, if it has one, is changed.
        sums: of the float layer, on samples.
        rounded: the layer's input for them, uint8.
        activation: that follows, a key of ``ACTIVATIONS``.
    """
    if layer.bias is None or len(sums) == 1:
        return
    wanted = SampleMeans(_channels(layer))
    wanted.update(ACTIVATIONS[activation](sums))
    layer._finish = _correcting(layer, wanted, activation)  # type: ignore[assignment, method-assign]
    try:
        layer.emulate(rounded)
    finally:
        del layer._finish


def correctable(integer: Program, ready: "Calibrated") -> dict[str, Unit]:
    """The units of layers that have a bias of their own and are called once, by name.

    Shared biases are left alone: their equal values stay equal.
    """
    calls = [str(unit.head.target) for unit in ready.plan.layers.values()]
    units = {str(unit.head.target): unit for unit in ready.plan.layers.values()}
    return {
        name: unit
        for name, unit in units.items()
        if calls.count(name) == 1
        and f"{name}.bias" not in ready.shared
        and isinstance(layer := integer.get_submodule(name), Weighted)
        and layer.bias is not None
    }


def _channels(layer: object) -> int:
    return 1 if isinstance(layer, QuantizedConvolution) else -1


def _correcting(layer: Weighted, wanted: SampleMeans, name: str) -> Callable[[Tensor], Tensor]:
    finish, activation = layer._finish, ACTIVATIONS[name]

    def corrected(sums: Tensor) -> Tensor:
        assert layer.bias is not None
        # There may be one row for all samples, or one for each thing found, of which there are others now.
        if len(wanted.means) < 2 or len(wanted.means) != len(sums):
            return finish(sums)
        seen, missing = wanted.rows(sums), torch.zeros_like(layer.bias)
        for _ in range(STEPS):
            moved = seen + missing.view(-1, 1)
            slope = _slopes(activation, moved).mean((0, 2), dtype=torch.float64)
            left = _sure(wanted.means - activation(moved).mean(2, dtype=torch.float64))
            missing += torch.where(slope < LEAST_SLOPE, 0, left / slope)
        layer.bias += missing
        shape = [1] * sums.dim()
        shape[wanted.dim] = -1
        return finish(sums + missing.view(shape))

    return corrected


def _slopes(activation: Activation, x: Tensor) -> Tensor:
    """Derivative of an activation at each value."""
    if activation.idle:
        return torch.ones_like(x)
    with torch.inference_mode(False), torch.enable_grad():  # the caller may be in inference mode
        x = x.clone().detach().requires_grad_()
        return torch.autograd.grad(activation(x).sum(), x)[0]


def _sure(differences: Tensor) -> Tensor:
    """Means over samples ``(N, C)``, shrunk by their standard errors."""
    mean = differences.mean(0)
    error = differences.var(0) / len(differences)
    return mean * (1 - error / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)).clamp(min=0)
