"""The options of training: of ``train``, and of methods that fine-tune.

``--batch-size`` and ``--warmup`` are those of training here; latency's have longer names (``measure.py``).
"""

import os
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_cli.cli.values import Reader, parse_choice, parse_fraction

if TYPE_CHECKING:
    from modelopt_cli.api import TrainingRequest

OPTIMIZERS = ("sgd", "adamw")
LR_SCHEDULES = ("cosine", "step", "constant")
AUGMENTATIONS = ("none", "mnist", "cifar", "imagenet")
TEACHERS = ("self",)
CURVES = (".png", ".svg", ".pdf")

_train = partial(typer.Option, rich_help_panel="Training")

# Fields that say where from and where to, not how.
_WHERE = {"train", "val", "run", "resume", "tensorboard", "curve"}


@dataclass(frozen=True)
class TrainOptions:
    """What to train on, how, and where to keep what an interrupted run needs."""

    train: Annotated[
        str | None, _train(metavar="SPEC", help="Train on this data, in any form that --data takes.")
    ] = None
    val: Annotated[
        str | None,
        _train(metavar="SPEC", help="Keep the weights that do best on this data. Never give the test data."),
    ] = None
    val_fraction: Annotated[
        float,
        _train(
            metavar="F",
            parser=parse_fraction,
            help="Without --val, hold out this fraction of --train for that.",
        ),
    ] = 0.0
    epochs: Annotated[int, _train(min=1, metavar="N", help="Passes over --train.")] = 10
    batch_size: Annotated[int, _train(min=1, metavar="N", help="Samples in a step, over all processes.")] = (
        128
    )
    optimizer: Annotated[str, _train(metavar="|".join(OPTIMIZERS), help="What takes the steps.")] = (
        OPTIMIZERS[0]
    )
    lr: Annotated[
        float | None,
        _train(
            metavar="X",
            help="Largest learning rate [default: 0.1 for every 128 samples of a batch, adamw 0.001; less "
            "where a network without normalisation needs it].",
        ),
    ] = None
    momentum: Annotated[float, _train(metavar="X", help="Momentum of sgd.")] = 0.9
    nesterov: Annotated[bool, _train("--nesterov", help="Let the momentum look ahead.")] = False
    weight_decay: Annotated[float, _train(metavar="X", help="Not on biases and norms.")] = 5e-4
    lr_schedule: Annotated[
        str, _train(metavar="|".join(LR_SCHEDULES), help="How the learning rate falls.")
    ] = LR_SCHEDULES[0]
    warmup: Annotated[
        float | None,
        _train(
            metavar="EPOCHS",
            help="Let the learning rate grow first [default: over 5 % of the steps; with --lr: 0].",
        ),
    ] = None
    label_smoothing: Annotated[
        float,
        _train(metavar="F", parser=parse_fraction, help="Spread this share of each label over all classes."),
    ] = 0.0
    mixup: Annotated[float, _train(metavar="ALPHA", help="Mix pairs of samples; 0 does not.")] = 0.0
    ema: Annotated[
        float, _train(metavar="DECAY", help="Keep a moving average of the weights; 0 does not.")
    ] = 0.0
    clip: Annotated[float, _train(metavar="NORM", help="Clip the gradient to this norm; 0 does not.")] = 0.0
    amp: Annotated[bool, _train("--amp", help="Compute in bfloat16 where that is safe.")] = False
    augment: Annotated[
        str, _train(metavar="|".join(AUGMENTATIONS), help="Vary the images, as is usual for these data.")
    ] = AUGMENTATIONS[0]
    views: Annotated[
        int,
        _train(
            min=0,
            metavar="N",
            help="Draw that anew in N epochs, then take the same drawings in turn; 0 always draws anew.",
        ),
    ] = 0
    patience: Annotated[
        int, _train(min=0, metavar="EPOCHS", help="Stop after so many without a gain; 0 does not.")
    ] = 0
    run: Annotated[
        Path | None,
        _train(
            metavar="DIR",
            help="Where to keep the log and the state of an interrupted run [default: OUTPUT with .run in "
            "place of its suffix].",
        ),
    ] = None
    resume: Annotated[
        bool, _train("--resume", help="Go on with an interrupted run, or start if there is none.")
    ] = False
    save_every: Annotated[
        int, _train(min=0, metavar="STEPS", help="Save the state this often, too, not only after epochs.")
    ] = 0
    tensorboard: Annotated[
        Path | None, _train(metavar="DIR", help="Also log for TensorBoard (needs the track extra).")
    ] = None

    curve: Annotated[
        Path | None,
        _train(
            metavar="FILE",
            help="Also draw loss and accuracy, to FILE.png, FILE.svg or FILE.pdf (plots extra).",
        ),
    ] = None

    def read(self, reader: Reader) -> dict[str, Any]:
        """The fields of ``training.TrainConfig``, which cannot be imported without torch."""
        reader.read("--optimizer", self.optimizer, lambda text: parse_choice(text, OPTIMIZERS))
        reader.read("--lr-schedule", self.lr_schedule, lambda text: parse_choice(text, LR_SCHEDULES))
        reader.read("--augment", self.augment, lambda text: parse_choice(text, AUGMENTATIONS))
        both = self.val is not None and self.val_fraction != 0
        reader.check(not both, "--val-fraction", "cannot be given together with --val")
        fine = self.curve is None or self.curve.suffix.lower() in CURVES
        reader.check(fine, "--curve", f"{self.curve} ends in none of {', '.join(CURVES)}")
        return {
            "schedule" if name == "lr_schedule" else name: value
            for name, value in vars(self).items()
            if name not in _WHERE
        }


