"""Sensitivity of each layer to quantization: what the outputs lose with that layer alone rounded, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from modelopt_cli.errors import UsageError
from modelopt_cli.measure.fidelity import Fidelity, FidelityTally
from modelopt_cli.measure.output_comparison import LIMIT_DB
from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.quantize.sensitivity.branches import Branches, Change
from modelopt_cli.methods.quantize.sensitivity.layer_precisions import (
    FLOAT32,
    HALVES,
    LayerPrecision,
    integers_down_to,
    of_integers,
)
from modelopt_cli.methods.quantize.sensitivity.layer_times import LayerTime, layer_times
from modelopt_cli.methods.quantize.sensitivity.rounded_layer import calls_of
from modelopt_cli.methods.quantize.sensitivity.rounding_causes import makers_of, with_cause
from modelopt_cli.methods.quantize.sensitivity.rounding_reasons import Reason, Watched
from modelopt_cli.methods.quantize.static import Calibrated, calibrated
from modelopt_cli.methods.quantize.widths import BYTE, INT8
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, call, tensors_of
from modelopt_cli.program.parted import joined, reaching
from modelopt_cli.settings import option

SAMPLES = 64
"""Largest number of samples: each layer computes the rest of the network for all of them."""
INT8_PRECISION = of_integers(INT8)


@dataclass(frozen=True)
class Loss:
    """Loss of the outputs with one layer alone in a precision, and what the layer takes.

    Attributes:
        precision: name of the precision.
        snr_db: signal-to-noise of the outputs in dB, of the output that has the least; 200 stands for equal.
        divergence: of logits, KL(float || rounded) of their probabilities in nats; None of other outputs.
        bytes: of the layer's tensors.
        milliseconds: of the layer for one sample, where it stands in the network; None where not measured.
    """

    precision: str
    snr_db: float
    divergence: float | None
    bytes: int
    milliseconds: float | None


@dataclass(frozen=True)
class LayerSensitivity:
    """Sensitivity of one layer.

    Attributes:
        name: of the layer.
        kind: its class.
        losses: by precision, of which the first is float32.
        reason: why int8 loses what it does; None where nothing is known.
        makers: layers that its input comes from.
    """

    name: str
    kind: str
    losses: tuple[Loss, ...]
    reason: Reason | None
    makers: tuple[str, ...] = ()

    @property
    def int8(self) -> Loss:
        """Loss in int8, which is always among the precisions."""
        return next(loss for loss in self.losses if loss.precision == INT8_PRECISION.name)


@dataclass(frozen=True)
class QuantizeSensitivity:
    """Sensitivities of the layers of a network.

    Attributes:
        layers: in the order of the graph.
        samples: that the outputs were compared on.
        least_db: signal-to-noise in dB below which a layer alone breaks the network.
        skipped: layers that no precision takes, with the reason.
    """

    layers: tuple[LayerSensitivity, ...]
    samples: int
    least_db: float
    skipped: Mapping[str, str]

    @property
    def breaking(self) -> tuple[LayerSensitivity, ...]:
        """Layers that alone take the outputs below ``least_db``, in the order of the graph."""
        return tuple(layer for layer in self.layers if layer.int8.snr_db < self.least_db)

    @property
    def dead(self) -> tuple[LayerSensitivity, ...]:
        """Layers at which the samples begin to make no difference: what is behind them alone is left out."""
        dead = {layer.name: layer for layer in self.layers if layer.reason and layer.reason.kind == "dead"}
        return tuple(
            layer for layer in dead.values() if not layer.makers or not dead.keys() >= {*layer.makers}
        )


def sensitivity(program: Program, config: QuantizeConfig, context: Context) -> QuantizeSensitivity:
    """Round one layer at a time and compare the outputs; no labels are needed.

    Args:
        program: any float Program; it is not changed.
        config: scheme, observer, the choice of layers, and the least bits of a weight.
        context: calibration data, on some of which the outputs are compared; seed, batch size, progress.

    Raises:
        UsageError: the scheme has no scales to measure with, there are no data, or a glob matches no layer.
        NothingCompressed: no layer can be quantized.
        DataError: the data are empty, or the network is not finite on them.
    """
    if not config.row.needs_calibration:
        static = " or ".join(name for name, row in SCHEMES.items() if row.needs_calibration)
        raise UsageError(
            f"{config.row.title} has no fixed scales, which a sensitivity is measured with",
            where=option("scheme"),
            hint=f"give {option('scheme')} {static}",
        )
    ready = calibrated(program, replace(config, weight_bits=BYTE), context)
    return measure(ready, program, context, config.row.least_snr_db, precisions_of(config))


def precisions_of(config: QuantizeConfig) -> tuple[LayerPrecision, ...]:
    """Precisions that are tried for a layer besides float32: half precision where one of all is chosen."""
    return (*(HALVES if config.automatic else ()), *integers_down_to(config.weight_bits))


def measure(
    ready: Calibrated,
    original: Program,
    context: Context,
    least_db: float,
    choices: Sequence[LayerPrecision] = (INT8_PRECISION,),
    *,
    timed: bool = True,
) -> QuantizeSensitivity:
    """Sensitivities of the layers that were selected.

    Args:
        ready: the float network with its scales.
        original: the network before batch norms were folded.
        context: data, seed, batch size, progress.
        least_db: see ``QuantizeSensitivity``.
        choices: precisions to try, int8 among them, whose reasons are found.
        timed: measure the time of each layer, too.
    """
    calls = calls_of(ready)
    watched: dict[str, Watched] = {}
    changes: list[Change] = []
    for name, nodes in calls.items():
        for precision in choices:
            computes = precision.calls(ready, name, nodes)
            if precision == INT8_PRECISION:
                first = nodes[0]
                watched[name] = Watched(ready.program.get_submodule(name), computes[first])
                computes[first] = watched[name]
            changes.append(Change(computes))
    fidelities, samples = _compare(ready.program, changes, context)
    times = layer_times(ready) if timed else {}
    layers = []
    for number, name in enumerate(calls):
        makers = makers_of(calls[name][0], ready)
        reason = watched[name].reason(makers)
        if reason is not None:
            reason = with_cause(reason, makers, original, ready.program)
        module, time = ready.program.get_submodule(name), times.get(name)
        own = fidelities[number * len(choices) : (number + 1) * len(choices)]
        losses = [_in_float(module, own[0], time)]
        losses += [_loss(module, *pair, time) for pair in zip(choices, own, strict=True)]
        layers.append(LayerSensitivity(name, type(module).__name__, tuple(losses), reason, makers))
    return QuantizeSensitivity(tuple(layers), samples, least_db, ready.skipped)


def _compare(
    program: Program, changes: Sequence[Change], context: Context
) -> tuple[list[Fidelity | None], int]:
    """Likeness of the outputs with each change to those without, and the number of samples."""
    assert context.data is not None
    some = context.data.sample(SAMPLES, context.seed)
    graph = joined(program)
    assert isinstance(graph, Program)
    if graph is not program:  # its graph is a copy
        copies = dict(zip(program.graph.nodes, graph.graph.nodes, strict=True))
        changes = [Change({copies[node]: own for node, own in each.computes.items()}) for each in changes]
    branches, tallies = Branches(graph, changes), [FidelityTally(context.task) for _ in changes]
    done, total = 0, None if some.size is None else some.size * len(changes)
    samples = 0
    for batch in input_batches(some, context):
        samples += batch_size(batch)
        for inputs in _reaching(program, graph, batch):
            with torch.inference_mode():
                expected = call(graph, inputs)
            for number, outputs in branches.outputs(tensors_of(inputs)):
                add = tallies[number].add if graph is program else tallies[number].add_parts
                add(expected, outputs, batch_size(inputs))
                done += batch_size(batch)
                if context.progress is not None:
                    context.progress(done, total)
    return [tally.result() for tally in tallies], samples


def _reaching(program: Program, graph: nn.Module, batch: Inputs) -> list[Inputs]:
    return [batch] if graph is program else reaching(program, batch)


def _loss(
    module: nn.Module, precision: LayerPrecision, fidelity: Fidelity | None, time: LayerTime | None
) -> Loss:
    nats = max(fidelity.kl.values(), default=None) if fidelity is not None else None
    snr_db = fidelity.least_snr_db if fidelity is not None else math.nan
    milliseconds = None if time is None else precision.milliseconds(time)
    return Loss(precision.name, snr_db, nats, precision.bytes_of(module), milliseconds)


def _in_float(module: nn.Module, of_other: Fidelity | None, time: LayerTime | None) -> Loss:
    nats = 0.0 if of_other is not None and of_other.kl else None
    milliseconds = None if time is None else FLOAT32.milliseconds(time)
    return Loss(FLOAT32.name, LIMIT_DB, nats, FLOAT32.bytes_of(module), milliseconds)
