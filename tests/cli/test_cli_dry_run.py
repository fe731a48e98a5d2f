"""``--dry-run`` of train and distill: what it prints, that it writes nothing, what it refuses."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import modelopt_cli
from modelopt_cli.cli.main import main
from modelopt_cli.methods.distill.teacher import Teacher
from modelopt_cli.report.dry_run import duration
from modelopt_cli.training import timing
from modelopt_cli.training.learner import Learner

TRAIN = ["--train", "digits?split=train", "--lr", "0.05"]
OUT = ["-o", "out.safetensors"]
RESNET = "builtin:resnet8?width=0.25"
DISTILL = ["distill", "one.safetensors", "--student", RESNET, *TRAIN, "--epochs", "5", *OUT, "--dry-run"]
SAMPLES = 1433  # of the digits' training part


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A network for 1x8x8 images, and what training it in earnest gives."""
    folder = tmp_path_factory.mktemp("teacher")
    path = str(folder / "one.safetensors")
    arch = ["--arch", "builtin:resnet8?in_channels=1&width=0.5", "--input-size", "8"]
    assert main(["train", *arch, *TRAIN, "--epochs", "1", "--no-eval", "-q", "-o", path]) == 0
    shutil.rmtree(folder / "one.run")
    return path


@pytest.fixture
def here(teacher, tmp_path, monkeypatch):
    """A folder with that network alone, as the current directory."""
    shutil.copy(teacher, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """A step takes 1 second, asking the teacher 4 more, and nothing else any time."""
    made = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.now))

    def taking(kind, name, seconds):
        original = getattr(kind, name)

        def call(self, *args):
            made.now += seconds
            return original(self, *args)

        monkeypatch.setattr(kind, name, call)

    taking(Learner, "step", 1.0)
    taking(Teacher, "__call__", 4.0)
    return made


def listing(folder):
    """Everything in a folder, with contents and times."""
    return {
        path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")
    }


def convolutions_and_linears(network):
    """FLOPs of one 1x8x8 image: two for each weight at each of its places."""
    total = 0
    handles = []

    def count(module, args, out):
        nonlocal total
        places = out[0, 0].numel() if out.dim() == 4 else 1
        total += 2 * module.weight.numel() * places

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        network(torch.zeros(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return total


def test_train_prints_what_it_would_take_and_writes_nothing(here, clock, modelopt):
    before, state = listing(here), torch.get_rng_state()
    argv = ["train", "one.safetensors", *TRAIN, "--epochs", "6", "--val-fraction", "0.25", "--dry-run"]
    outcome = modelopt(*argv, "--run-dir", "kept", "--tensorboard", "board", "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert listing(here) == before
    assert torch.equal(torch.get_rng_state(), state)
    found = json.loads(outcome.out)
    network = modelopt_cli.load("one.safetensors")
    assert (found["schema_version"], found["output"], found["cache_bytes"]) == (1, None, None)
    assert found["networks"] == [
        {
            "role": "network",
            "name": "one.safetensors",
            "params": sum(p.numel() for p in network.parameters()),
            "flops": convolutions_and_linears(network),
        }
    ]
    held = round(SAMPLES / 4)
    steps = 6 * -(-(SAMPLES - held) // 128)
    assert (found["epochs"], found["steps"], found["seconds"]) == (6, steps, steps)
    assert found["stages"] == [
        {
            "stage": "train",
            "train_samples": SAMPLES - held,
            "val_samples": held,
            "epochs": 6,
            "steps_per_epoch": steps // 6,
            "steps": steps,
            "lr": 0.05,
            "lr_test_seconds": 0.0,
            "timed_steps": 12,
            "seconds_per_step": 1.0,
            "seconds_per_kept_step": None,
            "validation_seconds": 0.0,
            "seconds": steps,
        }
    ]


def test_distill_foresees_all_its_stages_and_a_cache_that_saves_teachers(here, clock, modelopt):
    before = listing(here)
    more = ["--finetune-epochs", "2", "--compare-scratch", "--cache", "logits"]
    outcome = modelopt(*DISTILL, *more, "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert listing(here) == before
    found = json.loads(outcome.out)
    assert [each["role"] for each in found["networks"]] == ["teacher", "student"]
    assert found["networks"][1]["name"] == RESNET
    assert found["cache_bytes"] == SAMPLES * (4 + 10 * 4)  # a checksum and ten logits
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages) == ["distill", "finetune", "scratch"]
    assert [stage["epochs"] for stage in stages.values()] == [5, 2, 7]
    assert [stage["steps"] for stage in stages.values()] == [60, 24, 84]
    # Of its 12 steps an epoch only those of the first ask the teacher.
    assert (stages["distill"]["seconds_per_step"], stages["distill"]["seconds_per_kept_step"]) == (5, 1)
    assert stages["distill"]["seconds"] == 12 * 5 + 48
    assert (stages["finetune"]["seconds"], stages["scratch"]["seconds"]) == (24, 84)
    assert (found["epochs"], found["steps"], found["seconds"]) == (14, 168, 12 * 5 + 48 + 24 + 84)


def test_without_a_cache_every_step_asks_the_teacher(here, clock, modelopt):
    found = json.loads(modelopt(*DISTILL, "--json", "-q").out)
    assert (found["seconds"], found["cache_bytes"]) == (60 * 5, None)


def test_answers_of_every_view_are_counted(here, clock, modelopt):
    more = ["--augment", "cifar", "--augmentation-cycle", "2", "--cache", "logits"]
    found = json.loads(modelopt(*DISTILL, *more, "--json", "-q").out)
    assert found["cache_bytes"] == 2 * SAMPLES * 44
    assert found["seconds"] == 2 * 12 * 5 + 3 * 12


@pytest.mark.slow
def test_answers_that_are_there_are_used_and_stay(here, clock, modelopt):
    argv = [*DISTILL[:-1], "--cache", "logits", "--no-eval", "--epochs", "1", "-q"]
    assert modelopt(*argv).code == 0
    (here / "out.safetensors").unlink()
    shutil.rmtree(here / "out.run")
    before = listing(here)
    found = json.loads(modelopt(*DISTILL, "--cache", "logits", "--json", "-q").out)
    assert found["seconds"] == 60
    assert listing(here) == before
    outcome = modelopt(
        *DISTILL, "--cache", "logits", "--seed", "1", "--augment", "cifar", "--augmentation-cycle", "1"
    )
    assert outcome.code == 2
    assert "holds the logits of another distillation" in outcome.err
    assert listing(here) == before


def test_it_is_told_in_words_too(here, clock, modelopt):
    outcome = modelopt(*DISTILL, "--cache", "logits")
    assert outcome.code == 0
    assert "5 epochs, 60 steps; training would take about 1 min 48 s" in outcome.out
    assert "the teacher's logits would take 63,052 bytes" in outcome.out
    assert "5 s, then 1 s" in outcome.out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00123, "1.23 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (7380, "2 h 3 min"),
    ],
)
def test_a_duration_has_the_digits_that_matter(seconds, text):
    assert duration(seconds) == text


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "distill"])
def test_the_predicted_size_is_that_of_the_file_but_for_digits_of_its_history(verb, here, modelopt):
    argv = [*DISTILL[:-1]] if verb == "distill" else ["train", "one.safetensors", *TRAIN, *OUT]
    argv += ["--epochs", "1", "--val-fraction", "0.1", "--json", "-q"]
    foreseen = json.loads(modelopt(*argv, "--dry-run").out)["predicted_bytes"]
    outcome = json.loads(modelopt(*argv, "--no-eval").out)
    assert 0 <= outcome["output"]["file_bytes"] - foreseen <= 64


