"""``quantize --precision auto``: limits are budgets, and what is wrong is one line."""

import json

import pytest
from folder_contents import names

NET = ["quantize", "net.pth", "--arch", "net.py:make", "--input-size", "8", "--channels", "1", "-q"]
AUTO = [*NET, "--precision", "auto", "--calibration", "digits?split=train"]
OUT = ["-o", "out.safetensors"]


def test_a_largest_drop_is_a_budget_and_a_gate(here, modelopt):
    outcome = modelopt(*AUTO, "--max-drop", "5", "--data", "digits", "--latency-runs", "0", "--json", *OUT)
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    assert data["target"]["metric"] == "max_drop"
    assert data["target"]["reached"] <= 5
    assert [gate["name"] for gate in data["evaluation"]["gates"]] == ["max-drop"]
    (entry,) = json.loads(modelopt("inspect", "out.safetensors", "--json").out)["history"]
    assert entry["precisions"].keys() == entry["sensitivity_db"].keys() == {"0", "2", "5"}
    assert entry["config"]["max_drop"] == 5


def test_without_data_to_judge_by_limits_are_the_budget_alone(here, modelopt):
    outcome = modelopt(*AUTO, "--min-ratio", "1.4", "--no-eval", *OUT)
    assert outcome.code == 0, outcome.err
    assert (here / "out.safetensors").exists()
    refused = modelopt(*AUTO, "--min-ratio", "30", "--no-eval", *OUT, "--force")
    assert refused.code == 1
    assert "times smaller; 30 was asked for" in refused.err


BAD = {
    "no budget": (["--precision", "auto"], "--precision auto needs a budget"),
    "a preference for nothing": (["--prefer", "speed"], "--prefer has no meaning without --precision auto"),
    "activations": (
        ["--precision", "auto", "--act-bits", "4", "--max-drop", "9"],
        "--act-bits has no meaning",
    ),
    "no scales": (["--precision", "auto", "--scheme", "int8-weight"], "needs scales that are fixed"),
    "a typing error": (["--precision", "autp"], "auto"),
}


@pytest.mark.parametrize(("argv", "line"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line_and_writes_nothing(argv, line, here, modelopt):
    before = names(here)
    outcome = modelopt(*NET, "--data", "digits", *argv, *OUT)
    assert outcome.code == 2
    assert line in outcome.err
    assert names(here) == before


def test_a_step_of_a_recipe_has_its_own_budget(here, modelopt):
    step = "{precision: auto, min-ratio: 1.2, calibration: 'digits?split=train'}"
    head = (
        "checkpoint: net.pth\narch: net.py:make\ninput-size: 8\nchannels: 1\ndata: digits\nlatency-runs: 0\n"
    )
    (here / "r.yaml").write_text(f"{head}output: out.safetensors\nsteps:\n  - quantize: {step}\n")
    outcome = modelopt("run", "r.yaml", "-q")
    assert outcome.code == 0, outcome.err
    (entry,) = json.loads(modelopt("inspect", "out.safetensors", "--json").out)["history"]
    assert entry["config"]["min_ratio"] == 1.2
    assert set(entry["precisions"].values()) <= {"float32", "bf16", "int8"}
