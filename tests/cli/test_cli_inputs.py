"""A network of two inputs that returns a dictionary, through every command, with data of the user's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NET = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 12, 3, padding=1)
        self.side, self.out = nn.Linear(7, 12), nn.Linear(24, 4)

    def forward(self, image, meta):
        features = self.deep(self.norm(self.conv(image)).relu()).relu()
        both = torch.cat([features.mean((2, 3)), self.side(meta).relu()], 1)
        return {"logits": self.out(both), "features": features}

def make():
    torch.manual_seed(0)
    return Two()
"""
DATA = """
import torch

class Samples(torch.utils.data.Dataset):
    def __init__(self, n):
        draw = torch.Generator().manual_seed(n)
        self.labels = torch.arange(n) % 4
        self.images = torch.randn(n, 3, 8, 8, generator=draw) / 4
        self.metas = torch.randn(n, 7, generator=draw) / 4
        for place, label in enumerate(self.labels):
            self.metas[place, label] += 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs(self.images[index], self.metas[index]), int(self.labels[index])

class ByName(Samples):
    def inputs(self, image, meta):
        return {"meta": meta, "image": image}

class ByPlace(Samples):
    def inputs(self, image, meta):
        return image, meta

def named(n=64):
    return ByName(n)

def placed(n=64):
    return ByPlace(n)
"""
ARCH = ["--arch", "net.py:make"]
BRIEF = ["--latency-runs", "0", "--json"]
AGAIN = """
import sys
import torch
import modelopt_cli

program = modelopt_cli.load(sys.argv[1])
assert [each.name for each in program.input.tensors] == ["image", "meta"]
for batch in (1, 5):
    found = program(torch.zeros(batch, 3, 8, 8), meta=torch.zeros(batch, 7))
    assert list(found) == ["logits", "features"]
    assert found["logits"].shape == (batch, 4)
    assert found["features"].shape == (batch, 12, 8, 8)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("net.py").write_text(NET)
    Path("data.py").write_text(DATA)
    scope = {}
    exec(compile(NET, "net.py", "exec"), scope)  # noqa: S102 -- our own text
    torch.save(scope["make"]().state_dict(), "net.pth")
    return tmp_path


COMMANDS = {
    "quantize": ["--data", "data.py:named", "--calibration", "data.py:placed?n=32"],
    "prune": ["--flops", "0.5", "--data", "data.py:named"],
    "share": ["--bits", "4", "--data", "data.py:placed", "--calibration", "data.py:named?n=32"],
    "distill": [
        "--student",
        "net.py:make",
        "--train",
        "data.py:named",
        "--epochs",
        "1",
        "--data",
        "data.py:placed",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_and_returns_what_the_network_does(command, here, modelopt):
    outcome = modelopt(command, "net.pth", *ARCH, *COMMANDS[command], *BRIEF, "-o", "small.safetensors")
    assert outcome.code == 0, outcome.err
    models = json.loads(outcome.out)["evaluation"]["models"]
    assert [model["samples"] for model in models] == [64, 64]
    Path("net.py").unlink()  # the file is enough
    ran = subprocess.run(
        [sys.executable, "-c", AGAIN, "small.safetensors"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_models_of_several_inputs_are_evaluated_side_by_side(here, modelopt):
    given = [*ARCH, "--input-shape", "image=3x8x8", "--input-shape", "meta=7", "--no-eval"]
    assert modelopt("share", "net.pth", *given, "--bits", "8", "-o", "a.safetensors").code == 0
    outcome = modelopt("eval", "net.pth", "a.safetensors", *ARCH, "--data", "data.py:named", *BRIEF)
    assert outcome.code == 0, outcome.err
    first, second = json.loads(outcome.out)["models"]
    assert first["samples"] == second["samples"] == 64
    assert first["macs"] == second["macs"] > 0


def test_layers_and_latency_of_several_inputs(here, modelopt):
    shapes = ["--input-shape", "image=3x8x8,meta=7"]
    outcome = modelopt("inspect", "net.pth", "--layers", *ARCH, *shapes, "--json")
    assert outcome.code == 0, outcome.err
    macs = {each["name"]: each["macs"] for each in json.loads(outcome.out)["layers"]}
    assert (macs["conv"], macs["deep"], macs["side"]) == (64 * 27 * 8, 64 * 72 * 12, 7 * 12)
    outcome = modelopt("eval", "net.pth", *ARCH, *shapes, "--latency-runs", "2", "--latency-warmup", "1")
    assert outcome.code == 0, outcome.err
    assert "image 3x8x8, meta 7" in outcome.out


REFUSED = {
    "one-shape": (["--input-shape", "3x8x8"], "needs 2 inputs (image, meta), and 1 is described"),
    "unknown-name": (
        ["--input-shape", "image=3x8x8,mete=7"],
        "the network has no input 'mete'; did you mean 'meta'",
    ),
    "other-shape": (["--input-shape", "image=3x8x8,meta=6"], "cannot process inputs of shapes"),
}


def test_data_that_name_an_input_that_the_network_does_not_have(here, modelopt):
    (here / "wrong.py").write_text(
        "import data\n"
        "class Wrong(data.Samples):\n"
        "    def inputs(self, image, meta):\n"
        "        return {'image': image, 'mete': meta}\n"
        "def load():\n"
        "    return Wrong(8)\n"
    )
    outcome = modelopt("quantize", "net.pth", *ARCH, "--data", "wrong.py:load", "-o", "o.safetensors")
    assert outcome.code == 2
    assert (
        "the network has no input 'mete'; did you mean 'meta'?; forward takes image, meta: name"
        in outcome.err
    )
    assert "scheme" not in outcome.err
    assert not (here / "o.safetensors").exists()


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(case, here, modelopt):
    given, part = case
    outcome = modelopt(
        "prune", "net.pth", *ARCH, *given, "--flops", "0.5", "--no-eval", "-o", "o.safetensors"
    )
    assert outcome.code == 2
    assert part in outcome.err
    assert not Path("o.safetensors").exists()


def test_data_of_other_inputs_are_refused(here, modelopt):
    shapes = ["--input-shape", "image=3x8x8,meta=7"]
    Path("one.py").write_text("import torch\ndef load():\n    return [(torch.zeros(3, 8, 8), 0)] * 4\n")
    outcome = modelopt("quantize", "net.pth", *ARCH, *shapes, "--calibration", "one.py:load", "--no-eval")
    assert outcome.code == 2
    assert "one.py:load sample 0: has 1 input, where the network takes 2 inputs: image, meta" in outcome.err
