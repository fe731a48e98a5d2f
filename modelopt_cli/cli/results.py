"""Showing of results, in the form that was asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_cli.cli.console import Console

if TYPE_CHECKING:
    from modelopt_cli.api import Result
    from modelopt_cli.artifact import Written
    from modelopt_cli.measure import Evaluation


def show_evaluation(console: Console, evaluation: "Evaluation", exports: Sequence[Path], force: bool) -> None:
    """Export and print the table; raises GateNotMet, naming every gate that failed."""
    from modelopt_cli import report

    console.evaluations.append(evaluation)
    _export(evaluation, exports, force)
    if console.json:
        console.result_json(report.to_json(evaluation))
    else:
        _show_table(console, evaluation)
    _require_gates(evaluation)


def show_result(console: Console, result: "Result", exports: Sequence[Path], force: bool) -> None:
    """Export and print the table, what was covered and reached, and the files; raises GateNotMet.

    Without a file, all of it is the result. Another process than the main one of several has nothing to show.
    """
    if result.written is None and result.coverage is None and result.plan is None:
        return
    _export(result.evaluation, exports, force, result.written)
    if console.json:
        console.result_json(result.as_dict())
    elif result.written is None:
        for part in result.parts():
            console.result(part)
    else:
        if result.layer_table is not None:
            console.detail(result.layer_table)
        _show_table(console, result.evaluation)
        for line in (*result.lines, *result.written_lines):
            console.note(line)
    _require_gates(result.evaluation)


def show_sensitivity(console: Console, found: Any) -> None:
    """Print the table of sensitivities, of any method."""
    from modelopt_cli import report

    if console.json:
        console.result_json(report.sensitivity_json(found))
    else:
        console.result(report.sensitivity_table(found))


def _show_table(console: Console, evaluation: "Evaluation | None") -> None:
    from modelopt_cli import report

    if evaluation is not None:
        console.result(report.table(evaluation))


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
    from modelopt_cli.api.rehearsal import after_writing

    if evaluation is not None:
        with after_writing(*([written.path] if written is not None else [])):
            for path in exports:
                report.export(evaluation, path, force=force)
