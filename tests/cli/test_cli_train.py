"""``modelopt train``: what it writes and prints, how it is interrupted and goes on."""

import contextlib
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from folder_contents import digest, names

import modelopt_cli
from modelopt_cli import api
from modelopt_cli.cli.main import main
from modelopt_cli.data import open_data
from modelopt_cli.program import InputSpec

HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
TRAIN = ["--train", "digits?split=train", "--lr", "0.05"]
QUICK = ["--latency-runs", "0", "--data", "digits"]
OUT = ["-o", "out.safetensors"]


def logged(folder: Path) -> list[int]:
    """The epochs of the log."""
    lines = (folder / "out.run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


def test_from_scratch_to_a_file_that_needs_nothing_else(here, modelopt):
    outcome = modelopt("train", *HOW, *TRAIN, *QUICK, "--epochs", "12", "--val-fraction", "0.1", *OUT)
    assert outcome.code == 0, outcome.err
    accuracy = float(next(line for line in outcome.out.splitlines() if line.startswith("top-1")).split()[1])
    assert accuracy > 75
    assert "trained 12 epochs, 132 steps" in outcome.err
    assert "on the validation samples" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("wrote out.safetensors (")
    (here / "net.py").unlink()
    program = modelopt_cli.load("out.safetensors")
    assert program.labels is None  # the classes of these digits have no names
    (entry,) = program.history
    assert (entry["method"], entry["config"]["epochs"], entry["data"]) == ("train", 12, "digits?split=train")
    assert "source_sha256" not in entry


def test_the_log_stays_and_the_state_goes(here, modelopt):
    assert modelopt("train", *HOW, *TRAIN, "--epochs", "2", "--no-eval", *OUT).code == 0
    assert names(here / "out.run") == {"metrics.jsonl"}
    assert logged(here) == [1, 2]


def test_from_a_checkpoint_with_the_checkpoint_in_the_table(here, modelopt):
    command = ["train", "net.pth", *HOW, *TRAIN, "--latency-runs", "0", "--epochs", "1", "--json", "-q", *OUT]
    outcome = modelopt(*command, "--run-dir", "elsewhere", "--min-ratio", "0.5")
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    assert data["schema_version"] == 1
    assert data["output"]["sha256"] == digest(here / "out.safetensors")
    assert data["training"]["epochs"] == 1
    assert data["training"]["best"] is None
    assert [model["path"] for model in data["evaluation"]["models"]] == ["net.pth", "out.safetensors"]
    assert [model["top1"] for model in data["evaluation"]["models"]] == [None, None]  # there is no --data
    assert (here / "elsewhere" / "metrics.jsonl").exists()
    (entry,) = modelopt_cli.load("out.safetensors").history
    assert entry["source_sha256"] == digest(here / "net.pth")


def test_the_default_output_is_named_after_the_checkpoint(here, modelopt):
    assert modelopt("train", "net.pth", *HOW, *TRAIN, "--epochs", "1", "--no-eval").code == 0
    assert (here / "net-trained.safetensors").exists()


def test_the_seed_decides(here, modelopt):
    files = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        command = ["train", *HOW, *TRAIN, "--epochs", "1", "--no-eval", "--seed", seed]
        assert modelopt(*command, "-o", f"{name}.safetensors").code == 0
        files.append(digest(here / f"{name}.safetensors"))
    assert files[0] == files[1] != files[2]


def test_zeros_of_pruning_stay_zero(here, modelopt):
    how = ["--structure", "unstructured", "--sparsity", "0.5", "--no-eval"]
    assert modelopt("prune", "net.pth", *HOW, *how, "-o", "sparse.safetensors").code == 0
    assert modelopt("train", "sparse.safetensors", *TRAIN, "--epochs", "1", "--no-eval", *OUT).code == 0
    before, after = (modelopt_cli.load(name).state_dict() for name in ("sparse.safetensors", *OUT[1:]))
    weights = [name for name in before if name.endswith("weight")]
    for name in weights:
        assert torch.equal(before[name] == 0, after[name] == 0)
        assert not torch.equal(before[name], after[name])


def test_a_network_that_cannot_be_traced_trains_too(here, modelopt):
    source = (here / "net.py").read_text()
    (here / "odd.py").write_text(
        f"{source}\nclass Odd(nn.Sequential):\n    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else -x)\n\n"
        "def odd():\n    return Odd(*make())\n"
    )
    how = ["--arch", "odd.py:odd", *HOW[2:]]
    outcome = modelopt("train", *how, *TRAIN, "--epochs", "8", "--val", "digits", "--no-eval", "--json", *OUT)
    assert outcome.code == 0, outcome.err
    assert "captured in 3 parts (0, 2, 5)" in outcome.err
    best = json.loads(outcome.out)["training"]["best"]
    assert best > 70
    network = api.load_network("out.safetensors", arch="odd.py:odd")
    images, labels = next(open_data("digits", input_spec=InputSpec((1, 8, 8))).batches(1000))
    assert 100 * (network(images).argmax(1) == labels).double().mean().item() == pytest.approx(best)


BAD = {
    "no data": (["train", *HOW, *OUT], "--train: there is nothing to train on"),
    "no output": (["train", *HOW, *TRAIN], "--output: name the file to write, with -o FILE"),
    "nothing to train": (["train", *TRAIN, *OUT], "nothing to train; name a checkpoint, or an architecture"),
    "unknown optimizer": (["--optimizer", "sdg"], "--optimizer: 'sdg' is not one of sgd, adamw"),
    "unknown augmentation": (["--augment", "cifer"], "did you mean 'cifar'?"),
    "unknown schedule": (["--lr-schedule", "cosin"], "did you mean 'cosine'?"),
    "learning rate": (["--lr", "-1"], "--lr: must be above 0, not -1"),
    "no epochs": (["--epochs", "0"], "--epochs: must be at least 1, not 0"),
    "two validations": (["--val", "digits", "--val-fraction", "0.1"], "--val-fraction: cannot be given"),
    "validating on test data": (["--val", "digits", "--data", "digits"], "is what the result is judged on"),
    "the same test data": (
        ["--val", "digits?split=test", "--data", "digits"],
        "is what the result is judged on",
    ),
    "output is the run": (["--run-dir", "out.safetensors"], "is a name that the run in out.safetensors uses"),
    "patience without validation": (["--patience", "2"], "--patience: needs samples to validate on"),
    "no such data": (["--data", "digts"], "digts"),
    "unlabelled data": (["--train", "synthetic:1x8x8"], "has no labels"),
    "a gate with nothing to compare": (["--max-drop", "1"], "a gate needs a second model"),
    "teacher": (["--teacher", "self"], "unknown option --teacher"),
}  # fmt: skip


@pytest.mark.parametrize(("argv", "line"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line_and_writes_no_file(argv, line, here, modelopt):
    command = argv if argv[0] == "train" else ["train", *HOW, *TRAIN, *OUT, "--epochs", "1", *argv]
    outcome = modelopt(*command)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert line in outcome.err
    assert not (here / "out.safetensors").exists()


def test_a_rate_that_no_return_mends(here, modelopt):
    """Each return is one line, and the error is the last."""
    outcome = modelopt("train", *HOW, *TRAIN, *OUT, "--epochs", "1", "--lr", "1e30")
    *returns, error = outcome.err.splitlines()
    assert (outcome.code, outcome.out, len(returns)) == (2, "", 5)
    assert all("; going back to step 0 with the learning rate" in line for line in returns)
    assert error.startswith("error: train: the loss is not a finite number at step")
    assert not (here / "out.safetensors").exists()


def test_quantized_networks_are_refused(here, modelopt):
    outcome = modelopt("train", "net-int8-weight.safetensors", *HOW, *TRAIN, "--epochs", "1", *OUT)
    assert outcome.code == 2
    assert "train first, then quantize" in outcome.err


LONG = [
    *HOW,
    *TRAIN,
    "--epochs",
    "40",
    "--ema",
    "0.9",
    "--mixup",
    "0.2",
    "--val-fraction",
    "0.1",
    "--no-eval",
]


@pytest.fixture(scope="module")
def whole(good_files, tmp_path_factory):
    """SHA-256 of the file of ``LONG`` without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(good_files / "net.py", folder)
    with contextlib.chdir(folder):
        assert main(["train", *LONG, *OUT, "-q"]) == 0
    return digest(folder / "out.safetensors")


@pytest.mark.slow
def test_killed_at_any_step_it_goes_on_to_the_same_bytes(here, interrupted, whole, modelopt, record_property):
    delay = random.Random().uniform(0, 0.5)
    record_property("delay", delay)
    done = interrupted(signal.SIGKILL, delay, "train", *LONG, *OUT)
    assert done.returncode == -signal.SIGKILL
    assert not (here / "out.safetensors").exists()
    outcome = modelopt("train", *LONG, *OUT, "--resume")
    assert outcome.code == 0, outcome.err
    assert digest(here / "out.safetensors") == whole
    assert logged(here) == list(range(1, 41))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(here, interrupted, whole, modelopt):
    done = interrupted(signal.SIGINT, 0.1, "train", *LONG, *OUT)
    line = "error: interrupted; go on with the same command and --resume (out.run)\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (130, b"", line)
    outcome = modelopt("train", *LONG, *OUT)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "go on with --resume, or start over with --force" in outcome.err
    outcome = modelopt("train", *LONG, *OUT, "--resume", "--lr", "0.01")
    assert outcome.code == 2
    assert "was begun otherwise: training.lr (0.05, now 0.01)" in outcome.err
    assert modelopt("train", *LONG, *OUT, "--resume").code == 0
    assert digest(here / "out.safetensors") == whole


@pytest.mark.slow
def test_two_processes_print_and_write_once(here, torchrun):
    what = ["train", *HOW, *TRAIN, "--epochs", "2", "--no-eval", "--json", *OUT]
    done = torchrun("-m", "modelopt_cli", *what, cwd=here)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["output"]["sha256"] == digest(here / "out.safetensors")
    assert data["training"]["epochs"] == 2
