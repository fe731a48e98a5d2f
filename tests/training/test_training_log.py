import json
import sys
from pathlib import Path
from typing import Any

import pytest

from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.training.log import MetricsLog


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def places(path: Path) -> list[tuple[str, int]]:
    return [(line["stage"], line["epoch"]) for line in lines(path)]


def test_a_line_is_one_object_in_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.add("train", 1, 469, loss=0.1, lr=0.05, val_top1=None)
    log.add("train", 2, 938, loss=float("nan"), lr=float("inf"))
    assert lines(tmp_path / "m.jsonl") == [
        {"stage": "train", "epoch": 1, "step": 469, "loss": 0.1, "lr": 0.05, "val_top1": None},
        {"stage": "train", "epoch": 2, "step": 938, "loss": None, "lr": None},
    ]


def test_a_resumed_run_reads_as_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.rewind("a", 0)
    for stage, epochs in (("a", 2), ("b", 3)):
        for epoch in range(epochs):
            log.add(stage, epoch + 1, 10 * epoch, loss=1.0)
    MetricsLog(path).rewind("b", 1)
    assert places(path) == [("a", 1), ("a", 2), ("b", 1)]
    MetricsLog(path).rewind("b", 1)
    log.add("b", 2, 20, loss=0.5)
    assert places(path) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    MetricsLog(path).rewind("a", 0)
    assert places(path) == []


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.add("a", 1, 1, loss=1.0)
    whole = path.read_bytes()
    for length in (1, 9, len(whole) - 2, len(whole) - 1, len(whole)):
        path.write_bytes(whole + whole[:length].replace(b"\n", b""))
        log.rewind("a", 5)
        assert path.read_bytes() == whole


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None)
    log.rewind("a", 0)
    log.add("a", 1, 1, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="cannot be written"):
        MetricsLog(tmp_path / "missing" / "m.jsonl").add("a", 1, 1)


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path / "m.jsonl", board=tmp_path / "board")
    log.add("train", 1, 100, loss=0.5, val_top1=None)
    log.add("train", 2, 200, loss=0.25, val_top1=91.5)
    log.close()
    stored = events.EventAccumulator(str(tmp_path / "board"))
    stored.Reload()
    assert set(stored.Tags()["scalars"]) == {"train/loss", "train/val_top1"}
    assert [(e.step, e.value) for e in stored.Scalars("train/loss")] == [(100, 0.5), (200, 0.25)]
    assert [(e.step, e.value) for e in stored.Scalars("train/val_top1")] == [(200, 91.5)]


def test_tensorboard_writes_nothing_before_the_first_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    MetricsLog(None, board=tmp_path / "a" / "board").close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailure, match=r"cannot be written: Not a directory"):
        MetricsLog(None, board=tmp_path / "file" / "board")


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'modelopt-cli\[track\]'"):
        MetricsLog(tmp_path / "m.jsonl", board=tmp_path / "board")
