"""Sensitivity of each layer to quantization: what the outputs lose with that layer alone rounded, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.measure.fidelity import Fidelity, FidelityTally
from modelopt_cli.measure.output_comparison import LIMIT_DB
from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.quantize.sensitivity.branches import Branches, Change
from modelopt_cli.methods.quantize.sensitivity.layer_times import LayerTime, layer_times
from modelopt_cli.methods.quantize.sensitivity.rounded_layer import calls_of, rounded_calls
from modelopt_cli.methods.quantize.sensitivity.rounding_causes import makers_of, with_cause
from modelopt_cli.methods.quantize.sensitivity.rounding_reasons import Reason, Watched
from modelopt_cli.methods.quantize.static import Calibrated, calibrated
from modelopt_cli.methods.quantize.widths import BYTE, INT8, Widths
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, call, tensors_of
from modelopt_cli.program.parted import joined, reaching
from modelopt_cli.settings import option

SAMPLES = 64
"""Largest number of samples: each layer computes the rest of the network for all of them."""
FLOAT = "float32"
INT8_NAME = "int8"
BITS = (6, 5, 4, 3)
"""Bits of weights that are tried between 8 and the least."""


@dataclass(frozen=True)
class Loss:
    """Loss of the outputs with one layer alone in a precision, and what the layer takes.

    Attributes:
        precision: name of the precision.
        snr_db: signal-to-noise of the outputs in dB, of the output that has the least; 200 stands for equal.
        divergence: of logits, KL(float || rounded) of their probabilities in nats; None of other outputs.
        bytes: of the layer's tensors.
        milliseconds: of the layer for one sample, where it stands in the network; None where not measured.
        mixed: the same in a network of several precisions, whose float layers are not packed.
    """

    precision: str
    snr_db: float
    divergence: float | None
    bytes: int
    milliseconds: float | None
    mixed: float | None = None


@dataclass(frozen=True)
class LayerSensitivity:
    """Sensitivity of one layer.

    Attributes:
        name: of the layer.
        kind: its class.
        losses: by precision, of which the first is float32.
        reason: why the first other precision loses what it does; None where nothing is known.
        makers: layers that its input comes from.
    """

    name: str
    kind: str
    losses: tuple[Loss, ...]
    reason: Reason | None
    makers: tuple[str, ...] = ()


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
        return tuple(layer for layer in self.layers if layer.losses[1].snr_db < self.least_db)

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
    return measure(ready, program, context, config.row.least_snr_db, widths_down_to(config.weight_bits))


def widths_down_to(least: int) -> tuple[Widths, ...]:
    """Precisions that are tried, by falling bits of the weight from 8; activations have 8."""
    return tuple(Widths(bits) for bits in sorted({BYTE, least, *BITS}, reverse=True) if bits >= least)


def measure(
    ready: Calibrated,
    original: Program,
    context: Context,
    least_db: float,
    choices: Sequence[Widths] = (INT8,),
    *,
    timed: bool = True,
) -> QuantizeSensitivity:
    """Sensitivities of the layers that were selected.

    Args:
        ready: the float network with its scales.
        original: the network before batch norms were folded.
        context: data, seed, batch size, progress.
        least_db: see ``QuantizeSensitivity``.
        choices: precisions to try; the reasons are those of the first.
        timed: measure the time of each layer, too.
    """
    calls = calls_of(ready)
    watched: dict[str, Watched] = {}
    changes: list[Change] = []
    for name, nodes in calls.items():
        for widths in choices:
            computes: dict[fx.Node, Any] = dict(rounded_calls(ready, name, nodes, widths))
            if name not in watched:
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


def _in_float(module: nn.Module, of_int8: Fidelity | None, time: LayerTime | None) -> Loss:
    nats = 0.0 if of_int8 is not None and of_int8.kl else None
    times = (None, None) if time is None else (time.float32, time.mixed)
    return Loss(FLOAT, LIMIT_DB, nats, float_bytes(module), *times)


def _loss(module: nn.Module, widths: Widths, fidelity: Fidelity | None, time: LayerTime | None) -> Loss:
    """The loss in a precision; integers of fewer bits are multiplied as bytes, and take as long."""
    nats = max(fidelity.kl.values(), default=None) if fidelity is not None else None
    snr_db = fidelity.least_snr_db if fidelity is not None else math.nan
    milliseconds = None if time is None else time.int8
    return Loss(
        name_of(widths), snr_db, nats, integer_bytes(module, widths.weight), milliseconds, milliseconds
    )


def name_of(widths: Widths) -> str:
    """Name of a precision: ``int8``, or ``W4A8`` as the literature writes it."""
    return INT8_NAME if widths == INT8 else str(widths)


def float_bytes(module: nn.Module) -> int:
    """Bytes of a float layer's tensors."""
    return sum(tensor.nbytes for tensor in module.parameters())


def integer_bytes(module: nn.Module, bits: int) -> int:
    """Bytes of the tensors of a layer's integer form: integers, a scale for each output, biases in float."""
    integers = [tensor for tensor in module.parameters() if tensor.dim() > 1]
    scales = sum(4 * getattr(module, "out_channels", len(tensor)) for tensor in integers)
    rest = sum(tensor.nbytes for tensor in module.parameters() if tensor.dim() <= 1)
    return sum(-(-tensor.numel() * bits // 8) for tensor in integers) + scales + rest
