"""The evaluation as one JSON object, stable under its ``schema_version``.

    schema_version  1
    baseline        index of the baseline among the models
    models          in the order given, each with
        path, file_bytes, tensor_bytes (of the network), parameters, nonzero, macs (one sample),
        bits_per_weight, samples, top1, top5 (percent), latency_ms {median, iqr}, coverage and
        weight_coverage (0 to 1, of the layers and of the weights' bytes), load_s (seconds)
    input           shape and preprocessing of a sample, and who says so, as one line
    comparisons     every model but the baseline, in order, each with
        drop_pp, low, high (percentage points), ratio, speedup, speedup_low, speedup_high, agreement (0 to 1)
    gates           for each comparison in turn the limits that were set (with --judge for that file alone),
        each with name, limit, value, passed, end ("lower" or "upper": the value is that of an interval)
    notes           one line for each thing the reader should know

``null`` stands where something was not measured. NaN and infinity, which JSON does not have, are null too.
"""

import json
import math
from typing import Any

from modelopt_cli.measure import Comparison, Evaluation, GateResult, ModelReport

SCHEMA_VERSION = 1


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The object that ``eval --json`` prints, of JSON types alone."""
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": evaluation.baseline,
        "models": [_model(model) for model in evaluation.models],
        "input": None if evaluation.input is None else _text(evaluation.input),
        "comparisons": [_comparison(comparison) for comparison in evaluation.comparisons],
        "gates": [_gate(gate) for gate in evaluation.gates],
        "notes": [_text(note) for note in evaluation.notes],
    }


def json_text(evaluation: Evaluation) -> str:
    """The same as text, for a file."""
    return json.dumps(to_json(evaluation), indent=2, allow_nan=False) + "\n"


def _model(model: ModelReport) -> dict[str, Any]:
    accuracy, latency = model.accuracy, model.latency
    return {
        "path": _text(model.path),
        "file_bytes": model.size.file_bytes,
        "tensor_bytes": model.size.tensor_bytes,
        "parameters": model.size.parameters,
        "nonzero": model.size.nonzero,
        "macs": model.macs.total if model.macs else None,
        "bits_per_weight": _number(model.size.bits_per_weight),
        "samples": accuracy.samples if accuracy else None,
        "top1": _number(accuracy.top1) if accuracy else None,
        "top5": _number(accuracy.top5) if accuracy else None,
        "latency_ms": {"median": _number(latency.median), "iqr": _number(latency.iqr)} if latency else None,
        "coverage": _number(model.coverage),
        "weight_coverage": _number(model.weight_coverage),
        "load_s": _number(model.load_s),
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    difference, speedup = comparison.difference, comparison.speedup
    return {
        "drop_pp": _number(difference.drop_pp) if difference else None,
        "low": _number(difference.low) if difference else None,
        "high": _number(difference.high) if difference else None,
        "ratio": _number(comparison.ratio),
        "speedup": _number(speedup.ratio) if speedup else None,
        "speedup_low": _number(speedup.low) if speedup else None,
        "speedup_high": _number(speedup.high) if speedup else None,
        "agreement": _number(comparison.agreement),
    }


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
