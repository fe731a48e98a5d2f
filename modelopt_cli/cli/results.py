"""Showing what quantize and eval found, in the form that was asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.result_json import (
    distilled_json,
    pruned_json,
    quantized_json,
    shared_json,
    trained_json,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modelopt_cli.api import (
        DistillOutcome,
        Plan,
        PruneOutcome,
        QuantizeOutcome,
        ShareOutcome,
        TrainOutcome,
    )
    from modelopt_cli.artifact import Written
    from modelopt_cli.measure import Evaluation
    from modelopt_cli.methods.context import Reached
    from modelopt_cli.methods.prune.sensitivity import Sensitivity
    from modelopt_cli.training import Trained


def show_evaluation(console: Console, evaluation: "Evaluation", exports: Sequence[Path], force: bool) -> None:
    """Export and print the table; raises GateNotMet, naming every gate that failed."""
    from modelopt_cli import report

    _export(evaluation, exports, force)
    if console.json:
        console.result_json(report.to_json(evaluation))
    else:
        _show_table(console, evaluation)
    _require_gates(evaluation)


def show_quantized(
    console: Console, outcome: "QuantizeOutcome", exports: Sequence[Path], force: bool
) -> None:
    """Say what was done to each layer, export and print the table; raises GateNotMet."""
    from modelopt_cli import report

    _export(outcome.evaluation, exports, force, outcome.written)
    if console.json:
        console.result_json(quantized_json(outcome))
    else:
        _show_made(console, outcome, report.coverage_table(outcome.coverage), None)
    _require_gates(outcome.evaluation)


def _show_made(
    console: Console,
    outcome: "QuantizeOutcome | PruneOutcome | ShareOutcome",
    layers: "RenderableType",
    target: "Reached | None",
) -> None:
    """The table, what was covered and reached, and the file; without one, all of it is the result."""
    from modelopt_cli import report

    lines = [report.target_line(target)] if target is not None else []
    lines += [*report.coverage_lines(outcome.coverage), *outcome.notes]
    if outcome.written is None:
        console.result(layers)
        for line in lines:
            console.result(line)
        console.result(f"the file would have {outcome.predicted_bytes:,} bytes")
        return
    console.detail(layers)
    _show_table(console, outcome.evaluation)
    for line in lines:
        console.note(line)
    _show_written(console, outcome.written)


def show_trained(console: Console, outcome: "TrainOutcome", exports: Sequence[Path], force: bool) -> None:
    """Say how training went, export and print the table; raises GateNotMet."""
    if outcome.plan is not None:
        _show_plan(console, outcome.plan)
    if outcome.written is None:  # another process of this command has the result
        return
    trained = outcome.trained
    _export(outcome.evaluation, exports, force, outcome.written)
    if console.json:
        console.result_json(trained_json(outcome))
    else:
        _show_table(console, outcome.evaluation)
        console.note(_trained_line(trained))
        _show_written(console, outcome.written)
    _require_gates(outcome.evaluation)


def show_pruned(console: Console, outcome: "PruneOutcome", exports: Sequence[Path], force: bool) -> None:
    """Say what is left of each layer, export and print the table; raises GateNotMet."""
    from modelopt_cli import report

    _export(outcome.evaluation, exports, force, outcome.written)
    if console.json:
        console.result_json(pruned_json(outcome))
    else:
        _show_made(console, outcome, report.pruned_table(outcome.layers), outcome.target)
    _require_gates(outcome.evaluation)


def show_shared(console: Console, outcome: "ShareOutcome", exports: Sequence[Path], force: bool) -> None:
    """Say what became of each layer, export and print the table; raises GateNotMet."""
    from modelopt_cli import report

    layers = (
        report.shared_table(outcome.layers) if outcome.layers else report.coverage_table(outcome.coverage)
    )
    _export(outcome.evaluation, exports, force, outcome.written)
    if console.json:
        console.result_json(shared_json(outcome))
    else:
        _show_made(console, outcome, layers, outcome.target)
    _require_gates(outcome.evaluation)


def show_distilled(console: Console, outcome: "DistillOutcome", exports: Sequence[Path], force: bool) -> None:
    """Say how the student learned, export and print the table; raises GateNotMet."""
    if outcome.plan is not None:
        _show_plan(console, outcome.plan)
    if outcome.written is None:  # another process of this command has the result
        return
    _export(outcome.evaluation, exports, force, outcome.written)
    if console.json:
        console.result_json(distilled_json(outcome))
    else:
        _show_table(console, outcome.evaluation)
        for line in _distilled_lines(outcome.entry):
            console.note(line)
        for written in filter(None, (outcome.scratch, outcome.written)):
            _show_written(console, written)
    _require_gates(outcome.evaluation)


def _show_plan(console: Console, plan: "Plan") -> None:
    """Print what a training would take; the object's ``output`` is null."""
    from modelopt_cli import report

    if console.json:
        console.result_json({"schema_version": 1, "output": None, **report.plan_json(plan)})
    else:
        console.result(report.plan_table(plan))


def _distilled_lines(entry: dict[str, Any]) -> list[str]:
    line = f"learned {entry['config']['loss']}, {_steps_line(entry)}"
    if "finetuned" in entry:
        line += f"; then the labels alone, {_steps_line(entry['finetuned'])}"
    return [line, *(f"{term} compared {', '.join(at)}" for term, at in entry.get("compared", {}).items())]


def _steps_line(figures: dict[str, Any]) -> str:
    line = f"{figures['epochs']} epoch{'s' * (figures['epochs'] != 1)}, {figures['steps']:,} steps"
    if "best" not in figures:
        return line
    return f"{line}, kept epoch {figures['best_epoch']} ({figures['best']:.2f} % on the validation samples)"


def show_sensitivity(console: Console, parts: "Sequence[Sensitivity]") -> None:
    """Print the table of sensitivities."""
    from modelopt_cli import report

    if console.json:
        console.result_json(report.sensitivity_json(parts))
    else:
        console.result(report.sensitivity_table(parts))


def _trained_line(trained: "Trained") -> str:
    epochs = f"{trained.epochs} epoch{'s' * (trained.epochs != 1)}"
    line = f"trained {epochs}, {trained.steps:,} steps; last loss {trained.loss:.4f}"
    if trained.best is None:
        return line
    return f"{line}; kept epoch {trained.best_epoch}, {trained.best:.2f} % on the validation samples"


def _show_table(console: Console, evaluation: "Evaluation | None") -> None:
    from modelopt_cli import report

    if evaluation is not None:
        console.result(report.table(evaluation))


def _show_written(console: Console, written: "Written") -> None:
    console.note(f"wrote {written.path} ({written.file_bytes:,} bytes)")


def _require_gates(evaluation: "Evaluation | None") -> None:
    from modelopt_cli.measure import gates

    if evaluation is not None:
        gates.require(evaluation)


def _export(
    evaluation: "Evaluation | None",
    exports: Sequence[Path],
    force: bool,
    written: "Written | None" = None,
) -> None:
    from modelopt_cli import report
    from modelopt_cli.api.judging import after_writing

    if evaluation is not None:
        with after_writing(*([written.path] if written is not None else [])):
            for path in exports:
                report.export(evaluation, path, force=force)
