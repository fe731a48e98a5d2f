"""The picture of a training: what is in it, and the same bytes for the same log."""

import json
import re
import sys
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from modelopt_cli.errors import ArtifactError, EnvironmentFailure, OutputError, UsageError
from modelopt_cli.report.curves import courses, draw_curve
from modelopt_cli.training.log import MetricsLog, read_metrics

Line = tuple[str, int, float | None, float | None]
DISTILLED: list[Line] = [
    ("distill", 1, 2.0, 40.0),
    ("distill", 2, 1.0, 50.0),
    ("distill", 3, None, 60.0),
    ("finetune", 1, 0.5, 70.0),
    ("finetune", 2, 0.4, 75.0),
    ("scratch", 1, 2.5, 30.0),
    ("scratch", 2, 2.4, 35.0),
    ("scratch", 3, 2.3, None),
    ("scratch", 4, 2.2, 37.0),
]


def log_of(folder: Path, lines: list[Line]) -> Path:
    log = MetricsLog(folder / "metrics.jsonl")
    for stage, epoch, loss, accuracy in lines:
        log.add(stage, epoch, 10 * epoch, loss=loss, lr=0.1, val_top1=accuracy)
    return folder / "metrics.jsonl"


def texts(svg: Path) -> list[str]:
    """What is written in it; letters are drawn, and named in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def points(svg: Path) -> list[int]:
    """How many there are of each colour, in all panels and the legend."""
    colours = re.findall(r'<use [^>]*style="fill: (#\w+); stroke: \1"', svg.read_text())
    return [colours.count(colour) for colour in dict.fromkeys(colours)]


def test_stages_follow_each_other_and_the_comparison_starts_at_the_left(tmp_path: Path) -> None:
    found = courses(read_metrics(log_of(tmp_path, DISTILLED)), overlaid=["scratch"])
    assert [(course.stage, course.epochs) for course in found] == [
        ("distill", [1, 2, 3]),
        ("finetune", [4, 5]),
        ("scratch", [1, 2, 3, 4]),
    ]
    assert found[0].figures["loss"][:2] == [2.0, 1.0]
    assert isnan(found[0].figures["loss"][2])
    assert found[2].figures["val_top1"][:2] == [30.0, 35.0]
    assert [course.epochs for course in courses(read_metrics(tmp_path / "metrics.jsonl"))][2] == [6, 7, 8, 9]


def test_one_that_is_compared_does_not_move_those_after_it(tmp_path: Path) -> None:
    places = (("a", 1), ("scratch", 1), ("scratch", 2), ("b", 1))
    metrics = [{"stage": stage, "epoch": epoch} for stage, epoch in places]
    assert [course.epochs for course in courses(metrics, ["scratch"])] == [[1], [1, 2], [2]]


def test_both_panels_have_every_stage_and_say_what_they_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.svg"
    draw_curve(log_of(tmp_path, DISTILLED), path, overlaid=["scratch"])
    found = texts(path)
    for text in ("epochs", "training loss,", "validation accuracy,", "top-1 (%)"):
        assert found.count(text) == 1
    assert found[-3:] == ["distill", "finetune", "scratch"]
    assert points(path) == [2 + 3 + 1, 2 + 2 + 1, 4 + 3 + 1]  # loss, accuracy, legend


def test_without_validation_there_is_one_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.svg"
    draw_curve(log_of(tmp_path, [("train", 1, 2.0, None), ("train", 2, 1.0, None)]), path)
    found = texts(path)
    assert "training loss," in found
    assert "validation accuracy," not in found
    assert found[-1] == "train"
    assert points(path) == [2 + 1]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_the_same_log_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = log_of(tmp_path, DISTILLED)
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for path in paths:
        draw_curve(log, path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix.lower()])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "finetune", "epoch": 3, "loss": 0.3}) + "\n")
    draw_curve(log, paths[0], force=True)
    assert paths[0].read_bytes() != second


def test_what_exists_is_replaced_only_with_force(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, path = log_of(tmp_path, DISTILLED), tmp_path / "curve.png"
    path.write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        draw_curve(log, path)
    assert path.read_text() == "mine"
    draw_curve(log, path, force=True)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(tmp_path, DISTILLED)
    with pytest.raises(UsageError, match="no picture's name"):
        draw_curve(log, tmp_path / "curve.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(EnvironmentFailure, match=r"modelopt-cli\[plots\]"):
        draw_curve(log, tmp_path / "curve.png")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"stage": "train"}', '{"stage": 1, "epoch": 1}', '{"stage": "a", "epoch": "1"}']
)
def test_a_log_that_is_none_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl"):
        read_metrics(path)
    with pytest.raises(EnvironmentFailure, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = read_metrics(log_of(tmp_path, DISTILLED[:1]))
    assert found == [
        {"stage": "distill", "epoch": 1, "step": 10, "loss": 2.0, "lr": 0.1, "val_top1": 40.0},
    ]
