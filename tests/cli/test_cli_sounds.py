"""Sounds from the shell: a network of Conv1d layers is quantized and judged on a folder of class folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import modelopt_cli as mo
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture

soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile is not installed")

NET = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv1d(1, 8, 16, 4), nn.ReLU(), nn.Conv1d(8, 8, 5), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2),
    )
"""
RUN = ("--arch", "net.py:make", "--input-shape", "1x400", "--latency-runs", "0", "-q", "--json")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Low tones and high ones, and a network of random weights."""
    monkeypatch.chdir(tmp_path)
    for name, tone in (("low", 200), ("high", 1500)):
        (tmp_path / "tones" / name).mkdir(parents=True)
        for number in range(8):
            times = np.arange(300 + 40 * number) / 8000
            samples = 0.5 * np.sin(2 * np.pi * (tone + 5 * number) * times)
            soundfile.write(tmp_path / "tones" / name / f"{number}.wav", samples, 8000)
    (tmp_path / "net.py").write_text(NET)
    scope: dict[str, Callable[[], nn.Module]] = {}
    exec(NET, scope)  # noqa: S102 -- our own text
    torch.manual_seed(0)
    torch.save(scope["make"]().state_dict(), tmp_path / "net.pth")
    return tmp_path


def test_a_network_of_sounds(there: Path, modelopt: Callable[..., Any]) -> None:
    made = modelopt("quantize", "net.pth", *RUN, "--data", "wav:tones", "-o", "q.safetensors")
    assert made.code == 0, made.err
    before, after = json.loads(made.out)["evaluation"]["models"]
    assert before["samples"] == 16
    assert min(after["fidelity"]["snr_db"].values()) > 25
    again = modelopt("eval", "q.safetensors", "--latency-runs", "0", "-q", "--json", "--data", "wav:tones")
    assert json.loads(again.out)["models"][0]["metrics"] == after["metrics"]


def test_another_rate_is_refused(there: Path, modelopt: Callable[..., Any]) -> None:
    soundfile.write(there / "tones" / "low" / "9.wav", np.zeros(400), 11025)
    done = modelopt("quantize", "net.pth", *RUN, "--data", "wav:tones", "-o", "q.safetensors")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "sounds of 8000 and 11025 samples a second" in done.err
    assert not (there / "q.safetensors").exists()


class Spelling(nn.Module):
    """A class for each frame of 40 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 8, 40, 40), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(x[:, None]).movedim(1, 2))


def test_transcripts_are_learned_by_the_names_of_the_network_s_classes(
    there: Path, modelopt: Callable[..., Any]
) -> None:
    program = capture(Spelling().eval(), InputSpec((400,)), labels=("_", "a", "b"))
    mo.save(program, there / "spelling.safetensors")
    texts = (("low", "ab"), ("high", "b"))
    rows = [f"tones/{name}/{number}.wav,{text}" for name, text in texts for number in range(4)]
    (there / "texts.csv").write_text("\n".join(["path,text", *rows]))
    data = ["--train", "wav:texts.csv", "--val-fraction", "0.25", "--data", "wav:texts.csv"]
    how = ["--epochs", "1", "--latency-runs", "0", "-q", "-o", "out.safetensors"]
    words = ["train", "spelling.safetensors", "--task", "sequence", *data, *how]
    done = modelopt(*words)
    assert done.code == 0, done.err
    assert mo.load("out.safetensors").labels == ("_", "a", "b")
    (there / "texts.csv").write_text(
        "\n".join(["path,text", *(row.split(",")[0] + ",abababababa" for row in rows)])
    )
    done = modelopt(*words, "--force")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "target of 11 symbols needs 11 frames, the network gives 10" in done.err
