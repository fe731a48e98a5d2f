"""Every compression method: one row each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from modelopt_cli.artifact import TensorStream
from modelopt_cli.measure.layer_status import Coverage, recorded
from modelopt_cli.methods.context import Context, MethodResult, Reached, StreamResult, Tensors, TensorsResult
from modelopt_cli.methods.distill.apply import apply as distill
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.apply import apply as prune
from modelopt_cli.methods.prune.apply import sensitivity as prune_sensitivity
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.state_pruner import apply_to_state as prune_state
from modelopt_cli.methods.prune.state_pruner import refuse_without_graph as prune_needs
from modelopt_cli.methods.prune.structures import ACCELERATED
from modelopt_cli.methods.prune.summary import summary as pruned_layers
from modelopt_cli.methods.prune.summary import thin_notes
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.schemes import NetworkForm, uncalibrated, usable
from modelopt_cli.methods.quantize.sensitivity.rounding_sensitivity import sensitivity as quantize_sensitivity
from modelopt_cli.methods.quantize.state_dict import apply_to_state as quantize_state
from modelopt_cli.methods.quantize.state_dict import refuse_without_graph as quantize_needs
from modelopt_cli.methods.share.apply import apply as share
from modelopt_cli.methods.share.apply import apply_to_state as share_state
from modelopt_cli.methods.share.apply import refuse_without_graph as share_needs
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.shared_layers import summary as shared_layers
from modelopt_cli.program import Program
from modelopt_cli.program.history import history_entry
from modelopt_cli.settings import option

Weights = Program | Tensors | TensorsResult


@dataclass(frozen=True)
class Signal:
    """Signal-to-noise that rounding leaves of a network's outputs.

    Attributes:
        bits: of the weights.
        least_db: in dB; where there is less, more is lost than rounding takes.
    """

    bits: int
    least_db: float


def _never(config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Method:
    """One way to compress a model, and what a command does its own way because of it.

    Attributes:
        config: frozen dataclass that says what to do; its fields are the command's options, and its ``code``
            is how files are written by default, its ``method`` the name of the command.
        apply: does it: ``apply(program, config, context)`` with an instance of ``config``. The
            Program given is left as it is; the new one's history is one entry longer, which names the method.
        apply_to_tensors: the same for tensors without a graph; None where the method needs one.
        refuse_without_graph: raises GraphNeeded where the settings need one; told if there is a module.
        stage: name of the work where progress is shown.
        reads_data: True if it looks at samples where there are some.
        fits_data: True if the result is fitted to those samples.
        reads_labels: start of a message that ends in "the samples that the result is judged on", where
            labels decide; None where they do not.
        meets_drop: True if it measures the loss of accuracy on those samples.
        plan: the settings for a dry run, which does not train.
        layers: a row for each layer: ``layers(before, after, coverage, config)``.
        notes: lines on the result: ``notes(config, layers, target, measured)``, where ``measured`` is True if
            the result will be measured, which says some of it.
        remedy: a way to compress more, for the warning that little was compressed; empty where there is none.
        signal: signal-to-noise of the outputs that is usual; the history records it, and there is a warning
            where it is less. None does neither.
        without_samples: what needs no samples, for a hint; empty where nothing does.
        sensitivity: measures what it would cost each layer alone, from a Program, a config and a context;
            None where it cannot tell. ``report`` shows what it returns by its type.
    """

    config: type[Any]
    apply: Callable[[Program, Any, Any], MethodResult]
    apply_to_tensors: Callable[[Tensors, Any, Context], TensorsResult] | None = None
    refuse_without_graph: Callable[[Any, bool], None] = lambda config, has_network: None
    stage: str = ""
    reads_data: Callable[[Any], bool] = _never
    fits_data: Callable[[Any], bool] = _never
    reads_labels: Callable[[Any], str | None] = lambda config: None
    meets_drop: Callable[[Any], bool] = _never
    plan: Callable[[Any], Any] = lambda config: config
    layers: Callable[[Any, Any, Coverage, Any], tuple[Any, ...]] = lambda *given: ()
    notes: Callable[[Any, tuple[Any, ...], Reached | None, bool], tuple[str, ...]] = lambda *given: ()
    remedy: Callable[[Any], str] = lambda config: ""
    signal: Callable[[Any], Signal | None] = lambda config: None
    without_samples: Callable[[], str] = lambda: ""
    sensitivity: Callable[[Program, Any, Context], Any] | None = None


def _calibrates(config: QuantizeConfig) -> bool:
    return config.needs_data


def _signal(config: QuantizeConfig) -> Signal:
    bits = config.row.weight_bits if config.row.float_type is not None else config.widths.least
    return Signal(bits, config.row.least_db(bits))


def _quantize_reads_labels(config: QuantizeConfig) -> str | None:
    return f"{option('max_drop')} is measured on" if config.chooses_on_labels else None


def _remedy(config: QuantizeConfig) -> str:
    of_any = usable(NetworkForm.TENSORS)
    if config.scheme in of_any:
        return ""
    return f"{option('scheme')} {' or '.join(of_any)} serves layers of any kind"


def _quantize_tensors(tensors: Tensors, config: QuantizeConfig, context: Context) -> TensorsResult:
    layers = None if tensors.network is None else dict(tensors.network.named_modules())
    made = quantize_state(tensors.state, config, layers, tensors.encodings, context.progress)
    entry = _entry(config, context, made)
    if made.widths:
        entry["widths"] = dict(made.widths)
    return TensorsResult(made.stream, made.coverage, entry, notes=made.notes)


def _share_tensors(tensors: Tensors, config: ShareConfig, context: Context) -> TensorsResult:
    known = tensors.network is not None
    made = share_state(
        tensors.state, config, context.seed, tensors.encodings, context.progress, has_network=known
    )
    return TensorsResult(made.stream, made.coverage, _entry(config, context, made))


def _prune_tensors(tensors: Tensors, config: PruneConfig, context: Context) -> TensorsResult:
    made = prune_state(
        dict(tensors.state),
        tensors.encodings,
        config,
        context.seed,
        origin=context.origin,
        about=tensors.about,
        code=context.code,
    )
    return TensorsResult(made.state, made.coverage, made.entry, made.encodings, made.target)


def _entry(config: Any, context: Context, made: StreamResult) -> dict[str, Any]:
    return history_entry(
        config.method,
        config.as_dict(),
        seed=context.seed,
        origin=context.origin,
        skipped=made.skipped,
        **recorded(made.coverage),
    )


def _prune_reads_labels(config: PruneConfig) -> str | None:
    needed = config.criterion_row.needs_labels
    return f"criterion {config.chosen_criterion} reads the labels of" if needed else None


def _pruned_layers(
    before: Weights, after: Weights, coverage: Coverage, config: PruneConfig
) -> tuple[Any, ...]:
    return pruned_layers(_tensors(before), _tensors(after), coverage)


def _prune_notes(
    config: PruneConfig, layers: tuple[Any, ...], target: Reached | None, measured: bool
) -> tuple[str, ...]:
    notes = thin_notes(layers, target)
    if config.pattern is None or measured:
        return notes
    fast = f"; {config.structure} is multiplied faster on CUDA" if config.pattern == ACCELERATED else ""
    return (*notes, f"zeros make the file smaller, and nothing faster on a CPU{fast}")


def _shared_layers(
    before: Weights, after: Weights, coverage: Coverage, config: ShareConfig
) -> tuple[Any, ...]:
    """None where there is no graph: tensors are made one at a time."""
    if not isinstance(before, Program) or not isinstance(after, Program):
        return ()
    return shared_layers(weights_of(before), weights_of(after), coverage, comparable=not config.folds)


def _tensors(weights: Weights) -> dict[str, Any]:
    if isinstance(weights, Program):
        return dict(weights.state_dict())
    tensors = weights.state if isinstance(weights, Tensors) else weights.tensors
    assert not isinstance(tensors, TensorStream)
    return dict(tensors)


_ROWS = (
    Method(config=DistillConfig, apply=distill, stage="distilling"),
    Method(
        config=PruneConfig,
        apply=prune,
        apply_to_tensors=_prune_tensors,
        refuse_without_graph=prune_needs,
        stage="pruning",
        reads_data=lambda config: True,
        fits_data=lambda config: config.chosen_by_data,
        reads_labels=_prune_reads_labels,
        plan=lambda config: replace(config, schedule=PruneConfig.schedule, rounds=PruneConfig.rounds),
        layers=_pruned_layers,
        sensitivity=prune_sensitivity,
        notes=_prune_notes,
    ),
    Method(
        config=QuantizeConfig,
        apply=quantize,
        apply_to_tensors=_quantize_tensors,
        refuse_without_graph=quantize_needs,
        stage="quantizing",
        reads_data=_calibrates,
        fits_data=_calibrates,
        reads_labels=_quantize_reads_labels,
        meets_drop=lambda config: config.chooses_on_labels,
        remedy=_remedy,
        signal=_signal,
        without_samples=lambda: f"use {option('scheme')} {' or '.join(uncalibrated())}",
        sensitivity=quantize_sensitivity,
    ),
    Method(
        config=ShareConfig,
        apply=share,
        apply_to_tensors=_share_tensors,
        refuse_without_graph=share_needs,
        stage="sharing",
        reads_data=lambda config: True,
        fits_data=lambda config: config.looks_at_data,
        reads_labels=lambda config: (
            f"{option('max_drop')} is measured on" if config.chooses_on_data else None
        ),
        meets_drop=lambda config: config.chooses_on_data,
        layers=_shared_layers,
    ),
)
METHODS: dict[str, Method] = {row.config.method: row for row in _ROWS}
"""By the name of the command, of the API function and of the page in ``docs/``."""
