"""Sounds for networks of which nobody says whether they take a row of samples or one channel of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modelopt_cli as mo
from modelopt_cli.api.opening import known_input
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.program import InputSpec

soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile is not installed")

NETWORKS = """
from torch import nn

def channel():
    return nn.Sequential(nn.Conv1d(1, 4, 9), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
                         nn.Flatten(), nn.Linear(4, 2))

def plain():  # which takes a batch of one row for one sound of one channel
    return nn.Sequential(nn.Conv1d(1, 2, 9), nn.AdaptiveAvgPool1d(1))

def row():
    return nn.Sequential(nn.Unflatten(1, (1, -1)), channel())

def either():
    return nn.Sequential(nn.Linear(80, 2))

def longer():
    return nn.Sequential(nn.Conv1d(1, 4, 90), nn.Flatten(), nn.Linear(4, 2))

class Two(nn.Module):
    def forward(self, x, lengths):
        return x

two = Two
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORKS)
    noise = np.random.default_rng(0)
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        Path(name).parent.mkdir(exist_ok=True)
        soundfile.write(f"{name}.wav", noise.uniform(-0.5, 0.5, 80 if "a" in name else 70), 8000)
    return tmp_path


@pytest.mark.parametrize(
    ("network", "shape"),
    [("channel", (1, 80)), ("plain", (1, 80)), ("row", (80,)), ("either", (80,)), ("two", (80,))],
)
def test_the_shape_is_the_one_on_which_the_network_runs(network: str, shape: tuple[int, ...]) -> None:
    known = known_input([], f"nets.py:{network}", "wav:.", None)
    assert known is not None
    assert known.shape == shape


def test_a_shape_that_is_given_counts() -> None:
    given = PreprocessOverrides(sample=InputSpec((1, 50)))
    assert known_input([], "nets.py:row", "wav:.", given) == given.sample


def test_a_network_that_runs_on_neither_is_told_what_to_say() -> None:
    with pytest.raises(ArchitectureError) as error:
        known_input([], "nets.py:longer", "wav:.", None)
    assert "neither of shape (80,) nor of (1, 80): Calculated padded input size" in error.value.message
    assert error.value.hint is not None
    assert "input_shape='1x80', or ?length=N" in error.value.hint
    known = known_input([], "nets.py:longer", "wav:.?length=90", None)
    assert known is not None
    assert known.shape == (1, 90)


def test_a_network_in_memory_gets_channels_too() -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taps = nn.Parameter(torch.ones(2, 1, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv1d(x, self.taps).mean(2)

    evaluated = mo.evaluate(Loud(), data="wav:.", latency_runs=0)
    macs = evaluated.models[0].macs
    assert macs is not None
    assert macs.total == 2 * 5 * 76
