"""``modelopt distill`` with an int8 student: what it writes and prints, how it is interrupted and goes on."""

import json
from pathlib import Path

import pytest
import torch
from folder_contents import digest

import modelopt_cli
from modelopt_cli.artifact import write_program
from modelopt_cli.data import open_data
from modelopt_cli.kernels import never_saturates
from modelopt_cli.program.quantized import Weighted

TRAIN = ["--train", "digits?split=train", "--epochs", "2", "--finetune-epochs", "1"]
QUICK = ["--data", "digits", "--latency-runs", "0"]
OUT = ["-o", "out.safetensors"]


@pytest.fixture(scope="module")
def files(good_files, tmp_path_factory):
    """A trained network, its int8 form, and that with noise on its weights."""
    from modelopt_cli.cli.main import main

    folder = tmp_path_factory.mktemp("files")
    teacher, int8 = folder / "net.safetensors", folder / "int8.safetensors"
    arch = ["--arch", f"{good_files / 'net.py'}:make", "--input-size", "8", "--channels", "1"]
    data, quiet = ["--train", "digits?split=train"], ["--no-eval", "-q"]
    assert main(["train", *arch, *data, "--lr", "0.05", "--epochs", "8", *quiet, "-o", str(teacher)]) == 0
    assert main(["quantize", str(teacher), "--calibration", data[1], *quiet, "-o", str(int8)]) == 0
    program = modelopt_cli.load(int8)
    generator = torch.Generator().manual_seed(0)
    for layer in program.modules():
        if isinstance(layer, Weighted):
            noise = 20 * torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_((layer.weight + noise).round().clamp(-64, 64))
    write_program(program, folder / "student.safetensors")
    return folder


@pytest.fixture
def here(files, enter):
    """A copy of the files as the current directory."""
    return enter(files)


COMMAND = ["distill", "net.safetensors", "--student", "student.safetensors", *TRAIN]


def top1(name: str) -> float:
    program = modelopt_cli.load(name)
    images, labels = next(iter(open_data("digits", input_spec=program.input).batches(1000)))
    with torch.inference_mode():
        return 100 * float((program(images).argmax(1) == labels).float().mean())


def require_int8(name: str) -> None:
    program, given = modelopt_cli.load(name), modelopt_cli.load("student.safetensors")
    layers = [layer for layer in program.modules() if isinstance(layer, Weighted)]
    assert len(layers) == 3
    assert all(never_saturates(layer.weight) for layer in layers)
    assert program.history[:-1] == given.history
    assert program.state_dict().keys() == given.state_dict().keys()
    assert Path(name).stat().st_size < Path("student.safetensors").stat().st_size + 2000


@pytest.mark.slow
def test_an_int8_student_gets_better_and_stays_int8(here, modelopt):
    outcome = modelopt(*COMMAND, *QUICK, "--json", "-q", *OUT)
    assert outcome.code == 0, outcome.err
    teacher, student = json.loads(outcome.out)["evaluation"]["models"]
    assert (teacher["coverage"], student["coverage"]) == (0, 1)
    assert student["top1"] > top1("student.safetensors") + 10
    require_int8("out.safetensors")


@pytest.mark.slow
def test_without_a_teacher_it_stays_int8_too(here, modelopt):
    outcome = modelopt(*COMMAND, "--no-eval", "--compare-scratch", *OUT)
    assert outcome.code == 0, outcome.err
    require_int8("out-scratch.safetensors")
    assert top1("out-scratch.safetensors") > top1("student.safetensors") + 10


@pytest.mark.slow
def test_interrupted_and_resumed_to_the_same_bytes(here, modelopt, monkeypatch):
    from modelopt_cli.training.learner import Learner

    assert modelopt(*COMMAND, "--no-eval", "-o", "through.safetensors").code == 0
    step, seen = Learner.step, []

    def stopping(self, batch, number, rate):
        if len(seen) == 16:
            raise KeyboardInterrupt
        seen.append(number)
        step(self, batch, number, rate)

    monkeypatch.setattr(Learner, "step", stopping)
    assert modelopt(*COMMAND, "--no-eval", *OUT).code == 130
    monkeypatch.setattr(Learner, "step", step)
    assert (here / "out.run" / "state.safetensors").exists()
    resumed = modelopt(*COMMAND, "--no-eval", *OUT, "--resume")
    assert resumed.code == 0, resumed.err
    assert digest(here / "out.safetensors") == digest(here / "through.safetensors")
