"""distill from Python with a cache of logits: files, identities, and the command's own refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modelopt_cli import api
from modelopt_cli.checkpoint import resolve
from modelopt_cli.cli.main import main
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvalOptions
from modelopt_cli.methods.distill.cache_identity import PROBED
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.teacher import Teacher
from modelopt_cli.training import TrainConfig

LENET = "builtin:lenet5?width=0.3"
TRAINING = api.TrainingRequest("digits", config=TrainConfig(epochs=2, lr=0.05, val_fraction=0.1))


def teacher(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(resolve(LENET).build().state_dict(), path)
    return path


def distilled(source: Path, output: Path, cache: Path | None, **changes: object) -> bytes:
    api.distill(
        source,
        output,
        arch=LENET,
        **{
            "student": api.Student("builtin:lenet5?width=0.1", cache=cache),
            "training": TRAINING,
            "options": EvalOptions(threads=1),
            "evaluate": False,
            **changes,
        },
    )
    return output.read_bytes()


@pytest.mark.slow
def test_the_same_file_with_and_without_and_no_teacher_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, notes = teacher(tmp_path / "net.pth", 0), []
    plain = distilled(source, tmp_path / "plain", None)
    assert distilled(source, tmp_path / "first", tmp_path / "logits", on_note=notes.append) == plain
    assert any("logits take" in note for note in notes)
    call = Teacher.__call__

    def silent(self, images):
        assert len(images) == PROBED  # the form of its outputs
        return call(self, images)

    monkeypatch.setattr(Teacher, "__call__", silent)
    assert distilled(source, tmp_path / "second", tmp_path / "logits") == plain
    other = api.Student("builtin:lenet5?width=0.2", cache=tmp_path / "logits")
    assert distilled(source, tmp_path / "other", None, student=other) != plain


@pytest.mark.slow
def test_another_teacher_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    distilled(teacher(tmp_path / "net.pth", 0), tmp_path / "first", tmp_path / "logits")
    other = teacher(tmp_path / "other.pth", 1)
    with pytest.raises(UsageError, match=r"teachers\.1\.sha256 \(.*force=True$"):
        distilled(other, tmp_path / "second", tmp_path / "logits")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("net.pth", "other.pth", "logits", "first", "first.run")
    }
    distilled(other, tmp_path / "second", tmp_path / "logits", force=True)


@pytest.mark.parametrize(
    ("training", "config"),
    [
        (TrainConfig(augment="cifar"), DistillConfig()),
        (TrainConfig(mixup=0.1), DistillConfig()),
        (TrainConfig(), DistillConfig("kd+rkd")),
    ],
    ids=["augment", "mixup", "features"],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_opened(
    training: TrainConfig, config: DistillConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"^cache: "):
        distilled(
            tmp_path / "none.pth",
            tmp_path / "out",
            tmp_path / "logits",
            training=replace(TRAINING, config=training),
            config=config,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_kept_logits_needs_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "distill",
        "none.pth",
        "--student",
        "same",
        "--train",
        "digits",
        "--no-eval",
        "--cache-top",
        "5",
    ]
    assert main(command) == 2
    assert "--cache-top: has no meaning without --cache" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cache_top: must be at least 1"):
        DistillConfig(cache_top=0)
