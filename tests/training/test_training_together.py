"""``fit`` in two processes gives what it gives in one, up to rounding."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from together_worker import TRAINING, trained
from training_helpers import Watcher, differing

from modelopt_cli.training.state import read_state


def test_two_processes_fit_as_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    worker = str(Path(__file__).parent / "together_worker.py")
    done = subprocess.run(
        [*torchrun, worker, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    alone = trained(TRAINING, Watcher())
    through, resumed = read_state(tmp_path / "through"), read_state(tmp_path / "resumed")
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(
            through.tensors[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert through.about["best"] == alone.about["best"]
    assert through.about["loss"] == pytest.approx(alone.about["loss"], rel=1e-4)
    # One alone was told to stop. Both did when they next looked, at the epoch's end, and then went on.
    assert through.about["stopped"] == [6, 6]
    assert not differing(resumed.tensors, through.tensors)
    assert re.search(r"not a finite number at step \d+ of 12", through.about["diverged"])
