"""The evaluation as CSV: one line for each model, raw numbers, an empty field where there is none."""

import csv
import io
from typing import Any

from modelopt_cli.measure import Evaluation
from modelopt_cli.report.json import to_json
from modelopt_cli.text import printable


def csv_text(evaluation: Evaluation) -> str:
    """The fields of the JSON object, flattened; the baseline's comparison fields are empty."""
    data = to_json(evaluation)
    comparisons = {
        c.model: fields for c, fields in zip(evaluation.comparisons, data["comparisons"], strict=True)
    }
    lines = [_line(i, model, comparisons.get(i, {})) for i, model in enumerate(data["models"])]
    for i, line in enumerate(lines):
        line["baseline"] = "true" if i == evaluation.baseline else "false"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


COLUMNS = (
    *("path", "baseline", "file_bytes", "tensor_bytes", "parameters", "nonzero", "macs", "bits_per_weight"),
    *(
        "samples",
        "top1",
        "top5",
        "latency_median_ms",
        "latency_iqr_ms",
        "coverage",
        "weight_coverage",
        "load_s",
    ),
    *("drop_pp", "low", "high", "ratio", "speedup", "speedup_low", "speedup_high", "agreement"),
)


def _line(index: int, model: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    line = {**model, **comparison}
    latency = line.pop("latency_ms") or {}
    line["path"] = printable(line["path"])  # one record is one line, for tools that split at line breaks
    return {**line, "latency_median_ms": latency.get("median"), "latency_iqr_ms": latency.get("iqr")}
