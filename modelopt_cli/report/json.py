"""The evaluation as one JSON object, stable under its ``schema_version``.

    schema_version  1
    baseline        index of the baseline among the models
    models          in the order given, each with path and the figures of a model
    input           shape and preprocessing of a sample, and who says so, as one line
    comparisons     every model but the baseline, in order, each with the figures that compare
    gates           for each comparison in turn the limits that were set (with --judge for that file alone),
        each with name, limit, value, passed, end ("lower" or "upper": the value is that of an interval)
    notes           one line for each thing the reader should know

Figures are those of ``report.figures``, under their names, in the order of CSV's columns. ``null`` stands
where something was not measured. NaN and infinity, which JSON does not have, are null too.
"""

import json
import math
from typing import Any

from modelopt_cli.measure import Comparison, Evaluation, GateResult, ModelReport
from modelopt_cli.report.figures import exported

SCHEMA_VERSION = 1


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the object that ``eval --json`` prints, of JSON types alone."""
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": evaluation.baseline,
        "models": [_model(model) for model in evaluation.models],
        "input": None if evaluation.input is None else _text(evaluation.input),
        "comparisons": [
            _fields(evaluation.models[comparison.model], comparison) for comparison in evaluation.comparisons
        ],
        "gates": [_gate(gate) for gate in evaluation.gates],
        "notes": [_text(note) for note in evaluation.notes],
    }


def json_text(evaluation: Evaluation) -> str:
    """Return :func:`to_json` as text, for a file."""
    return json.dumps(to_json(evaluation), indent=2, allow_nan=False) + "\n"


def _model(model: ModelReport) -> dict[str, Any]:
    return {"path": _text(model.path), **_fields(model)}


def _fields(model: ModelReport, comparison: Comparison | None = None) -> dict[str, Any]:
    """Figures of a model, or of a comparison; None for a group of which nothing was measured."""
    fields: dict[str, Any] = {}
    for name, figure in exported():
        if figure.compares != (comparison is not None):
            continue
        *parents, key = figure.path or (name,)
        value = figure.value(model, comparison)
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
        "limit": _number(gate.limit),
        "value": _number(gate.value),
        "passed": gate.passed,
        "end": gate.end,
    }


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are no UTF-8


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
