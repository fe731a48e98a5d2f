"""The data and the files of training; how it is done is a ``TrainConfig``."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from modelopt_cli.cli.options.output import read_ending
from modelopt_cli.cli.values import Reader
from modelopt_cli.report.formats import PICTURES, file_names
from modelopt_cli.settings import Config, Setting, fields_of
from modelopt_cli.training.config import FineTuneConfig, TrainConfig

if TYPE_CHECKING:
    from modelopt_cli.api import TrainingRequest


@dataclass(frozen=True)
class TrainingFiles(Config, title=TrainConfig.title):
    """Data to train on, and files that are written besides the output."""

    train: Annotated[
        str | None, Setting("Data to train on, in any form that --data takes.", metavar="SPEC")
    ] = None
    val: Annotated[
        str | None,
        Setting("Data by which the best weights are chosen; never the test data.", metavar="SPEC"),
    ] = None
    run_dir: Annotated[
        Path | None,
        Setting(
            "Folder of the log and of the state of an interrupted run.",
            metavar="DIR",
            default="OUTPUT with .run in place of its suffix",
            older=("--run",),
            advanced=True,
        ),
    ] = None
    resume: Annotated[bool, Setting("Go on with an interrupted run, or start if there is none.")] = False
    tensorboard: Annotated[
        Path | None, Setting("Folder of a log for TensorBoard (track extra).", metavar="DIR", advanced=True)
    ] = None
    curve: Annotated[
        Path | None,
        Setting(f"Draw loss and accuracy to {file_names(PICTURES)} (plots extra).", advanced=True),
    ] = None


def read_training(reader: Reader, files: TrainingFiles, config: TrainConfig, dry_run: bool) -> None:
    """Leave with ``reader`` what does not go together."""
    if not isinstance(config, FineTuneConfig):
        reader.check(files.train is not None, "--train", "there is nothing to train on; name the data")
    elif config.epochs:
        reader.check(files.train is not None, "--epochs", "there is nothing to train on; give --train")
    else:
        for field in fields_of(TrainingFiles):
            idle = field.name != "train" and getattr(files, field.name) != field.initial
            reader.check(not idle, field.flag, "has no meaning without --epochs")
    both = files.val is not None and config.val_fraction != 0
    reader.check(not both, "--val-fraction", "cannot be given together with --val")
    if files.curve is not None:
        read_ending(reader, "--curve", files.curve, PICTURES)
        reader.check(not dry_run, "--curve", "has no meaning with --dry-run")


def training_request(files: TrainingFiles, config: TrainConfig) -> "TrainingRequest | None":
    """The training in the words of the Python API; None where there is none to do."""
    if files.train is None or not config.epochs:
        return None
    from modelopt_cli.api import TrainingRequest

    return TrainingRequest(
        train=files.train,
        val=files.val,
        config=config,
        run=files.run_dir,
        resume=files.resume,
        board=files.tensorboard,
    )


def read_training_dry_run(reader: Reader, dry_run: bool) -> None:
    """Time a single process alone: several would have to be timed together."""
    alone = not (dry_run and of_several())
    reader.check(alone, "--dry-run", "times a single process; run it without torchrun")


def of_several() -> bool:
    """True in one of several processes that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def beside_another() -> bool:
    """True in a process of torchrun's that is not the one that speaks."""
    return of_several() and os.environ.get("RANK", "0") != "0"
