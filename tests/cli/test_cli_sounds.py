"""Sounds from the shell: a network of Conv1d layers is quantized and judged on a folder of class folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

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
