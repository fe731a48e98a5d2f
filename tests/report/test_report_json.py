"""The JSON object: exactly the keys that are promised, strictly valid, null where nothing was measured."""

import json

import pytest

from modelopt_cli.measure import Evaluation
from modelopt_cli.report import to_json
from modelopt_cli.report.exports import json_text

MODEL = {
    *(
        "path",
        "file_bytes",
        "tensor_bytes",
        "parameters",
        "nonzero",
        "macs",
        "bits_per_weight",
        "samples",
        "top1",
        "top5",
    ),
    *("latency_ms", "coverage", "weight_coverage", "load_s", "metrics", "fidelity"),
}
COMPARISON = {
    *("drop_pp", "low", "high", "ratio", "speedup", "agreement", "speedup_low", "speedup_high"),
    *("snr_db", "cosine", "kl", "drops"),
}


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def test_keys_are_exactly_those_promised(evaluation: Evaluation) -> None:
    data = to_json(evaluation)
    assert set(data) == {
        *("schema_version", "baseline", "models", "task", "input", "comparisons", "gates", "notes")
    }
    assert data["schema_version"] == 1
    assert all(set(model) == MODEL for model in data["models"])
    assert all(set(comparison) == COMPARISON for comparison in data["comparisons"])
    assert all(set(gate) == {"name", "limit", "value", "passed", "end"} for gate in data["gates"])
    assert set(data["models"][0]["latency_ms"]) == {"median", "iqr"}


def test_values(evaluation: Evaluation) -> None:
    data = to_json(evaluation)
    assert data["models"][0]["path"] == "runs/net.pth"
    assert data["models"][0]["macs"] == 1_814_073_344
    assert data["models"][1]["top1"] == 69.5
    assert data["models"][1]["load_s"] == 2.3456
    assert data["models"][1]["latency_ms"] == {"median": 22.5, "iqr": 0.4}
    assert data["comparisons"][0]["drop_pp"] == pytest.approx(0.26)
    assert data["comparisons"][0]["low"] < 0.26 < data["comparisons"][0]["high"]
    speedup = {key: value for key, value in data["comparisons"][0].items() if key.startswith("speedup")}
    assert speedup == {"speedup": 2.3333, "speedup_low": 2.25, "speedup_high": 2.41}
    gate = {"name": "min-speedup", "limit": 3.0, "value": 2.25, "passed": False, "end": "lower"}
    assert data["gates"][1] == gate
    assert data["notes"] == ["bare.pth: no architecture"]


def test_metrics_by_name_and_likeness_by_output(evaluation: Evaluation) -> None:
    data = to_json(evaluation)
    assert data["models"][1]["metrics"]["top5"] == 88.9
    assert data["models"][0]["fidelity"] is None
    assert data["models"][1]["fidelity"] == {
        "snr_db": {"logits": 31.25, "boxes": 40.5},
        "cosine": {"logits": 0.9987, "boxes": 0.9999},
        "kl": {"logits": 0.0125},
    }
    comparison = data["comparisons"][0]
    assert (comparison["snr_db"], comparison["cosine"], comparison["kl"]) == (31.25, 0.9987, 0.0125)
    assert set(comparison["drops"]) == {"top1"}
    assert comparison["drops"]["top1"] == {
        "drop": pytest.approx(0.26),
        "low": comparison["low"],
        "high": comparison["high"],
    }


def test_what_was_not_measured_is_null(evaluation: Evaluation) -> None:
    bare = to_json(evaluation)["models"][2]
    missing = {
        "tensor_bytes",
        "macs",
        "bits_per_weight",
        "samples",
        "top1",
        "top5",
        "metrics",
        "fidelity",
        "latency_ms",
        "coverage",
        "weight_coverage",
        "load_s",
    }
    assert {key for key, value in bare.items() if value is None} == missing
    assert to_json(evaluation)["gates"][2]["value"] is None


def test_the_text_is_strict_json(evaluation: Evaluation) -> None:
    assert json.loads(json_text(evaluation), parse_constant=refuse) == to_json(evaluation)
    assert to_json(evaluation)["comparisons"][1]["ratio"] is None
