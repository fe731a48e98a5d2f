"""``modelopt prune``: what it writes and prints, plans, refuses, and how it goes on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from folder_contents import digest, names
from safetensors.torch import load_file, save_file

import modelopt_cli
from modelopt_cli.artifact import read_tensors
from modelopt_cli.methods.prune import rounds
from modelopt_cli.program import Program
from modelopt_cli.training.learner import Learner

HOW = ["--arch", "net.py:make?width=16", "--input-size", "8", "--channels", "1"]
HALF = ["--sparsity", "0.5", "--round-to", "1"]
TUNE = ["--train", "digits?split=train", "--lr", "0.05"]
OUT = ["-o", "out.safetensors"]


@pytest.fixture(scope="module")
def trained(good_files, tmp_path_factory):
    """A folder with a trained network of width 8, as an artifact."""
    from modelopt_cli.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(good_files / "net.py", folder)
    how = [
        "--arch",
        f"{folder / 'net.py'}:make?width=16",
        *HOW[2:],
        *TUNE,
        "--epochs",
        "15",
        "--no-eval",
        "-q",
    ]
    assert main(["train", *how, "-o", str(folder / "net.safetensors")]) == 0
    state = modelopt_cli.load(folder / "net.safetensors").state_dict()
    torch.save(dict(state), folder / "net.pth")
    return folder


@pytest.fixture
def here(trained, enter):
    """A copy of the trained network as the current directory."""
    return enter(trained)


def test_channels_go_are_tuned_and_the_table_says_what_it_cost(here, modelopt):
    command = [
        "prune",
        "net.safetensors",
        *HALF,
        *TUNE,
        "--epochs",
        "3",
        "--data",
        "digits",
        "--latency-runs",
        "0",
    ]
    outcome = modelopt(*command, "-v", "--export", "t.json")
    assert outcome.code == 0, outcome.err
    assert "net-pruned.safetensors" in outcome.out
    lines = outcome.err.splitlines()
    reached = next(line for line in lines if line.startswith("sparsity: wanted 50.0 % removed, "))
    assert reached.endswith("reached 50.0 %")
    assert any("16x1x3x3 -> " in line for line in lines)  # -v lists the layers
    assert lines[-1].startswith("wrote net-pruned.safetensors (")
    base, result = json.loads((here / "t.json").read_text())["models"]
    assert result["macs"] < 0.6 * base["macs"]
    assert result["file_bytes"] < base["file_bytes"]
    assert base["top1"] - result["top1"] < 8
    program = modelopt_cli.load("net-pruned.safetensors")
    assert program.get_submodule("2").in_channels < 16
    assert [entry["method"] for entry in program.history] == ["train", "prune"]
    assert program.history[-1]["training"]["epochs"] == 3
    assert names(here / "net-pruned.run") == {"metrics.jsonl"}


def test_as_json_it_is_one_object(here, modelopt):
    how = ["--structure", "unstructured", "--sparsity", "0.8", "--no-eval", "--json", "-q"]
    outcome = modelopt("prune", "net.safetensors", *how, *OUT)
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    assert data["schema_version"] == 1
    assert data["output"]["sha256"] == digest(here / "out.safetensors")
    assert data["predicted_bytes"] == data["output"]["file_bytes"]
    reached = pytest.approx(0.8, abs=0.001)
    assert data["target"] == {"metric": "sparsity", "wanted": 0.8, "reached": reached, "unit": ""}
    assert data["evaluation"] is None
    assert not (here / "out.run").exists()
    state = modelopt_cli.load("out.safetensors").state_dict()
    for layer in data["layers"]:
        weight = state[f"{layer['name']}.weight"]
        assert layer["kept"] == int((weight != 0).sum())
        assert (layer["total"], layer["shape"]) == (weight.numel(), list(weight.shape))
        assert layer["sparsity"] == pytest.approx(1 - layer["kept"] / layer["total"])
    assert sum(layer["kept"] for layer in data["layers"]) == pytest.approx(
        0.2 * sum(layer["total"] for layer in data["layers"]), abs=1
    )


@pytest.mark.parametrize(
    "how",
    [HALF, ["--structure", "2:4"], ["--structure", "block", "--params", "0.4"]],
    ids=["channels", "2:4", "block"],
)
def test_dry_run_knows_the_plan_and_the_size(how, here, modelopt):
    before = names(here)
    command = ["prune", "net.safetensors", *how, "--data", "digits"]
    planned = json.loads(modelopt(*command, "--dry-run", "--json", "-q").out)
    assert names(here) == before
    assert planned["output"] is planned["evaluation"] is None
    done = json.loads(modelopt(*command, "--no-eval", "--json", "-q", *OUT).out)
    assert done["output"]["file_bytes"] == planned["predicted_bytes"]
    assert done["layers"] == planned["layers"]


def test_dry_run_prints_the_plan_on_stdout_and_trains_nothing(here, modelopt, monkeypatch):
    monkeypatch.setattr(rounds, "fit", None)
    how = ["--schedule", "iterative", *TUNE, "--epochs", "3", "--exclude", "5"]
    outcome = modelopt("prune", "net.safetensors", *HALF, *how, "--dry-run")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split()[:2] == ["layer", "kind"]
    assert any(" -> " in line for line in lines)
    assert any(line.startswith("sparsity: wanted 50.0 % removed") for line in lines)
    assert lines[-1].startswith("the file would have ")
    assert not (here / "net-pruned.run").exists()


def test_sensitivity_is_a_table_and_a_picture(here, modelopt):
    pytest.importorskip("matplotlib")
    before = names(here)
    command = ["prune", "net.safetensors", "--dry-run", "--sensitivity", "--data", "digits"]
    outcome = modelopt(*command, "--structure", "unstructured", "--plot", "s.svg")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert re.split(r"  +", lines[0]) == ["part", *(f"{n} % removed" for n in (25, 50, 75, 90))]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "2", "5"]
    assert names(here) - before == {"s.svg"}
    assert "<svg" in (here / "s.svg").read_text()
    data = json.loads(modelopt(*command, "--json", "-q").out)
    assert [point["sparsity"] for point in data["sensitivity"][0]["points"]] == [0.25, 0.5, 0.75, 0.875]
    outcome = modelopt(*command, "--plot", "s.svg")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--force" in outcome.err


def test_pruned_then_quantized_keeps_every_zero(here, modelopt):
    how = ["--structure", "unstructured", "--sparsity", "0.8", "--no-eval"]
    assert modelopt("prune", "net.safetensors", *how, "-o", "sparse.safetensors").code == 0
    assert modelopt("quantize", "sparse.safetensors", "--data", "digits", "--no-eval", *OUT).code == 0
    before, after = (modelopt_cli.load(name).state_dict() for name in ("sparse.safetensors", OUT[1]))
    for name in ("0.weight", "2.weight", "5.weight"):
        assert bool((after[name][before[name] == 0] == 0).all())
    assert (here / OUT[1]).stat().st_size < 0.8 * (here / "net.safetensors").stat().st_size


def test_a_bare_state_dict_is_pruned_tensor_by_tensor(here, modelopt):
    half = {name: tensor.half() for name, tensor in torch.load("net.pth").items()}
    save_file(half, "bare.safetensors")
    how = ["--structure", "unstructured", "--params", "0.3", "--allocation", "uniform", "--json"]
    outcome = modelopt("prune", "bare.safetensors", *how, "--no-eval", *OUT)
    assert outcome.code == 0, outcome.err
    stored = read_tensors(Path("out.safetensors"))
    nonzero = sum(int(t.count_nonzero()) for t in stored.state.values())
    assert nonzero / sum(int(t.count_nonzero()) for t in half.values()) == pytest.approx(0.3, abs=0.001)
    for name, tensor in stored.state.items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], load_file("bare.safetensors")[name][kept])
        if kept.sum() < kept.numel():  # of one layer the largest are left
            gone = half[name][~kept].abs().max()
            assert half[name][kept].abs().min() >= gone
    assert {entry["method"] for entry in stored.history} == {"prune"}
    assert json.loads(outcome.out)["predicted_bytes"] == (here / "out.safetensors").stat().st_size


def test_a_network_that_cannot_be_traced_is_pruned_and_measured(here, modelopt):
    (here / "odd.py").write_text(
        (here / "net.py").read_text()
        + "\nclass Odd(nn.Sequential):\n    def forward(self, x):\n"
        + "        y = super().forward(x if x.sum() > 0 else -x)\n"
        + "        return y + 0 * sum(p.sum() for p in self.parameters())\n\n"
        + "def odd():\n    return Odd(*make(width=16))\n"
    )
    how = ["--arch", "odd.py:odd", *HOW[2:]]
    command = [
        "prune",
        "net.pth",
        *how,
        "--structure",
        "2:4",
        "--data",
        "digits",
        "--latency-runs",
        "0",
        "--json",
    ]
    outcome = modelopt(*command, *OUT)
    assert outcome.code == 0, outcome.err
    assert "cannot be traced" in outcome.err
    base, result = json.loads(outcome.out)["evaluation"]["models"]
    assert result["nonzero"] < base["nonzero"]
    assert not isinstance(modelopt_cli.api.load_network(OUT[1], arch="odd.py:odd"), Program)
    refused = modelopt("prune", "net.pth", *how, "--structure", "2:4", *TUNE, "--epochs", "1", "-o", "b")
    assert (refused.code, "fine-tuning needs a network that can be traced" in refused.err) == (2, True)


BAD = {
    "no target": ([], 2, "nothing says how much to prune"),
    "target not reached, with training": (
        ["--flops", "0.1", "--include", "0", *TUNE, "--epochs", "1"],
        1,
        "--flops 0.1 is not reached",
    ),
    "two targets": (["--flops", "0.5", "--params", "0.5"], 2, "exclude each other"),
    "target above 1": (["--flops", "50"], 2, "--flops: must be above 0 and below 1"),
    "target not reached": (["--flops", "0.1", "--include", "0"], 1, "--flops 0.1 is not reached"),
    "unknown structure": (["--structure", "chanels"], 2, "did you mean 'channels'?"),
    "the name of a pattern": (["--structure", "N:M"], 2, "write numbers in place of the letters of N:M"),
    "a pattern that keeps all": (["--structure", "4:4"], 2, "removes nothing"),
    "unknown criterion": (["--criterion", "size"], 2, "--criterion: 'size' is not one of auto, l1, l2"),
    "unknown allocation": (["--allocation", "globl"], 2, "did you mean 'global'?"),
    "unknown schedule": (["--schedule", "gradually"], 2, "did you mean 'gradual'?"),
    "a criterion for others": ([*HALF, "--criterion", "obs"], 2, "criterion obs cannot rank channels"),
    "a criterion without data": ([*HALF, "--criterion", "taylor"], 2, "--calibration"),
    "zeros for speed": (["--structure", "2:4", "--latency", "0.5"], 2, "2:4"),
    "a glob that matches nothing": ([*HALF, "--exclude", "conv*"], 2, "conv*"),
    "nothing left to prune": ([*HALF, "--exclude", "*"], 1, "no layer can be pruned"),
    "epochs without data": ([*HALF, "--epochs", "1"], 2, "--epochs: there is nothing to train on"),
    "training without epochs": ([*HALF, *TUNE], 2, "--lr has no meaning without --epochs"),
    "resuming without epochs": ([*HALF, "--resume"], 2, "--resume: has no meaning without --epochs"),
    "more rounds than epochs": (
        [*HALF, *TUNE, "--epochs", "1", "--schedule", "iterative"],
        2,
        "3 rounds need at least as many epochs",
    ),
    "a schedule without training": ([*HALF, "--schedule", "iterative"], 2, "schedule iterative trains"),
    "another teacher": (
        [*HALF, *TUNE, "--epochs", "1", "--teacher", "me"],
        2,
        "--teacher: 'me' is not one of",
    ),
    "sensitivity for real": ([*HALF, "--sensitivity"], 2, "--sensitivity: has no meaning without --dry-run"),
    "sensitivity without data": (["--sensitivity", "--dry-run"], 2, "--calibration or --data"),
    "a plot of nothing": ([*HALF, "--plot", "a.png"], 2, "--plot: has no meaning without --sensitivity"),
    "a plot of no kind": (["--sensitivity", "--dry-run", "--plot", "a.txt"], 2, "ends in none of .png, .svg"),
    "validating on test data": (
        [*HALF, *TUNE, "--epochs", "1", "--val", "digits", "--data", "digits"],
        2,
        "is what the result is judged on",
    ),
    "no such test data": ([*HALF, "--data", "digts"], 2, "digts"),
    "a gate and no table": ([*HALF, "--no-eval", "--max-drop", "1"], 2, "a gate needs the result"),
    "the output is the input": ([*HALF, "-o", "net.safetensors", "--force"], 2, "net.safetensors"),
}


@pytest.mark.parametrize(("argv", "code", "line"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line_and_writes_nothing(argv, code, line, here, modelopt):
    before = names(here)
    out = [] if "-o" in argv else OUT
    outcome = modelopt("prune", "net.safetensors", *argv, *out)
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert [x for x in outcome.err.splitlines() if x.startswith("error: ") and line in x], outcome.err
    assert outcome.err.count("\n") == 1
    assert names(here) == before


def test_a_bare_state_dict_has_no_channels(here, modelopt):
    outcome = modelopt("prune", "net.pth", *HALF, *OUT)
    assert outcome.code == 2
    assert "structure channels needs a network that can be traced" in outcome.err
    assert "--arch" in outcome.err


ROUNDS = [*HALF, "--schedule", "iterative", "--rounds", "2", *TUNE, "--epochs", "4", "--teacher", "self"]


def test_interrupted_in_a_round_it_goes_on_to_the_same_bytes(here, modelopt, monkeypatch):
    command = ["prune", "net.safetensors", *ROUNDS, "--no-eval", "--save-every", "5"]
    assert modelopt(*command, "-o", "whole.safetensors").code == 0
    before, steps = Learner.step, []

    def interrupted(self, batch, step, rate):
        steps.append(step)
        if len(steps) == 35:  # in the second round
            raise KeyboardInterrupt
        before(self, batch, step, rate)

    monkeypatch.setattr(Learner, "step", interrupted)
    outcome = modelopt(*command, *OUT)
    assert outcome.code == 130
    assert outcome.err == "error: interrupted; go on with the same command and --resume (out.run)\n"
    assert {"stage-prune-1.safetensors", "stage-tune-1.safetensors"} <= names(here / "out.run")
    monkeypatch.setattr(Learner, "step", before)
    outcome = modelopt(*command, *OUT, "--resume", "--sparsity", "0.6")
    assert outcome.code == 2
    assert "config.sparsity (0.5, now 0.6)" in outcome.err
    assert modelopt(*command, *OUT, "--resume").code == 0
    assert digest(here / "out.safetensors") == digest(here / "whole.safetensors")
    assert names(here / "out.run") == {"metrics.jsonl"}


@pytest.mark.parametrize("how", [["--dry-run"], ["--no-eval", *OUT], ["--latency-runs", "0", *OUT]])
def test_it_says_once_that_zeros_make_nothing_faster(here, modelopt, how):
    outcome = modelopt("prune", "net.safetensors", "--structure", "unstructured", "--sparsity", "0.5", *how)
    assert outcome.code == 0, outcome.err
    said = " ".join((outcome.out + outcome.err).split())
    assert said.count("faster") == 1
    assert re.search(r"nothing faster on a CPU|not the network faster: a CPU multiplies zeros", said)
