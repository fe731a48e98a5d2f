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


BAD = {
    "for real": (["--sensitivity", "--data", "digits"], "--sensitivity: has no meaning without --dry-run"),
    "without data": (["--sensitivity", "--dry-run"], "needs data"),
    "a plot of nothing": (["--plot", "a.png", "--data", "digits"], "--plot: has no meaning without"),
    "a plot of no kind": ([*ASK, "--plot", "a.txt"], "ends in none of .png, .svg"),
    "a scheme without scales": ([*ASK, "--scheme", "int8-weight"], "--scheme: "),
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
