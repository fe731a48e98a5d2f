"""``fit`` in two processes gives what it gives in one, up to rounding."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from together_worker import STEEP, TRAINING, recovered, trained
from torch import Tensor
from training_helpers import Watcher, differing

from modelopt_cli.training.state import read_state


@pytest.mark.slow
def test_two_processes_fit_as_one(tmp_path: Path, torchrun: Callable[..., Any]) -> None:
    done = torchrun(Path(__file__).parent / "together_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr
    alone = trained(TRAINING, Watcher())
    through, resumed = read_state(tmp_path / "through"), read_state(tmp_path / "resumed")
    check_close(through.tensors, alone.tensors)
    assert through.about["best"] == alone.about["best"]
    assert through.about["loss"] == pytest.approx(alone.about["loss"], rel=1e-4)
    # One alone was told to stop. Both did when they next looked, at the epoch's end, and then went on.
    assert through.about["stopped"] == [6, 6]
    assert not differing(resumed.tensors, through.tensors)
    assert re.search(r"not a finite number at step \d+ of 12", through.about["diverged"])
    # Both found the same rate, diverged and went back to the same step.
    back, alone = read_state(tmp_path / "recovered"), recovered()
    check_close(back.tensors, alone.tensors)
    assert (back.about["lr"], back.about["returns"]) == (alone.about["lr"], alone.about["returns"])
    assert back.about["returns"] > 0
    assert back.about["lr"] < STEEP.config.peak_lr / 4 ** back.about["returns"]


def check_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
