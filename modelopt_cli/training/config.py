"""Settings of training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from modelopt_cli.settings import Config, Setting, fields_of, fraction, option
from modelopt_cli.training.catalog import AUGMENTATIONS, OPTIMIZERS, SCHEDULES, TEACHERS


@dataclass(frozen=True)
class TrainConfig(Config, title="Training"):
    """Settings of training.

    Attributes:
        teacher: a key of ``TEACHERS``, whose outputs are learned too; None learns from labels alone.
        distill_weight: weight of the teacher's part in the loss, 0 to 1.
        temperature: softens the logits of both in the teacher's part.
    """

    epochs: Annotated[int, Setting("Passes over --train.", least=1)] = 10
    batch_size: Annotated[int, Setting("Samples in a training step, over all processes.", least=1)] = 128
    optimizer: Annotated[str, Setting("Optimizer of the weights.", choices=OPTIMIZERS)] = "sgd"
    lr: Annotated[
        float | None,
        Setting(
            "Largest learning rate.",
            above=0,
            default="0.1 for every 128 samples of a batch, adamw 0.001; less where a short test "
            "shows that the network needs it",
        ),
    ] = None
    momentum: Annotated[float, Setting("Momentum of sgd.", least=0, below=1, advanced=True)] = 0.9
    nesterov: Annotated[bool, Setting("Use Nesterov's momentum in sgd.", advanced=True)] = False
    weight_decay: Annotated[
        float, Setting("Weight decay, not applied to biases and norms.", least=0, advanced=True)
    ] = 5e-4
    schedule: Annotated[
        str,
        Setting("Course of the learning rate.", choices=SCHEDULES, flags=("--lr-schedule",), advanced=True),
    ] = "cosine"
    warmup: Annotated[
        float | None,
        Setting(
            "Epochs in which the learning rate grows from 0.",
            least=0,
            most=1e6,
            metavar="EPOCHS",
            default="5 % of the steps; with --lr, 0",
            advanced=True,
        ),
    ] = None
    label_smoothing: Annotated[
        float,
        Setting(
            "Part of each label that is spread over all classes.",
            least=0,
            below=1,
            metavar="F",
            parse=fraction,
            advanced=True,
        ),
    ] = 0.0
    mixup: Annotated[float, Setting("Mixup alpha (0: off).", least=0, metavar="ALPHA", advanced=True)] = 0.0
    ema: Annotated[
        float,
        Setting(
            "Decay of a moving average of the weights, which is then kept (0: off).",
            least=0,
            below=1,
            metavar="DECAY",
            advanced=True,
        ),
    ] = 0.0
    clip: Annotated[
        float, Setting("Largest norm of the gradient (0: no limit).", least=0, metavar="NORM", advanced=True)
    ] = 0.0
    amp: Annotated[bool, Setting("Compute in bfloat16 where that is safe.", advanced=True)] = False
    augment: Annotated[str, Setting("Augmentation of the training images.", choices=AUGMENTATIONS)] = "none"
    augmentation_cycle: Annotated[
        int,
        Setting(
            "Epochs with new augmentations before they are repeated in turn (0: always new).",
            least=0,
            older=("--views",),
            advanced=True,
        ),
    ] = 0
    patience: Annotated[
        int,
        Setting("Stop after this many epochs without a gain on --val (0: never).", least=0, advanced=True),
    ] = 0
    val_fraction: Annotated[
        float,
        Setting(
            "Without --val, fraction of --train that is held out for validation.",
            least=0,
            below=1,
            metavar="F",
            parse=fraction,
        ),
    ] = 0.0
    save_every: Annotated[
        int,
        Setting(
            "Steps after which the state is saved, besides after every epoch (0: never).",
            least=0,
            metavar="STEPS",
            advanced=True,
        ),
    ] = 0
    teacher: str | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0

    def conflicts(self) -> Iterator[str]:
        """Settings that have no meaning together, and faults of those that are arguments in Python alone."""
        of_others = {name for row in OPTIMIZERS.values() for name in row.settings}
        of_others -= set(OPTIMIZERS[self.optimizer].settings)
        changed = [field for field in fields_of(TrainConfig) if getattr(self, field.name) != field.initial]
        for field in changed:
            if field.name in of_others:
                yield f"{field.label} has no meaning for {self.optimizer}"
        if self.nesterov and self.momentum == 0:
            yield f"{option('nesterov')} needs a {option('momentum')} above 0"
        if not isinstance(self, FineTuneConfig):
            for field in fields_of(FineTuneConfig):
                if field.name in _OF_FINE_TUNING and (fault := field.problem(getattr(self, field.name))):
                    yield f"{field.label}: {fault}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history, where the augmentation cycle has its earlier name, ``views``."""
        config = super().as_dict()
        config["views"] = config.pop("augmentation_cycle")
        return config

    @property
    def peak_lr(self) -> float:
        """``lr``, or the usual rate of the optimizer, which is the most that is taken for None."""
        return self.lr if self.lr is not None else OPTIMIZERS[self.optimizer].usual_lr(self.batch_size)


_OF_FINE_TUNING = ("teacher", "distill_weight", "temperature")


@dataclass(frozen=True)
class FineTuneConfig(TrainConfig):
    """Settings of the training of a compressed network; none is done with 0 epochs."""

    epochs: Annotated[int, Setting("Passes over --train (0: no fine-tuning).", least=0)] = 0
    teacher: Annotated[
        str | None,
        Setting("Teacher whose outputs are learned besides the labels.", choices=TEACHERS, advanced=True),
    ] = None
    distill_weight: Annotated[
        float,
        Setting(
            "Weight of the teacher in the loss.", least=0, most=1, metavar="F", parse=fraction, advanced=True
        ),
    ] = 0.5
    temperature: Annotated[
        float, Setting("Temperature that softens the logits of teacher and student.", above=0, advanced=True)
    ] = 2.0

    def conflicts(self) -> Iterator[str]:
        """Conflicts of any training, and settings that have no meaning without epochs."""
        yield from super().conflicts()
        if not self.epochs:
            for field in fields_of(FineTuneConfig):
                if getattr(self, field.name) != field.initial:
                    yield f"{field.label} has no meaning without {option('epochs')}"


@dataclass(frozen=True)
class IntegerTuneConfig(FineTuneConfig):
    """Settings of the training of a quantized network; none is done with 0 epochs."""

    lr: Annotated[
        float | None,
        Setting(
            "Largest learning rate.",
            above=0,
            default="0.01 for every 128 samples of a batch, 0.03 at 2 bits; adamw a hundredth",
        ),
    ] = None
    teacher: Annotated[
        str | None,
        Setting(
            "Teacher whose outputs are learned besides the labels.",
            choices=TEACHERS,
            default="self, where outputs can be compared",
            advanced=True,
        ),
    ] = None
