"""``quantize --dry-run --sensitivity``: a table, JSON, a picture, and what goes wrong."""

import json
import re

import pytest
from folder_contents import names

NET = ["quantize", "net.pth", "--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
ASK = ["--dry-run", "--sensitivity", "--data", "digits"]


def test_sensitivity_is_a_table_json_and_a_picture(here, modelopt):
    pytest.importorskip("matplotlib")
    before = names(here)
    outcome = modelopt(*NET, *ASK, "--plot", "s.svg")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    headings = re.split(r"  +", lines[0])
    assert headings[:6] == ["layer", "kind", "bytes float32", "bytes int8", "ms float32", "ms int8"]
    assert headings[6:] == ["dB int8", "KL int8", "reason"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "2", "5"]
    assert names(here) - before == {"s.svg"}
    data = json.loads(modelopt(*NET, *ASK, "--json", "-q").out)
    assert data["samples"] == 64
    shown = [float(re.split(r"  +", line)[6]) for line in lines[1:4]]
    assert [round(layer["losses"][1]["snr_db"], 1) for layer in data["sensitivity"]] == shown
    assert lines[-1] == data["in_words"][-1]


def test_a_file_keeps_the_sensitivities_that_it_was_asked_for(here, modelopt):
    options = ["--data", "digits", "--sensitivity", "-q"]
    shown = json.loads(modelopt(*NET, *options, "--dry-run", "--json").out)
    outcome = modelopt(*NET, *options, "--latency-runs", "0", "-o", "out.safetensors")
    assert outcome.code == 0, outcome.err
    (entry,) = json.loads(modelopt("inspect", "out.safetensors", "--json").out)["history"]
    kept = {name: losses["int8"] for name, losses in entry["sensitivity_db"].items()}
    assert kept == {each["name"]: round(each["losses"][1]["snr_db"], 1) for each in shown["sensitivity"]}
    assert entry["sensitivity_in_words"] == shown["in_words"]
    text = modelopt("inspect", "out.safetensors").out
    assert f"int8 {kept['0']}" in text
    assert "most is lost by" in text


BAD = {
    "a plot for real": (
        ["--sensitivity", "--plot", "a.png", "--data", "digits"],
        "--plot: has no meaning without --dry-run",
    ),
    "without data": (["--sensitivity", "--dry-run"], "needs data"),
    "a plot of nothing": (["--plot", "a.png", "--data", "digits"], "--plot: has no meaning without"),
    "a plot of no kind": ([*ASK, "--plot", "a.txt"], "ends in none of .png, .svg"),
    "a scheme without scales": (
        [*ASK, "--scheme", "int8-weight"],
        "--sensitivity is measured with fixed scales",
    ),
    "a layer that is not there": ([*ASK, "--exclude", "conv9"], "conv9"),
}


@pytest.mark.parametrize(("argv", "line"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line_and_writes_nothing(argv, line, here, modelopt):
    before = names(here)
    outcome = modelopt(*NET, "-q", *argv)
    assert outcome.code == 2
    assert line in outcome.err
    assert outcome.err.count("\n") == 1
    assert names(here) == before
