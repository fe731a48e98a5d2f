"""Showing what quantize and eval found, in the form that was asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_cli.cli.console import Console

if TYPE_CHECKING:
    from modelopt_cli.api import QuantizeOutcome
    from modelopt_cli.measure import Evaluation


def show_evaluation(console: Console, evaluation: "Evaluation", exports: Sequence[Path], force: bool) -> None:
    """Export and print the table; raises GateNotMet, naming every gate that failed."""
    from modelopt_cli import report
    from modelopt_cli.measure import gates

    _export(evaluation, exports, force)
    if console.json:
        console.result_json(report.to_json(evaluation))
    else:
        console.result(report.table(evaluation))
    gates.require(evaluation)


def show_quantized(
    console: Console, outcome: "QuantizeOutcome", exports: Sequence[Path], force: bool
) -> None:
    """Say what was done to each layer, export and print the table; raises GateNotMet."""
    from modelopt_cli import report
    from modelopt_cli.measure import gates

    layers = report.coverage_table(outcome.coverage)
    if outcome.evaluation is not None:
        _export(outcome.evaluation, exports, force)
    if console.json:
        console.result_json(quantized_json(outcome))
    elif outcome.written is None:
        console.result(layers)
        console.result(f"the file would have {outcome.predicted_bytes:,} bytes")
    else:
        console.detail(layers)
        if outcome.evaluation is not None:
            console.result(report.table(outcome.evaluation))
        console.note(f"wrote {outcome.written.path} ({outcome.written.file_bytes:,} bytes)")
    if outcome.evaluation is not None:
        gates.require(outcome.evaluation)


def quantized_json(outcome: "QuantizeOutcome") -> dict[str, Any]:
    """The object that ``quantize --json`` prints.

    ``output`` is null after ``--dry-run``, ``evaluation`` (as ``eval --json`` prints it) where nothing
    was measured.
    """
    from modelopt_cli import report

    written, evaluation = outcome.written, outcome.evaluation
    return {
        "schema_version": 1,
        "output": None
        if written is None
        else {"path": str(written.path), "file_bytes": written.file_bytes, "sha256": written.sha256},
        "predicted_bytes": outcome.predicted_bytes,
        "layers": [vars(layer) for layer in outcome.coverage.layers],
        "evaluation": None if evaluation is None else report.to_json(evaluation),
    }


def _export(evaluation: "Evaluation", exports: Sequence[Path], force: bool) -> None:
    from modelopt_cli import report

    for path in exports:
        report.export(evaluation, path, force=force)
