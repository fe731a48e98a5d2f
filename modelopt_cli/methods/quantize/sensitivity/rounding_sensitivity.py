"""Sensitivity of each layer to quantization: what the outputs lose with that layer alone rounded, and why."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.measure.fidelity import Fidelity, FidelityTally
from modelopt_cli.measure.output_comparison import LIMIT_DB
from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.equalizing.bias_corrections import BIAS_CORRECTIONS
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.quantize.sensitivity.branches import Branches, Change
from modelopt_cli.methods.quantize.sensitivity.corrected_calls import correct_calls
from modelopt_cli.methods.quantize.sensitivity.layer_precisions import (
    FLOAT32,
    HALVES,
    INT8,
    LayerPrecision,
    integers_down_to,
)
from modelopt_cli.methods.quantize.sensitivity.layer_sensitivity import (
    LayerSensitivity,
    Loss,
    QuantizeSensitivity,
)
from modelopt_cli.methods.quantize.sensitivity.layer_times import LayerTime, layer_times
from modelopt_cli.methods.quantize.sensitivity.rounded_layer import RoundedCall, calls_of, input_bits
from modelopt_cli.methods.quantize.sensitivity.rounding_causes import makers_of, with_cause
from modelopt_cli.methods.quantize.sensitivity.rounding_reasons import HARMLESS_DB, Watched
from modelopt_cli.methods.quantize.sensitivity.sensitivity_words import sentences
from modelopt_cli.methods.quantize.static import Calibrated, calibrated
from modelopt_cli.methods.quantize.widths import BYTE
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, call, tensors_of
from modelopt_cli.program.parted import joined, reaching
from modelopt_cli.settings import option

SAMPLES = 64
"""Largest number of samples: each layer computes the rest of the network for all of them."""


def sensitivity(
    program: Program, config: QuantizeConfig, context: Context, *, timed: bool = True
) -> QuantizeSensitivity:
    """Round one layer at a time and compare the outputs; no labels are needed.

    Args:
        program: any float Program; it is not changed.
        config: scheme, observer, the choice of layers, and the least bits of a weight.
        context: calibration data, on some of which the outputs are compared; seed, batch size, progress.
        timed: measure the time of each layer, too.

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
    judged = replace(config, weight_bits=BYTE)
    ready, least_db = calibrated(program, judged, context), config.row.least_db(judged.widths.least)
    tried, correct = precisions_of(config), BIAS_CORRECTIONS[config.bias_correction].correct_layer
    return measure(ready, program, context, least_db, tried, timed=timed, correct=correct)


def in_history(found: QuantizeSensitivity) -> dict[str, Any]:
    """Entry of the history: what each layer loses alone, in dB, and that in words."""
    db = {
        layer.name: {loss.precision: round(loss.snr_db, 1) for loss in layer.losses[1:]}
        for layer in found.layers
    }
    return {"sensitivity_db": db, "sensitivity_in_words": sentences(found)}


def precisions_of(config: QuantizeConfig) -> tuple[LayerPrecision, ...]:
    """Precisions that are tried for a layer besides float32: half precision where one of all is chosen."""
    return (*(HALVES if config.automatic else ()), *integers_down_to(config.weight_bits))


def measure(
    ready: Calibrated,
    original: Program,
    context: Context,
    least_db: float,
    choices: Sequence[LayerPrecision] = (INT8,),
    *,
    timed: bool = True,
    correct: Callable[..., None] | None = None,
) -> QuantizeSensitivity:
    """Sensitivities of the layers that were selected.

    Args:
        ready: the float network with its scales.
        original: the network before batch norms were folded.
        context: data, seed, batch size, progress.
        least_db: see ``QuantizeSensitivity``.
        choices: precisions to try, int8 among them, whose reasons are found; inputs have the bits that they
            were calibrated to.
        timed: measure the time of each layer, too.
        correct: corrects the bias of a rounded layer; None where biases stay.
    """
    calls = calls_of(ready)
    watched: dict[str, Watched] = {}
    changes: list[Change] = []
    rounded: dict[fx.Node, list[RoundedCall]] = {}
    eight = choices.index(INT8)
    tried: dict[str, list[LayerPrecision]] = {}
    for name, nodes in calls.items():
        bits = input_bits(ready, name, nodes)
        tried[name] = [precision.with_inputs(bits) for precision in choices]
        for number, precision in enumerate(tried[name]):
            computes = precision.calls(ready, name, nodes)
            if precision.integer and len(nodes) == 1:
                rounded.setdefault(nodes[0], []).append(computes[nodes[0]])
            if number == eight:
                first = nodes[0]
                watched[name] = Watched(ready.program.get_submodule(name), computes[first])
                computes[first] = watched[name]
            changes.append(Change(computes))
    if correct is not None:
        correct_calls(ready, rounded, correct, context)
    fidelities, samples = _compare(ready.program, changes, context)
    times = layer_times(ready) if timed else {}
    layers = []
    for number, name in enumerate(calls):
        module, time = ready.program.get_submodule(name), times.get(name)
        own = fidelities[number * len(choices) : (number + 1) * len(choices)]
        losses = [_in_float(module, own[0], time)]
        losses += [_loss(module, *pair, time) for pair in zip(tried[name], own, strict=True)]
        int8, makers = losses[1 + eight], makers_of(calls[name][0], ready)
        reason = watched[name].reason(makers)
        if reason is not None and reason.kind != "dead" and int8.snr_db > HARMLESS_DB:
            reason = None
        elif reason is not None:
            reason = with_cause(reason, makers, original, ready.program)
        layers.append(LayerSensitivity(name, type(module).__name__, tuple(losses), int8, reason, makers))
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
