"""``--delete-on-fail``: a gate that is not met leaves no file that a second ``make`` would take for done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BARE = ["--scheme", "int8-weight", "--latency-runs", "0"]
OUT = ["-o", "out.safetensors"]
UNMET = ["--min-ratio", "100", "--delete-on-fail"]
HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
TRAIN = [
    *HOW,
    "--train",
    "digits",
    "--limit",
    "64",
    "--epochs",
    "1",
    "--latency-runs",
    "0",
    "--data",
    "digits",
]
COMMANDS = {
    "quantize": ["quantize", "net.pth", *BARE],
    "prune": ["prune", "net.pth", "--structure", "unstructured", "--sparsity", "0.5", "--latency-runs", "0"],
    "share": ["share", "net.pth", "--bits", "4", "--latency-runs", "0"],
    "train": ["train", "net.pth", *TRAIN],
    "distill": ["distill", "net.pth", "--student", "width:0.5", *TRAIN],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_gate_that_is_not_met_takes_the_file_back(here, modelopt, command):
    before = set(os.listdir(here))
    outcome = modelopt(*command, *OUT, *UNMET)
    assert outcome.code == 1, outcome.err
    assert "min-ratio" in outcome.err.splitlines()[-1]
    assert outcome.err.splitlines()[-1].endswith("out.safetensors was deleted again")
    assert not (here / "out.safetensors").exists()
    assert not [name for name in set(os.listdir(here)) - before if name.endswith((".old", ".part"))]


def test_without_it_the_file_stays(here, modelopt):
    assert modelopt(*COMMANDS["quantize"], *OUT, *UNMET[:-1]).code == 1
    assert (here / "out.safetensors").exists()


def test_a_gate_that_is_met_keeps_it(here, modelopt):
    assert modelopt(*COMMANDS["quantize"], *OUT, "--min-ratio", "0.1", "--delete-on-fail").code == 0
    assert (here / "out.safetensors").exists()


def test_the_file_that_force_would_replace_comes_back(here, modelopt):
    output = here / "out.safetensors"
    assert modelopt(*COMMANDS["quantize"], *OUT).code == 0
    old = output.read_bytes()
    assert modelopt(*COMMANDS["share"], *OUT, *UNMET).code == 2  # exists
    assert output.read_bytes() == old
    outcome = modelopt(*COMMANDS["share"], *OUT, *UNMET, "--force")
    assert outcome.code == 1
    assert outcome.err.endswith("the earlier out.safetensors is back\n")
    assert output.read_bytes() == old


RECIPE = """
checkpoint: net.pth
output: out.safetensors
latency-runs: "0"
min-ratio: "100"
steps:
  - prune: {structure: unstructured, sparsity: "0.5"}
  - quantize: {scheme: int8-weight}
"""


def test_a_recipe_takes_its_output_back_and_keeps_its_steps(here, modelopt):
    (here / "recipe.yaml").write_text(RECIPE)
    outcome = modelopt("run", "recipe.yaml", "--delete-on-fail")
    assert outcome.code == 1, outcome.err
    assert not (here / "out.safetensors").exists()
    assert (here / "out.steps" / "1-prune.safetensors").exists()


MAKEFILE = """
out.safetensors: net.pth
\t{python} -m modelopt_cli quantize $< --scheme int8-weight --latency-runs 0 -q \\
\t    --min-ratio 100 --force --delete-on-fail -o $@
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_does_not_take_a_refused_file_for_done(here: Path, environ: dict[str, str]) -> None:
    (here / "Makefile").write_text(MAKEFILE.format(python=sys.executable))
    codes = [
        subprocess.run(["make"], cwd=here, env=environ, capture_output=True, check=False).returncode
        for _ in range(2)
    ]
    assert codes == [2, 2]