def test_what_a_coded_file_will_take_nobody_knows_yet(here, modelopt):
    outcome = modelopt(*DISTILL, "--code", "entropy", "--json", "-q")
    assert json.loads(outcome.out)["predicted_bytes"] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(
            ["--student", "builtin:resnet8?num_classes=7"], "has 10 classes, the student 7", id="classes"
        ),
        pytest.param(["--loss", "hint@layer9"], "'layer9' matches no layer", id="layer"),
        pytest.param(["--lr", "1e30"], "the loss is not a finite number", id="nan"),
        pytest.param(["--cache", "a", "--augment", "cifar"], "every epoch draws new images", id="views"),
        pytest.param(["--cache", "no/where"], "no/where", id="cache"),
        pytest.param(["--export", "t.md"], "--export: has no meaning with --dry-run", id="export"),
        pytest.param(["-o", "one.safetensors"], "one.safetensors", id="output"),
        pytest.param(["--run-dir", "one.safetensors"], "is a name that the run", id="run"),
        pytest.param(["--run-dir", "no/where"], "no/where: cannot be used: No such file", id="place"),
        pytest.param(["--run-dir", "file"], "file: is not a folder", id="file"),
        pytest.param(["--run-dir", "file/x"], "file/x: is not a folder", id="below"),
        pytest.param(["--min-ratio", "1", "--no-eval"], "a gate needs", id="gate"),
    ],
)
def test_what_the_real_command_refuses_is_refused_alike(argv, message, here, modelopt):
    (here / "file").touch()
    before = listing(here)
    outcome = modelopt(*DISTILL, *argv)
    assert message in outcome.err
    assert (outcome.out, listing(here)) == ("", before)
    if "--export" not in argv:
        earnest = modelopt(*(arg for arg in (*DISTILL, *argv) if arg != "--dry-run"))
        assert (earnest.code, earnest.err) == (outcome.code, outcome.err)


def test_a_run_in_the_way_is_found(here, modelopt):
    (here / "out.run").mkdir()
    (here / "out.run" / "metrics.jsonl").write_text("")
    before = listing(here)
    outcome = modelopt(*DISTILL)
    assert outcome.code == 2
    assert "is the log of an earlier run" in outcome.err
    assert modelopt(*DISTILL, "--force").code == 0
    assert listing(here) == before


@pytest.mark.parametrize("verb", ["train", "distill"])
def test_several_processes_are_refused(verb, here, monkeypatch, modelopt):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = DISTILL if verb == "distill" else ["train", "one.safetensors", *TRAIN, "--dry-run"]
    outcome = modelopt(*argv)
    assert outcome.code == 2
    assert "--dry-run: times a single process; run it without torchrun" in outcome.err
