"""Opening of networks that takes long: one line says that it goes on, and none where it is quick."""

import time
from pathlib import Path

import pytest
import torch

from modelopt_cli.api import opening
from modelopt_cli.api.opening import ModelFile, told_if_slow

NET = "builtin:lenet5?width=0.2"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from modelopt_cli.checkpoint import resolve

    torch.save(resolve(NET).build().state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth"


def test_a_network_that_takes_long_is_told_of_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = opening.open_model

    def slow(*args: object) -> object:
        time.sleep(0.2)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "open_model", slow)
    monkeypatch.setattr(opening, "PATIENCE", 0.01)
    notes: list[str] = []
    ModelFile.of(checkpoint).open(NET, None, notes.append)
    (told,) = (note for note in notes if "takes a while" in note)
    assert told.startswith(f"opening {checkpoint} takes a while: its network is followed as a whole")


def test_nothing_is_told_of_what_is_quick_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "PATIENCE", 0.05)
    notes: list[str] = []
    with told_if_slow("opening it", notes.append):
        pass
    with pytest.raises(ValueError, match="broken"), told_if_slow("opening it", notes.append):
        raise ValueError("broken")
    time.sleep(0.1)
    assert notes == []