@dataclass(frozen=True)
class FineTuneOptions(TrainOptions):
    """The same for a method that may do without training, or learn from the network it started from."""

    epochs: Annotated[int, _train(min=0, metavar="N", help="Passes over --train; 0 does not fine-tune.")] = 0
    teacher: Annotated[
        str | None,
        _train(metavar="self", help="Learn from the answers of the network as it was before, too."),
    ] = None
    distill_weight: Annotated[
        float, _train(metavar="F", parser=parse_fraction, help="The teacher's share of the loss.")
    ] = 0.5
    temperature: Annotated[float, _train(metavar="T", help="Softens the answers of both.")] = 2.0

    def read(self, reader: Reader) -> dict[str, Any]:
        """The fields of ``training.TrainConfig``; empty where nothing is to be trained."""
        values = super().read(reader)
        reader.read("--teacher", self.teacher, lambda text: parse_choice(text, TEACHERS))
        if self.epochs:
            reader.check(self.train is not None, "--epochs", "there is nothing to train on; give --train")
            return values
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            option = f"--{field.name.replace('_', '-')}"
            reader.check(field.name == "train" or not given, option, "has no meaning without --epochs")
        return {}


def training_request(options: TrainOptions, values: dict[str, Any]) -> "TrainingRequest":
    """What the Python API takes for ``options``, of which ``values`` were read."""
    from modelopt_cli.api import TrainingRequest
    from modelopt_cli.training import TrainConfig

    assert options.train is not None
    return TrainingRequest(
        train=options.train,
        val=options.val,
        config=TrainConfig(**values),
        run=options.run,
        resume=options.resume,
        board=options.tensorboard,
    )


def read_curve(reader: Reader, options: TrainOptions, dry_run: bool) -> None:
    """There is a curve only of a training."""
    reader.check(options.curve is None or not dry_run, "--curve", "has no meaning with --dry-run")


def read_training_dry_run(reader: Reader, dry_run: bool) -> None:
    """What is timed is one process: several would have to be timed together."""
    alone = not (dry_run and of_several())
    reader.check(alone, "--dry-run", "times a single process; run it without torchrun")


def of_several() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def beside_another() -> bool:
    """Whether this is one of several processes that torchrun started, and not the one that speaks."""
    return of_several() and os.environ.get("RANK", "0") != "0"
