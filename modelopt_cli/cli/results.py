"""Showing what quantize and eval found, in the form that was asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_cli.cli.console import Console
from modelopt_cli.errors import GateNotMet

if TYPE_CHECKING:
    from modelopt_cli.api import QuantizeOutcome
    from modelopt_cli.measure import Evaluation
    from modelopt_cli.program.coverage import Coverage


def show_evaluation(console: Console, evaluation: "Evaluation", exports: Sequence[Path], force: bool) -> None:
    """Export and print the table; raises GateNotMet, naming every gate that failed."""
    from modelopt_cli import report

    for path in exports:
        report.export(evaluation, path, force=force)
    if console.json:
        console.result_json(report.to_json(evaluation))
    else:
        console.result(report.table(evaluation))
    enforce(evaluation)


def show_quantized(
    console: Console, outcome: "QuantizeOutcome", exports: Sequence[Path], force: bool
) -> None:
    """Say what was done to each layer, export and print the table; raises GateNotMet."""
    from modelopt_cli import report

    coverage, evaluation = outcome.result.coverage, outcome.evaluation
    if evaluation is not None:
        for path in exports:
            report.export(evaluation, path, force=force)
    if console.json:
        console.result_json(_quantized_json(outcome))
    elif outcome.written is None:
        console.result(layer_table(coverage))
        console.result(f"would write {outcome.predicted_bytes:,} bytes")
    else:
        console.detail(layer_table(coverage))
        if evaluation is not None:
            console.result(report.table(evaluation))
        console.note(f"wrote {outcome.written.path} ({outcome.written.file_bytes:,} bytes)")
    if evaluation is not None:
        enforce(evaluation)


def enforce(evaluation: "Evaluation") -> None:
    """Raise GateNotMet if a gate failed."""
    failed = [gate for gate in evaluation.gates if not gate.passed]
    if failed:
        what = "; ".join(
            f"{gate.name} is {_figure(gate.value)}, limit {_figure(gate.limit)}" for gate in failed
        )
        raise GateNotMet(what, where="gate not met")


def layer_table(coverage: "Coverage") -> Any:
    """One row for each layer: its scheme, or why it was left alone."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("layer", "kind", "scheme", "why not"):
        table.add_column(title)
    for layer in coverage.layers:
        table.add_row(Text(layer.name), Text(layer.kind), layer.scheme or "float", Text(layer.reason))
    return table


def _quantized_json(outcome: "QuantizeOutcome") -> dict[str, Any]:
    from modelopt_cli import report

    written, coverage = outcome.written, outcome.result.coverage
    return {
        "schema_version": 1,
        "output": None
        if written is None
        else {"path": str(written.path), "file_bytes": written.file_bytes, "sha256": written.sha256},
        "predicted_bytes": outcome.predicted_bytes,
        "layers": [vars(layer) for layer in coverage.layers],
        "evaluation": None if outcome.evaluation is None else report.to_json(outcome.evaluation),
    }


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
