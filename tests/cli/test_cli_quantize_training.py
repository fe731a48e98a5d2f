"""``modelopt quantize`` with ``--train``: every form, what is refused, and how it goes on."""

import json
import random
import re
import shutil
import signal

import pytest
import torch
from folder_contents import digest, names

import modelopt_cli as mo
from modelopt_cli.data import open_data
from modelopt_cli.methods.quantize.learning.latent_layers import Latent
from modelopt_cli.training import learner

HOW = ["--arch", "net.py:make?width=16", "--input-size", "8", "--channels", "1"]
TRAIN = ["--train", "digits?split=train", "--epochs", "1", "--batch-size", "64"]
BITS = ["--weight-bits", "2", "--act-bits", "4", "--edge-bits", "2"]
QUIET = ["--no-eval", "-q"]


@pytest.fixture(scope="module")
def trained(good_files, tmp_path_factory):
    """A folder with a trained network."""
    from modelopt_cli.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(good_files / "net.py", folder)
    how = [
        "--arch",
        f"{folder / 'net.py'}:make?width=16",
        *HOW[2:],
        *TRAIN,
        "--epochs",
        "6",
        "--lr",
        "0.05",
        *QUIET,
    ]
    assert main(["train", *how, "-o", str(folder / "net.safetensors")]) == 0
    return folder


@pytest.fixture
def here(trained, enter):
    return enter(trained)


def accuracy(path):
    pictures, labels = next(iter(open_data("digits").batches(364)))
    with torch.no_grad():
        return float((mo.load(path)(pictures).argmax(1) == labels).float().mean())


def loss(path):
    pictures, labels = next(iter(open_data("digits?split=train").batches(2000)))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(mo.load(path)(pictures), labels))


def test_command_line_python_and_recipe_write_the_same_network(here, modelopt):
    command = ["quantize", "net.safetensors", *BITS, *TRAIN, "--threads", "1", "--no-eval", "--json"]
    outcome = modelopt(*command, "-o", "out.safetensors")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["coverage"][0]["scheme"] == "W2A4 in int8"
    entry = mo.load("out.safetensors").history[-1]
    assert entry["training"]["data"] == "digits?split=train"
    assert (entry["training"]["teacher"], entry["training"]["epochs"]) == ("self", 1)
    assert entry["config"]["weight_bits"] == 2
    assert names(here / "out.run") == {"metrics.jsonl"}
    assert (
        modelopt(
            "quantize",
            "net.safetensors",
            *BITS,
            "--calibration",
            "digits?split=train",
            *QUIET,
            "-o",
            "rounded.safetensors",
        ).code
        == 0
    )
    assert accuracy("out.safetensors") > accuracy("rounded.safetensors")

    bits = {"weight_bits": 2, "act_bits": 4, "edge_bits": 2}
    how = {"train": "digits?split=train", "epochs": 1, "batch_size": 64, "threads": 1, "evaluate": False}
    result = mo.quantize("net.safetensors", "python.safetensors", **bits, **how)
    assert result.program.history[-1]["training"] == entry["training"]
    (here / "r.yaml").write_text(
        "checkpoint: net.safetensors\noutput: recipe.safetensors\ntrain: digits?split=train\n"
        "threads: 1\nlatency-runs: 0\n"
        "steps:\n  - quantize: {weight_bits: 2, act_bits: 4, edge_bits: 2, epochs: 1, batch_size: 64}\n"
    )
    outcome = modelopt("run", "r.yaml")
    assert outcome.code == 0, outcome.err
    assert len({digest(f"{name}.safetensors") for name in ("out", "python", "recipe")}) == 1


def test_in_memory_it_trains_on_batches(here):
    program = mo.load("net.safetensors")
    batches = list(open_data("digits?split=train").batches(64))
    result = mo.quantize(program, train=batches, epochs=1, teacher="none", lr=0.01, evaluate=False)
    training = result.program.history[-1]["training"]
    assert (training["teacher"], training["lr"]) == ("none", 0.01)
    assert not any(isinstance(layer, Latent) for layer in result.program.modules())


def test_interrupted_it_goes_on_to_the_same_bytes(here, modelopt, monkeypatch):
    command = ["quantize", "net.safetensors", *BITS, *TRAIN, "--epochs", "2", "--threads", "1", *QUIET]
    assert modelopt(*command, "-o", "through.safetensors").code == 0
    step, calls = learner.Learner.step, []

    def stopping(self, *args):
        calls.append(0)
        if len(calls) == 30:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(learner.Learner, "step", stopping)
    assert modelopt(*command, "-o", "out.safetensors").code == 130
    assert "state.safetensors" in names(here / "out.run")
    monkeypatch.setattr(learner.Learner, "step", step)
    other = [*command, "--weight-bits", "3", "-o", "out.safetensors", "--resume"]
    assert modelopt(*other).code == 2  # begun otherwise
    resumed = modelopt(*command, "-o", "out.safetensors", "--resume")
    assert resumed.code == 0, resumed.err
    assert digest(here / "out.safetensors") == digest(here / "through.safetensors")


