"""Exports of an evaluation: JSON, Markdown and CSV.

JSON is one object, stable under its ``schema_version``.

    schema_version  1
    baseline        index of the baseline among the models
    models          in the order given, each with path and the figures of a model; metrics (name to value),
        and fidelity (snr_db, cosine and kl, each from the name of an output to its value)
    task            task and who says so, as one line; null where it was taken by default
    input           shape and preprocessing of a sample, and who says so, as one line
    comparisons     every model but the baseline, in order, each with the figures that compare, and drops
        (name of a metric to drop, low and high, the 95 % interval)
    gates           for each comparison in turn the limits that were set (for --target-model alone, if given),
        each with name, limit, value, passed, end ("lower" or "upper": the value is that of an interval)
    notes           one line for each thing the reader should know

Figures are those of ``report.figure_rows``, under their names, in the order of CSV's columns. ``null`` stands
where something was not measured. NaN and infinity, which JSON does not have, are null too.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import Comparison, Evaluation, GateResult, ModelReport
from modelopt_cli.report.evaluation_table import footer, gate_lines, headings, rows
from modelopt_cli.report.figure_rows import exported, figures_of
from modelopt_cli.report.formats import TABLES
from modelopt_cli.text import json_number, printable

SCHEMA_VERSION = 1
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!@])")


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the object that ``eval --json`` prints, of JSON types alone."""
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": evaluation.baseline,
        "models": [_model(evaluation, i) for i in range(len(evaluation.models))],
        "task": None if evaluation.task is None else _text(evaluation.task),
        "input": None if evaluation.input is None else _text(evaluation.input),
        "comparisons": [_comparison(evaluation, comparison) for comparison in evaluation.comparisons],
        "gates": [_gate(gate) for gate in evaluation.gates],
        "notes": [_text(note) for note in evaluation.notes],
    }


def json_text(evaluation: Evaluation) -> str:
    """Return :func:`to_json` as text, for a file."""
    return json.dumps(to_json(evaluation), indent=2, allow_nan=False) + "\n"


def _model(evaluation: Evaluation, number: int) -> dict[str, Any]:
    model = evaluation.models[number]
    fidelity = next((each.fidelity for each in evaluation.comparisons if each.model == number), None)
    fields = {"path": _text(model.path), **_fields(evaluation, model)}
    measured = model.accuracy.metrics if model.accuracy is not None else {}
    fields["metrics"] = {
        name: json_number(value) for name, value in measured.items() if value is not None
    } or None
    fields["fidelity"] = fidelity and {
        name: {output: json_number(value) for output, value in values.items()}
        for name, values in vars(fidelity).items()
    }
    return fields


def _comparison(evaluation: Evaluation, comparison: Comparison) -> dict[str, Any]:
    ends = ("drop", "low", "high")
    drops = {
        name: {end: json_number(getattr(difference, end)) for end in ends}
        for name, difference in comparison.differences.items()
    }
    return {**_fields(evaluation, evaluation.models[comparison.model], comparison), "drops": drops or None}


def _fields(
    evaluation: Evaluation, model: ModelReport, comparison: Comparison | None = None
) -> dict[str, Any]:
    """Figures of a model, or of a comparison; None for a group of which nothing was measured."""
    fields: dict[str, Any] = {}
    for name, figure in exported(figures_of(evaluation)):
        if figure.compares != (comparison is not None):
            continue
        *parents, key = figure.path or (name,)
        value = figure.value(model, comparison)
        if value is None and figure.optional:
            continue
        place = fields
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return {key: None if _is_empty(value) else value for key, value in fields.items()}


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and all(each is None for each in value.values())


def _gate(gate: GateResult) -> dict[str, Any]:
    return {
        "name": gate.name,
        "limit": json_number(gate.limit),
        "value": json_number(gate.value),
        "passed": gate.passed,
        "end": gate.end,
    }


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are no UTF-8


def csv_text(evaluation: Evaluation) -> str:
    """One column for each figure that JSON holds; those that compare are empty for the baseline."""
    comparisons = {comparison.model: comparison for comparison in evaluation.comparisons}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = exported(figures_of(evaluation))
    writer.writerow(["path", "baseline", *(name for name, _ in columns)])
    for i, model in enumerate(evaluation.models):
        figures = [figure.value(model, comparisons.get(i)) for _, figure in columns]
        # One record is one line, for tools that split at line breaks.
        writer.writerow([printable(model.path), str(i == evaluation.baseline).lower(), *figures])
    return text.getvalue()


def markdown_text(evaluation: Evaluation) -> str:
    """Return a table with one column for each model, then the gates and the conditions as a list."""
    titles = [
        f"{_literal(name)} (baseline)"
        if i == evaluation.baseline and len(evaluation.models) > 1
        else _literal(name)
        for i, name in enumerate(headings(evaluation))
    ]
    lines = [_line(["", *titles]), _line(["---", *("---:" for _ in titles)])]
    lines += [_line([row.label, *row.cells]) for row in rows(evaluation)]
    lines.append("")
    lines += [f"- {_literal(line)}" for _, line in gate_lines(evaluation)]
    lines += [f"- {_literal(line)}" for line in footer(evaluation)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _literal(text: str) -> str:
    """``text`` so that Markdown shows it as it is: a file name can hold anything."""
    return _SPECIAL.sub(r"\\\1", text)


def check_export(path: Path) -> None:
    """Refuse a suffix that names no format, before anything is measured.

    Raises:
        UsageError: naming the suffixes there are.
    """
    if path.suffix.lower() not in TABLES:
        raise UsageError(
            f"no export format for '{path.suffix}'", where=str(path), hint=f"end it in {', '.join(TABLES)}"
        )


def export(evaluation: Evaluation, path: Path, *, force: bool = False) -> None:
    """Write the evaluation to ``path`` in one indivisible step.

    Raises:
        UsageError: the suffix names no format.
        OutputError: the file exists and ``force`` is not given, or the path cannot be written to.
        EnvironmentFailure: no space or no permission.
    """
    check_export(path)
    text = TABLES[path.suffix.lower()](evaluation)
    atomic_write(path, [text.encode("utf-8", "backslashreplace")], force)
