"""What training is asked to do, what it is given, and what takes part in it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.errors import UsageError
from modelopt_cli.measure.subject import StageProgress

if TYPE_CHECKING:
    from modelopt_cli.training.forecast import Forecast
    from modelopt_cli.training.run import Run

OPTIMIZERS: dict[str, str] = {
    "sgd": "stochastic gradient descent with momentum",
    "adamw": "Adam with decoupled weight decay (Loshchilov and Hutter 2019)",
}
SCHEDULES: dict[str, str] = {
    "cosine": "half a cosine from the learning rate down to 0 (Loshchilov and Hutter 2017)",
    "step": "divided by 10 after a half and after three quarters of the steps",
    "constant": "the same throughout",
}
AUGMENTATIONS: tuple[str, ...] = ("none", "mnist", "cifar", "imagenet")
SGD_LR = 0.1
"""Of ``sgd`` for batches of ``SGD_BATCH``, and in proportion for others (Goyal et al. 2017)."""
SGD_BATCH = 128
ADAMW_LR = 1e-3


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training.

    Attributes:
        epochs: passes over the training samples.
        batch_size: samples in a step, over all processes.
        optimizer: a key of ``OPTIMIZERS``.
        lr: largest learning rate; None means 0.1 for every 128 samples of a batch with ``sgd``, 0.001 with
            ``adamw``, and less where a network without normalisation needs it (``rates.py``).
        momentum: of ``sgd``.
        nesterov: whether that momentum looks ahead.
        weight_decay: not on biases and the parameters of norms.
        schedule: a key of ``SCHEDULES``.
        warmup: epochs over which the learning rate grows from 0 in equal steps; None means 5 % of the
            steps, and none of them where ``lr`` is given.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016).
        mixup: alpha of the Beta distribution that mixes pairs of samples (Zhang et al. 2018); 0 is off.
        ema: decay per step of a moving average of the weights, which is then what is validated and kept;
            0 is off.
        clip: largest norm of the gradient; 0 is off.
        amp: compute in bfloat16 where torch holds that to be safe.
        augment: one of ``AUGMENTATIONS``.
        views: epochs whose augmentation is drawn anew, after which it comes round again; 0 draws for ever.
        patience: stop after so many epochs without a better validation accuracy; 0 is off.
        val_fraction: share of the training samples held out for validation, where no other is given.
        save_every: steps between saved states, besides the end of every epoch; 0 is off.
        teacher: ``self`` learns from the network's own answers before it was compressed too; None is off.
        distill_weight: share of the teacher's part in the loss.
        temperature: that softens both answers in the teacher's part.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema: float = 0.0
    clip: float = 0.0
    amp: bool = False
    augment: str = "none"
    views: int = 0
    patience: int = 0
    val_fraction: float = 0.0
    save_every: int = 0
    teacher: str | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("schedule", tuple(SCHEDULES)),
            ("augment", AUGMENTATIONS),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"unknown {name} {getattr(self, name)!r}", hint=f"one of {', '.join(choices)}"
                )
        if self.teacher not in (None, "self"):
            raise UsageError(f"unknown teacher {self.teacher!r}", where="--teacher", hint="give self")
        for name, (accepts, allowed) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not accepts(value):
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{value} is out of range", where=option, hint=f"give {allowed}")
        if self.optimizer != "sgd" and (self.nesterov or self.momentum != TrainConfig.momentum):
            raise UsageError(f"--momentum and --nesterov have no meaning for {self.optimizer}")
        if self.nesterov and self.momentum == 0:
            raise UsageError("--nesterov needs a --momentum above 0")

    @property
    def peak_lr(self) -> float:
        """``lr``, or the usual rate of the optimizer, which is the most that is taken for None."""
        if self.lr is not None:
            return self.lr
        return SGD_LR * self.batch_size / SGD_BATCH if self.optimizer == "sgd" else ADAMW_LR

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history."""
        return asdict(self)


def _within(low: float, high: float) -> Any:
    return lambda value: low <= value < high


