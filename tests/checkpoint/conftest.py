import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modelopt_cli.checkpoint import read_state
from modelopt_cli.checkpoint.builtin import LeNet300
from modelopt_cli.errors import CheckpointError


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(LeNet300(width=0.05).state_dict())


@pytest.fixture
def refusal() -> Callable[[Path], str]:
    """The one line with which a file is refused; anything but a CheckpointError fails the test."""

    def read(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            read_state(path)
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(str(path))
        assert line.isprintable()
        return line

    return read


class RunsCode:
    """Its pickle creates a file when it is loaded without ``weights_only``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def payload(tmp_path: Path) -> RunsCode:
    return RunsCode(tmp_path / "it-ran")
