"""Networks of all kinds from the shell: trained, compressed by every verb, and read without their source."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelopt_cli
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import call
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.program.samples import noise

NETWORKS = """
import torch
from torch import nn


def block(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = block(3, 8), block(8, 16), block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2, self.merge1 = block(32, 16), block(16, 8)
        self.head = nn.Conv2d(8, 3, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.middle(self.pool(b))
        b = self.merge2(torch.cat([self.up2(c), b], 1))
        a = self.merge1(torch.cat([self.up1(b), a], 1))
        return self.head(a)


class KeywordSpotter(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 16, 9, stride=4), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Conv1d(16, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(4),
            nn.Conv1d(32, 32, 3, padding=1, groups=4), nn.BatchNorm1d(32), nn.ReLU(),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, sound):
        return self.head(self.features(sound).mean(2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, steps):
        states, last = self.gru(steps)
        return self.head(states[:, -1])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.numbers = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, image, numbers):
        return self.head(torch.cat([self.image(image), self.numbers(numbers)], 1))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.hidden = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.classes, self.depth = nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x):
        y = self.hidden(self.trunk(x))
        return {"depth": self.depth(y), "logits": self.classes(y)}
"""

DATA = """
import torch


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(seed=0):
    return [(x, x.argmax(0)) for x in drawn(48, 3, 16, 16, seed=seed)]


def sounds(seed=0):
    time, noise = torch.arange(400) / 400, drawn(48, 400, seed=seed)
    tones = [torch.sin(torch.pi * (16 + 16 * (i % 4)) * time) for i in range(48)]
    return [((tone + 0.3 * each)[None], i % 4) for i, (tone, each) in enumerate(zip(tones, noise))]


def steps(seed=0):
    return [(x, int(x[-1, :3].argmax())) for x in drawn(48, 10, 6, seed=seed)]


def pairs(seed=0):
    images, numbers = drawn(48, 1, 8, 8, seed=seed), drawn(48, 4, seed=seed + 9)
    named = [{"image": a, "numbers": b} for a, b in zip(images, numbers)]
    return [(x, torch.stack([3 * x["image"].mean(), x["numbers"][0] - x["numbers"][1]])) for x in named]


def several(seed=0):
    return [(x, (x.mean((1, 2)) > 0).long()) for x in drawn(48, 3, 8, 8, seed=seed)]


def others(make):
    return lambda: make(1)


masks2, sounds2, steps2, pairs2, several2 = map(others, (masks, sounds, steps, pairs, several))
"""

CASES = {
    "U-Net": ("UNet", "masks", "segment", "miou", "ce:0.1+kd:0.9"),
    "Conv1d": ("KeywordSpotter", "sounds", "classify", "top1", "ce:0.1+kd:0.9"),
    "GRU": ("Recurrent", "steps", "classify", "top1", "ce:0.1+kd:0.9"),
    "two inputs": ("TwoInputs", "pairs", "regress?loss=huber", "mae", "ce:0.1+mse:0.9"),
    "a dict": ("Several", "several", "multilabel", "map", "ce:0.1+kd:0.9"),
}
"""Class, data, task, main metric and a loss of distillation."""
Run = Callable[..., Any]
FEW = ("--epochs", "2", "--batch-size", "16", "--optimizer", "adamw", "--lr", "0.01")
ELSEWHERE = """
import sys, torch, modelopt_cli
from modelopt_cli.program.input_batch import call
from modelopt_cli.program.output_structure import flatten
inputs = torch.load(sys.argv[1])
for path in sys.argv[2:]:
    with torch.inference_mode():
        outputs = flatten(call(modelopt_cli.load(path), inputs))
    torch.save({name: each.clone() for name, each in outputs.items()}, path + ".pt")
assert "net" not in sys.modules and "data" not in sys.modules
"""


class Shell:
    """Commands on one network."""

    def __init__(self, modelopt: Run, case: tuple[str, ...]) -> None:
        self._modelopt = modelopt
        self.network, self.data, self.task, self.metric, self.loss = case
        self.train = ("--train", f"data.py:{self.data}", *FEW)
        self.calibration = ("--calibration", f"data.py:{self.data}2")

    def __call__(self, verb: str, source: str, output: str, *words: str) -> dict[str, Any]:
        """What a verb says of the file that it makes, measured on the data."""
        found = self._modelopt(
            *(verb, *([source] if source else []), "--data", f"data.py:{self.data}", "-o", output),
            *("--latency-runs", "0", "--json", "-q", *words),
        )
        assert found.code == 0, found.err
        said: dict[str, Any] = json.loads(found.out)
        model = said["evaluation"]["models"][-1]
        assert self.metric in model["metrics"]
        assert model["metrics"][self.metric] is not None
        if said["evaluation"]["comparisons"]:
            assert model["fidelity"]["snr_db"].keys() == model["fidelity"]["cosine"].keys()
        return said


def read_elsewhere(folder: Path, inputs: Any, files: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs of files in a process that has neither the network's source nor the data's."""
    folder.mkdir()
    for file in files:
        os.link(file, folder / file)
    torch.save(inputs, folder / "inputs.pt")
    paths = os.pathsep.join(path for path in sys.path if path and Path(path).resolve() != Path.cwd())
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, "inputs.pt", *files]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return {file: torch.load(folder / f"{file}.pt") for file in files}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_every_verb_on_every_kind_of_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modelopt: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORKS)
    (tmp_path / "data.py").write_text(DATA)
    shell = Shell(modelopt, CASES[name])
    arch = f"net.py:{shell.network}"
    shell("train", "", "net.safetensors", "--arch", arch, "--task", shell.task, *shell.train, "--epochs", "6")
    source = "net.safetensors"
    said = shell("quantize", source, "int8.safetensors", *shell.calibration)
    assert said["evaluation"]["models"][-1]["coverage"] > 0
    channels = ("--structure", "channels", "--sparsity", "0.25")
    shell("prune", source, "pruned.safetensors", *channels, *shell.train, "--teacher", "self")
    taylor = ("--criterion", "taylor", *shell.calibration)
    shell("prune", source, "taylor.safetensors", *channels, *taylor)
    shell("share", source, "shared.safetensors", "--bits", "4", *shell.train)
    fisher = ("--bits", "4", "--weighting", "fisher", *shell.calibration)
    shell("share", source, "fisher.safetensors", *fisher)
    shell("share", source, "auto.safetensors", "--bits", "auto", "--ratio", "4", *shell.calibration)
    learning = ("--loss", shell.loss, "--cache", "kept", "--augmentation-cycle", "1", *shell.train)
    shell("distill", source, "same.safetensors", "--student", arch, *learning)
    shell("distill", source, "half.safetensors", "--student", "width:0.5", "--loss", "ce+rkd", *shell.train)
    shell(
        "distill",
        source,
        "tuned.safetensors",
        "--student",
        "int8.safetensors",
        "--loss",
        shell.loss,
        *shell.train,
    )

    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == 10
    networks: dict[str, Program] = {file: modelopt_cli.load(file) for file in files}
    inputs = noise(networks[source].input, 5, seed=0)
    elsewhere = read_elsewhere(tmp_path / "elsewhere", inputs, files)
    for file, network in networks.items():
        with torch.inference_mode():
            here = flatten(call(network, inputs))
        assert here.keys() == elsewhere[file].keys()
        for output, tensor in here.items():
            assert torch.equal(tensor, elsewhere[file][output])
    found = modelopt("eval", *files, "--data", f"data.py:{shell.data}", "--latency-runs", "0", "--json", "-q")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert said["task"] == f"{shell.task} (recorded)" if shell.task != "classify" else True
    for model in said["models"]:
        assert set(said["models"][0]["metrics"]) == set(model["metrics"])
        assert model["fidelity"] is None if model is said["models"][0] else model["fidelity"]["snr_db"]