_ABOVE_0 = (lambda value: 0 < value < float("inf"), "a number above 0")
_FROM_0 = (_within(0, float("inf")), "0 or more")
_SHARE = (_within(0, 1), "a number from 0 to below 1")
_LIMITS: dict[str, tuple[Any, str]] = {
    "epochs": (_within(1, float("inf")), "at least 1"),
    "batch_size": (_within(1, float("inf")), "at least 1"),
    **dict.fromkeys(("lr", "temperature"), _ABOVE_0),
    "warmup": (_within(0, 1e6), "0 or more epochs, at most a million"),
    **dict.fromkeys(("weight_decay", "mixup", "clip", "views", "patience", "save_every"), _FROM_0),
    **dict.fromkeys(("momentum", "label_smoothing", "ema", "val_fraction"), _SHARE),
    "distill_weight": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
}


class Companion(Protocol):
    """Takes part in training beside the optimizer: a mask that must hold, say.

    All hooks run in every process. ``network`` has the parameter names of the network that is trained, but
    need not be it: the moving average of the weights must obey too.
    """

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Called before the forward pass of ``step``, which counts from 0, of ``steps``."""

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Called after the optimizer has changed the weights, and for the moving average after that."""

    def state(self) -> dict[str, Tensor]:
        """What an interrupted training must save to go on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the network was shown in a step.

    Attributes:
        images: ``(N, *shape)``, on the device that computes.
        samples: int64 ``(N,)`` on the CPU, their places in the data that is trained on: from 0, and
            without what ``val_fraction`` holds out. None where samples are mixed.
        view: the number that their augmentation was drawn by; 0 where nothing is drawn. The same sample with
            the same view and seed is the same image.
    """

    images: Tensor
    samples: Tensor | None = None
    view: int = 0


class Objective(Protocol):
    """What is minimised. One that is a module learns along with the network, by the same optimizer."""

    def __call__(self, logits: Tensor, targets: Tensor, seen: Seen) -> Tensor:
        """The loss, a scalar: the mean over the samples.

        Args:
            logits: ``(N, classes)``.
            targets: ``(N,)`` int64 labels, or ``(N, classes)`` probabilities where samples are mixed.
            seen: what the logits were computed from.
        """


@dataclass(frozen=True)
class Training:
    """What a method gets to train with.

    Attributes:
        train: the samples.
        val: samples to choose the best weights by, or None; never those of the final test.
        config: how.
        run: where state is saved and taken up again; None saves nothing.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        workers: loader processes.
        progress: called with the stage, steps done and their total.
        note: called with one line for each thing worth knowing.
        forecasts: where to put what each training would take, instead of training; None trains.
    """

    train: Data
    val: Data | None = None
    config: TrainConfig = TrainConfig()
    run: "Run | None" = None
    device: str = "cpu"
    workers: int = 0
    progress: StageProgress | None = None
    note: Callable[[str], None] | None = None
    forecasts: "list[Forecast] | None" = None


@dataclass(frozen=True)
class Trained:
    """How training went.

    Attributes:
        epochs: that were begun; fewer than asked for where patience ran out.
        steps: of the optimizer.
        best: largest validation accuracy in percent, that of the weights kept; None without validation.
        best_epoch: the epoch, from 1, after which those weights were reached.
        loss: mean training loss of the last epoch.
        seconds: spent, not for the history.
        lr: the largest learning rate, as it was at the end.
        returns: how often training diverged and went back to an earlier state, with a smaller rate.
    """

    epochs: int
    steps: int
    best: float | None
    best_epoch: int | None
    loss: float
    seconds: float
    lr: float
    returns: int

    @property
    def figures(self) -> dict[str, Any]:
        """Figures for the history: nothing that would differ from one run to the next."""
        figures: dict[str, Any] = {"epochs": self.epochs, "steps": self.steps, "lr": self.lr}
        if self.returns:
            figures["returns"] = self.returns
        if self.best is not None:
            figures |= {"best": round(self.best, 4), "best_epoch": self.best_epoch}
        return figures
