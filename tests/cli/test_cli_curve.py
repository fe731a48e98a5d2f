"""``--curve``: what is drawn of a training by each command, and what is refused before it begins."""

import json
import re
import shutil
import sys

import pytest

from modelopt_cli.training.learner import Learner

HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
TRAIN = [*HOW, "--train", "digits?split=train", "--lr", "0.05", "--val-fraction", "0.1"]
OUT = ["--no-eval", "-o", "out.safetensors"]
CURVE = ["--curve", "curve.svg"]
COMMANDS = {
    "train": ["train", "net.pth", *TRAIN, "--epochs", "3", *OUT],
    "distill": [
        *("distill", "net.pth", "--student", "net.py:make?width=2", *TRAIN, "--epochs", "3", *OUT),
        *("--finetune-epochs", "2", "--compare-scratch"),
    ],
    "prune": [
        *("prune", "net.pth", "--sparsity", "0.5", "--round-to", "1", *TRAIN, "--epochs", "4", *OUT),
        *("--schedule", "iterative", "--rounds", "2"),
    ],
    "share": ["share", "net.pth", "--bits", "4", *TRAIN, "--epochs", "2", *OUT],
}

pytest.importorskip("matplotlib")


def listing(folder):
    """Everything in a folder, with contents."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def drawn(path):
    """How many points each stage has in a panel, by the name in the legend."""
    text = path.read_text()
    colours = re.findall(r'<use [^>]*style="fill: (#\w+); stroke: \1"', text)
    counts = [(colours.count(colour) - 1) // 2 for colour in dict.fromkeys(colours)]
    return dict(zip(re.findall("<!-- (.*?) -->", text)[-len(counts) :], counts, strict=True))


@pytest.mark.parametrize(
    ("verb", "stages"),
    [
        ("train", {"train": 3}),
        ("distill", {"distill": 3, "finetune": 2, "scratch": 5}),
        ("prune", {"tune-1": 2, "tune-2": 2}),
        ("share", {"tune-1": 2}),
    ],
)
def test_every_stage_of_every_command_is_drawn(verb, stages, here, modelopt):
    outcome = modelopt(*COMMANDS[verb], *CURVE)
    assert outcome.code == 0, outcome.err
    assert "drew curve.svg" in outcome.err.splitlines()
    assert drawn(here / "curve.svg") == stages
    if verb == "distill":  # the comparison shares the axis with what it is compared with
        ticks = (here / "curve.svg").read_text().split('id="axes_2"')[1].split('id="matplotlib.axis_4"')[0]
        assert re.findall(r"<!-- (.*?) -->", ticks) == ["1", "2", "3", "4", "5", "epochs"]


@pytest.mark.slow
def test_a_resumed_run_draws_the_whole(here, modelopt, monkeypatch):
    argv = [*COMMANDS["distill"], *CURVE]
    assert modelopt(*argv).code == 0
    whole = listing(here)
    for name in ("curve.svg", "out.safetensors", "out-scratch.safetensors"):
        (here / name).unlink()
    shutil.rmtree(here / "out.run")
    step, left = Learner.step, [45]  # of 33 and 22 steps: in the second part

    def stopping(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", stopping)
        outcome = modelopt(*argv)
    assert outcome.code == 130
    assert not (here / "curve.svg").exists()
    assert modelopt(*argv, "--resume").code == 0
    assert listing(here) == whole


def test_a_gate_that_is_not_met_does_not_lose_the_picture(here, modelopt):
    argv = [word for word in COMMANDS["train"] if word != "--no-eval"]
    outcome = modelopt(*argv, *CURVE, "--latency-runs", "0", "--min-ratio", "9")
    assert outcome.code == 1
    assert drawn(here / "curve.svg") == {"train": 3}


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        pytest.param(["--curve", "c.jpg"], 2, "--curve: c.jpg ends in none of .png, .svg, .pdf", id="suffix"),
        pytest.param(["--curve", "old.svg"], 2, "old.svg: already exists", id="exists"),
        pytest.param(["--curve", "no/c.svg"], 2, "no/c.svg: the folder", id="folder"),
        pytest.param(["--curve", "net.svg", "--force"], 2, "net.svg: is also an input", id="input"),
        pytest.param(
            ["--curve", "out.svg", "-o", "./net-int8-weight.safetensors", "--force"],
            2,
            "out.svg: is also the output",
            id="output",
        ),
        pytest.param([*CURVE, "--run-dir", "curve.svg"], 2, "curve.svg: is a name that the run", id="run"),
        pytest.param([*CURVE, "--dry-run"], 2, "--curve: has no meaning with --dry-run", id="dry"),
    ],
)
@pytest.mark.parametrize("verb", COMMANDS)
def test_what_cannot_be_drawn_is_refused_before_training(verb, argv, code, message, here, modelopt):
    (here / "old.svg").write_text("mine")
    (here / "net.svg").symlink_to("net.pth")
    (here / "out.svg").symlink_to("net-int8-weight.safetensors")
    before = listing(here)
    outcome = modelopt(*COMMANDS[verb], *argv)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err
    assert listing(here) == before


def test_the_file_of_the_comparison_is_an_output_too(here, modelopt):
    (here / "a-scratch.safetensors").write_text("")
    (here / "a.svg").symlink_to("a-scratch.safetensors")
    outcome = modelopt(*COMMANDS["distill"], "-o", "a.safetensors", "--curve", "a.svg", "--force")
    assert outcome.code == 2
    assert "a.svg: is also the output" in outcome.err


@pytest.mark.parametrize("verb", ["prune", "share"])
def test_without_training_there_is_nothing_to_draw(verb, here, modelopt):
    how = {"prune": ["--sparsity", "0.5"], "share": ["--bits", "4"]}[verb]
    outcome = modelopt(verb, "net.pth", *HOW, *how, *CURVE, *OUT)
    assert outcome.code == 2
    assert "--curve: has no meaning without --epochs" in outcome.err


@pytest.mark.parametrize("verb", COMMANDS)
def test_without_matplotlib_nothing_is_trained(verb, here, modelopt, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    before = listing(here)
    outcome = modelopt(*COMMANDS[verb], *CURVE)
    assert outcome.code == 3
    assert "drawing needs matplotlib; pip install 'modelopt-cli[plots]'" in outcome.err
    assert listing(here) == before


@pytest.mark.slow
def test_one_of_two_processes_draws(here, torchrun):
    done = torchrun("-m", "modelopt_cli", *COMMANDS["train"], "--json", *CURVE, cwd=here)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"]["epochs"] == 3
    assert done.stderr.count("drew curve.svg") == 1
    assert drawn(here / "curve.svg") == {"train": 3}
