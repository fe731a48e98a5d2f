"""Static int8: ranges of activations are fixed by calibration data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.batches import calibration_batches
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize.calibration import Watching, calibrate
from modelopt_cli.methods.quantize.candidates import select_candidates, shared_weights
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import convert, values_to_observe
from modelopt_cli.methods.quantize.equalizing.bias_corrections import BIAS_CORRECTIONS
from modelopt_cli.methods.quantize.equalizing.channel_normals import Normal, recorded_normals
from modelopt_cli.methods.quantize.equalizing.equalize import equalized
from modelopt_cli.methods.quantize.equalizing.feature_scales import (
    LEAST_GAIN,
    LEAST_GAIN_OF_NORM,
    FeatureRange,
    feature_factors,
    norm_of,
    values_of_features,
    with_factors,
)
from modelopt_cli.methods.quantize.histogram import Histogram
from modelopt_cli.methods.quantize.layer_forms import obstacle
from modelopt_cli.methods.quantize.layer_widths import edge_layers, layer_widths, widths_note
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.precision.precisions import PRECISIONS
from modelopt_cli.methods.quantize.precision_plan import PrecisionPlan, make_plan
from modelopt_cli.methods.quantize.reader_errors import SAMPLES, least_errors
from modelopt_cli.methods.quantize.schemes import uncalibrated
from modelopt_cli.methods.quantize.weight_only import cast_layers, store_layer
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import Rounded, RoundingProblem
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS
from modelopt_cli.program import Program
from modelopt_cli.program.channels import layered
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.paddings import explicit_padding
from modelopt_cli.program.quantization import QParams
from modelopt_cli.settings import option


@dataclass(frozen=True)
class Calibrated:
    """A float Program ready to become int8, and the scales that calibration found.

    Attributes:
        program: in inference form, batch norms folded, paddings explicit, features scaled.
        selected: layers to quantize, in the order of the graph.
        skipped: the reason for each other one.
        plan: what becomes uint8.
        qparams: by representative.
        shared: parameters whose equal values stay equal.
        normals: outputs of layers, as their batch norms tell them.
        cast: the half-precision type of layers that are stored in one.
    """

    program: Program
    selected: tuple[str, ...]
    skipped: dict[str, str]
    plan: PrecisionPlan
    qparams: dict[fx.Node, QParams]
    shared: set[str]
    normals: Mapping[str, Normal]
    cast: Mapping[str, str] = field(default_factory=dict)


def quantize_static(program: Program, config: QuantizeConfig, context: Context) -> MethodResult:
    """Calibrate a float Program and turn it into its int8 form.

    Raises:
        As :func:`calibrated`.
    """
    choose = PRECISIONS[config.precision].choose
    if choose is not None:
        return choose(program, config, context)
    ready = calibrated(program, config, context)
    integer = integer_network(ready, config, context)
    notes = widths_note(ready.plan.widths, config)
    return MethodResult(integer, ready.skipped, notes=notes, floats=ready.program)


def integer_network(ready: Calibrated, config: QuantizeConfig, context: Context) -> Program:
    """The integer form of a calibrated network, its weights rounded as the config says."""
    rounded = _rounded(ready, config, context)
    integer = convert(ready.program, ready.plan, rounded.qparams, ready.shared, rounded.layers)
    cast_layers(integer, ready.cast)
    if (correct := BIAS_CORRECTIONS[config.bias_correction].correct) is not None:
        correct(integer, ready, context)
    for name, widths in ready.plan.widths.items():
        if widths.activation is None:
            store_layer(integer, name, widths.weight)
    return integer


def calibrated(program: Program, config: QuantizeConfig, context: Context) -> Calibrated:
    """Choose the layers to quantize, and the scale of each value that becomes uint8.

    Args:
        program: any float Program; it is not changed.
        config: layers, observer, samples.
        context: calibration data.

    Raises:
        UsageError: there are no data, or a glob matches no layer.
        NothingCompressed: not one layer could be quantized.
        DataError: the calibration data are empty or do not fit.
    """
    if context.data is None:
        without = f"use {option('scheme')} {' or '.join(uncalibrated())}, which need none"
        hint = f"give {option('data')}, or {without}"
        raise UsageError(f"{config.label} needs data to calibrate on", hint=hint)
    split = explicit_padding(layered(inference_form(program)))
    selected, skipped = select_candidates(split, config, obstacle)
    shared = shared_weights(program, split)
    # A batch norm would give every channel of a shared weight values of its own.
    unfolded = {layer for name in shared if (layer := name.rpartition(".")[0]) not in selected}
    folded = fold_batch_norms(split, unfolded)
    widths = layer_widths(selected, edge_layers(folded), config)
    ready = equalized(folded, widths, shared, config, context)
    plan = make_plan(ready, widths)
    layers = values_of_features(ready, plan, shared)
    features = {value: FeatureRange() for value in layers}
    qparams = observed_qparams(ready, plan, config, context, features)
    found = {
        value: feature_factors(
            seen,
            [ready.get_submodule(name) for name in layers[value]],
            plan.bits_of(value),
            min(widths[name].weight for name in layers[value]),
            LEAST_GAIN if norm_of(ready, value, layers[value]) is None else LEAST_GAIN_OF_NORM,
        )
        for value, seen in features.items()
    }
    if factors := {value: factor for value, factor in found.items() if factor is not None}:
        ready = with_factors(ready, layers, factors)
        plan = make_plan(ready, widths)
        qparams = observed_qparams(ready, plan, config, context)
    normals = recorded_normals(split, folded, ready)
    return Calibrated(ready, tuple(selected), skipped, plan, qparams, shared, normals)


def _rounded(ready: Calibrated, config: QuantizeConfig, context: Context) -> Rounded:
    """The integers of weights that do not take the nearest, and the scales that go with them."""
    find = ROUNDINGS[config.rounding].find
    if find is None:
        return Rounded({}, ready.qparams)
    assert context.data is not None
    problem = RoundingProblem(
        ready.program,
        ready.plan,
        ready.qparams,
        ready.shared,
        data=context.data.sample(config.calibration_samples, context.seed),
        context=replace(context, device="cpu"),  # where the network is
        steps=config.rounding_steps,
    )
    return find(problem)


def observed_qparams(
    ready: Program,
    plan: PrecisionPlan,
    config: QuantizeConfig,
    context: Context,
    features: Mapping[fx.Node, FeatureRange] | None = None,
) -> dict[fx.Node, QParams]:
    """Scale and zero point of each value that needs them; ``features`` see the calibration data, too."""
    assert context.data is not None
    observer = OBSERVERS[config.observer]
    watch = values_to_observe(plan, ready.graph)
    histograms = {
        value: Histogram(observer.choose, observer.needs_counts, plan.bits_of(value)) for value in watch
    }
    watched: dict[fx.Node, list[Watching]] = {
        node: [histograms[value]] for value, nodes in watch.items() for node in nodes
    }
    for value, seen in (features or {}).items():
        watched.setdefault(value, []).append(seen)
    sample = context.data.sample(config.calibration_samples, context.seed)
    batches = calibration_batches(ready, sample, context)
    calibrate(ready, watched, batches, context.progress, sample.size)
    if not observer.judges:
        return {value: histogram.qparams() for value, histogram in histograms.items()}
    candidates = {value: histogram.candidates() for value, histogram in histograms.items()}
    tried = context.data.sample(min(SAMPLES, config.calibration_samples), context.seed)
    return least_errors(ready, plan, candidates, calibration_batches(ready, tried, context))
