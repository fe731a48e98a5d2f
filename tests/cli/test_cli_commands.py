"""The commands when all is well: what is written, what is printed where."""

import json

import pytest
from folder_contents import names

HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
QUICK = ["--data", "digits", "--latency-runs", "0", "--limit", "64", "--calibration-samples", "64"]


def test_quantize_writes_the_default_name_and_says_so(here, modelopt):
    outcome = modelopt("quantize", "net.pth", *HOW, *QUICK, "--no-eval")
    assert (outcome.code, outcome.out) == (0, "")
    size = (here / "net-int8.safetensors").stat().st_size
    assert f"wrote net-int8.safetensors ({size:,} bytes)\n" in outcome.err


@pytest.mark.slow
def test_quantize_ends_with_the_table_and_exports_it(here, modelopt, real_loading):
    timed = [*QUICK, "--latency-runs", "1", "--export", "t.json", "--export", "t.md"]
    outcome = modelopt("quantize", "net.pth", *HOW, *timed, "-v")
    assert outcome.code == 0
    assert "net-int8.safetensors" in outcome.out
    assert "top-1" in outcome.out
    assert "QuantizedConv2d" not in outcome.out
    assert "Conv2d" in outcome.err  # -v lists the layers
    models = json.loads((here / "t.json").read_text())["models"]
    assert [model["path"] for model in models] == ["net.pth", "net-int8.safetensors"]
    assert all(model["load_s"] > 0 for model in models)
    table = (here / "t.md").read_text()
    assert "time to load" in table
    assert "peak memory" in table


def test_quantize_as_json_prints_one_object(here, modelopt):
    outcome = modelopt("quantize", "net.pth", *HOW, *QUICK, "--no-eval", "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    path = here / "net-int8.safetensors"
    assert data["schema_version"] == 1
    assert data["output"]["path"] == path.name
    assert data["output"]["file_bytes"] == data["predicted_bytes"] == path.stat().st_size
    assert [layer["compressed"] for layer in data["layers"]] == [True, True, True]
    assert data["evaluation"] is None


def test_dry_run_predicts_the_size_and_writes_nothing(here, modelopt):
    before = names(here)
    outcome = modelopt("quantize", "net.pth", *HOW, *QUICK, "--dry-run", "--json", "-q")
    assert outcome.code == 0
    assert names(here) == before
    predicted = json.loads(outcome.out)
    assert predicted["output"] is None
    assert len(predicted["layers"]) == 3
    modelopt("quantize", "net.pth", *HOW, *QUICK, "--no-eval")
    assert (here / "net-int8.safetensors").stat().st_size == predicted["predicted_bytes"]


def test_dry_run_prints_the_plan_on_stdout(here, modelopt):
    outcome = modelopt("quantize", "net.pth", *HOW, *QUICK, "--dry-run", "--skip-first")
    assert outcome.code == 0
    assert "Conv2d" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("the file would have ")


def test_force_replaces(here, modelopt):
    command = ["quantize", "net.pth", *HOW, "--scheme", "int8-weight", "--no-eval"]
    (here / "net-int8-weight.safetensors").write_text("old")
    assert modelopt(*command).code == 2
    assert (here / "net-int8-weight.safetensors").read_text() == "old"
    assert modelopt(*command, "--force").code == 0
    assert (here / "net-int8-weight.safetensors").stat().st_size > 1000


def test_eval_as_json(here, modelopt):
    arguments = ["eval", "net-int8-weight.safetensors", "--baseline", "net.pth", *HOW, *QUICK]
    outcome = modelopt(*arguments[:-2], "--json", "-q", "--min-ratio", "1")
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    assert data["baseline"] == 0
    assert [model["path"] for model in data["models"]] == ["net.pth", "net-int8-weight.safetensors"]
    assert data["models"][0]["samples"] == 64
    assert [(gate["name"], gate["passed"]) for gate in data["gates"]] == [("min-ratio", True)]


def test_eval_judges_one_file_alone(here, modelopt):
    files = ["net.pth", "net-int8-weight.safetensors", "net.safetensors"]
    limit = ["--min-ratio", "1.5"]
    assert modelopt("eval", *files, *HOW, *QUICK[:-2], *limit).code == 1
    outcome = modelopt("eval", *files, *HOW, *QUICK[:-2], *limit, "--target-model", files[1], "--json")
    assert outcome.code == 0
    assert [gate["name"] for gate in json.loads(outcome.out)["gates"]] == ["min-ratio"]


@pytest.mark.parametrize(
    ("given", "baseline", "paths", "index"),
    [
        (["a", "b"], None, ["a", "b"], 0),
        (["a", "b"], "b", ["a", "b"], 1),
        (["a", "b"], "c", ["c", "a", "b"], 0),
    ],
)
def test_the_baseline_is_one_of_the_models(given, baseline, paths, index):
    from modelopt_cli.cli.eval import with_baseline

    assert with_baseline(given, baseline) == (paths, index)


def test_inspect_lists_tensors_and_history(here, modelopt):
    outcome = modelopt("inspect", "net-int8-weight.safetensors", "--json")
    data = json.loads(outcome.out)
    assert [entry["method"] for entry in data["history"]] == ["quantize"]
    assert {tensor["name"]: tensor["codec"] for tensor in data["tensors"]}["0.weight"] == "affine"
    outcome = modelopt("inspect", "net.pth")
    assert outcome.code == 0
    assert "4x1x3x3" in outcome.out


def test_env_names_versions_cpu_and_kernels(modelopt):
    import torch

    data = json.loads(modelopt("env", "--json").out)
    assert data["versions"]["torch"] == torch.__version__
    assert data["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert data["kernels"]["reference"] is True
    assert "onednn" in modelopt("env").out


@pytest.mark.parametrize(("operators", "mended"), [(True, False), (False, True), (False, False)])
def test_env_says_whether_torchvision_imports_alone(operators, mended, modelopt, monkeypatch):
    monkeypatch.setattr("modelopt_cli._torchvision.has_operators", lambda: operators)
    monkeypatch.setattr("modelopt_cli.torchvision_start.is_installed", lambda: mended)
    outcome = modelopt("env")
    assert outcome.code == 0
    assert ("python -m modelopt_cli.torchvision_start" in outcome.err) == (not operators and not mended)
    found = json.loads(modelopt("env", "--json").out)["torchvision"]
    assert found == {"operators": operators, "imports_alone": operators or mended}