@pytest.mark.slow
def test_killed_at_any_step_it_goes_on_to_the_same_bytes(here, interrupted, modelopt, record_property):
    long = [
        "quantize",
        "net.safetensors",
        *BITS,
        *TRAIN,
        "--epochs",
        "15",
        "--ema",
        "0.9",
        "--val-fraction",
        "0.1",
    ]
    long += ["--threads", "1", *QUIET, "--resume", "-o"]
    assert modelopt(*long, "through.safetensors").code == 0
    delay = random.Random().uniform(0, 0.5)
    record_property("delay", delay)
    killed = interrupted(signal.SIGKILL, delay, *long, "out.safetensors")
    assert killed.returncode == -signal.SIGKILL
    assert not (here / "out.safetensors").exists()
    outcome = modelopt(*long, "out.safetensors")
    assert outcome.code == 0, outcome.err
    for part in ("safetensors", "run/metrics.jsonl"):
        assert digest(here / f"out.{part}") == digest(here / f"through.{part}")


def test_it_says_how_training_went(here, modelopt):
    """A line below the table; where little is left of the outputs, another observer is no advice."""
    plain = ("--observer", "mse", "--equalize", "none", "--bias-correction", "none")  # which lose the most
    command = ["quantize", "net.safetensors", *BITS, *TRAIN, *plain, "--threads", "1", "--no-eval"]
    outcome = modelopt(*command, "-o", "out.safetensors")
    assert outcome.code == 0, outcome.err
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("trained on"))
    found = re.fullmatch(
        r"trained on digits\?split=train, 1 epoch, 23 steps; "
        r"loss (\S+) at the first step, (\S+) on average in the last epoch",
        line,
    )
    assert found, line
    first, last = map(float, found.groups())
    logged = json.loads((here / "out.run" / "metrics.jsonl").read_text())["loss"]
    assert last == pytest.approx(logged, abs=1e-4)
    assert first > last
    (warning,) = (line for line in outcome.err.splitlines() if "the outputs keep" in line)
    assert "train for more --epochs" in warning
    assert "--observer" not in warning


def test_a_dry_run_plans_without_training(here, modelopt):
    outcome = modelopt("quantize", "net.safetensors", *TRAIN, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "the file would have" in outcome.out
    assert "a dry run does not train" in outcome.out
    assert names(here) == {"net.py", "net.safetensors", "net.run"}


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (["--epochs", "1"], "--epochs: there is nothing to train on; give --train"),
        (["--resume"], "--resume: has no meaning without --epochs"),
        (["--teacher", "none"], "--teacher has no meaning without --epochs"),
        ([*TRAIN, "--teacher", "slef"], "--teacher: 'slef'"),
    ],
)
def test_what_does_not_go_together_is_refused(how, problem, here, modelopt):
    outcome = modelopt("quantize", "net.safetensors", *how, "-o", "out.safetensors")
    assert outcome.code == 2
    assert problem in outcome.err
    assert not (here / "out.safetensors").exists()


def test_shared_weights_are_not_trained(here, modelopt):
    assert modelopt("share", "net.safetensors", "--bits", "3", *QUIET, "-o", "shared.safetensors").code == 0
    outcome = modelopt("quantize", "shared.safetensors", *TRAIN, "-o", "out.safetensors")
    assert outcome.code == 2
    assert "train first, then" in outcome.err
    assert not (here / "out.safetensors").exists()


def test_a_student_of_integers_learns_its_scales(here, modelopt):
    rounded = ["quantize", "net.safetensors", *BITS, "--calibration", "digits?split=train", *QUIET]
    assert modelopt(*rounded, "-o", "rounded.safetensors").code == 0
    outcome = modelopt(
        "distill",
        "net.safetensors",
        "--student",
        "rounded.safetensors",
        *TRAIN,
        *QUIET,
        "-o",
        "out.safetensors",
    )
    assert outcome.code == 0, outcome.err
    before, after = mo.load("rounded.safetensors"), mo.load("out.safetensors")
    changed = [
        name
        for name, tensor in after.state_dict().items()
        if name.endswith("scale") and not torch.equal(tensor, before.state_dict()[name])
    ]
    assert len(changed) == sum(name.endswith("scale") for name in after.state_dict())
    outputs = {name: getattr(layer, "output", None) for name, layer in after.named_modules()}
    assert any(q and q != before.get_submodule(name).output for name, q in outputs.items())
    assert loss("out.safetensors") < 0.9 * loss("rounded.safetensors")


def test_a_network_without_a_graph_is_not_trained(here, modelopt):
    state = dict(mo.load("net.safetensors").state_dict())
    torch.save(state, "bare.pth")
    outcome = modelopt("quantize", "bare.pth", "--scheme", "int8-weight", *TRAIN, "-o", "out.safetensors")
    assert outcome.code == 2
    assert "fine-tuning needs a network that can be traced" in outcome.err


def test_it_says_that_the_result_learned_from_what_judges_it(here, modelopt):
    for data, said in (("digits?split=train", True), ("digits", False)):
        command = ["quantize", "net.safetensors", *TRAIN, "--calibration", "digits", "--data", data]
        outcome = modelopt(
            *command, "--limit", "20", "--latency-runs", "0", "--force", "-o", "out.safetensors"
        )
        assert outcome.code == 0, outcome.err
        line = "warning: the result was trained on digits?split=train and is judged on the same samples"
        assert (line in outcome.out + outcome.err) == said
