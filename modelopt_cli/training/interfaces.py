"""Interfaces of training: data and settings, callbacks, objectives, results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.measure.evaluated_model import StageProgress
from modelopt_cli.program.input_batch import Inputs
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.training.config import TrainConfig
from modelopt_cli.training.run_folder import Run


class Callback(Protocol):
    """Hook into training, next to the optimizer: it keeps a mask, say.

    All hooks run in every process. ``network`` has the parameter names of the network that is trained, but
    need not be it: the moving average of the weights must obey too.
    """

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Called before the forward pass of ``step``, which counts from 0, of ``steps``."""

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Called after the optimizer has changed the weights, and for the moving average after that."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that an interrupted training must save to go on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state."""


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Inputs of a step.

    Attributes:
        batch: what the network is given, on the device that computes.
        samples: int64 ``(N,)`` on the CPU, their places in the data that is trained on: from 0, and
            without what ``val_fraction`` holds out. None where samples are mixed.
        variant: the number that their augmentation was drawn by; 0 where nothing is drawn. The same
            sample with the same variant and seed is the same.
    """

    batch: Inputs
    samples: Tensor | None = None
    variant: int = 0


class Objective(Protocol):
    """Loss that is minimised. One that is a module learns along with the network, by the same optimizer."""

    def __call__(self, logits: Any, targets: Any, inputs: StepInputs) -> Tensor:
        """The loss, a scalar: the mean over the samples.

        Args:
            logits: of classifiers ``(N, classes)``; else the output that the task learns, or all outputs.
            targets: ``(N,)`` int64 labels, or ``(N, classes)`` probabilities where mixed; else the
                targets as the task collates them.
            inputs: what the logits were computed from.
        """


@dataclass(frozen=True)
class TimeEstimate:
    """Time that one training would take, if patience does not end it before.

    Attributes:
        stage: what the run and the log call it.
        train_samples: that are trained on.
        val_samples: that weights are chosen by; 0 without validation, None where nobody knows.
        epochs: passes over the former.
        steps_per_epoch: of the optimizer.
        steps: in all epochs.
        lr: the largest learning rate, given or chosen.
        lr_test_seconds: what it takes to choose it.
        timed_steps: how many were timed, without those that warm up.
        seconds_per_step: their median.
        seconds_per_kept_step: the same where the objective has kept what it needs to know of every sample;
            None where it keeps nothing, or there is no epoch after that.
        validation_seconds: of all validations.
        seconds: of it all.
    """

    stage: str
    train_samples: int
    val_samples: int | None
    epochs: int
    steps_per_epoch: int
    steps: int
    lr: float
    lr_test_seconds: float
    timed_steps: int
    seconds_per_step: float
    seconds_per_kept_step: float | None
    validation_seconds: float
    seconds: float


@dataclass(frozen=True)
class Training:
    """Data, settings and run of a training.

    Attributes:
        train: the samples.
        val: samples to choose the best weights by, or None; never those of the final test.
        config: settings.
        run: where state is saved and taken up again; None saves nothing.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        workers: loader processes.
        progress: called with the stage, steps done and their total.
        note: called with one line for each thing worth knowing.
        estimates: gets a time estimate for each training, instead of training; None trains.
        task: what the network is for.
    """

    train: Data
    val: Data | None = None
    config: TrainConfig = field(default_factory=TrainConfig)
    run: Run | None = None
    device: str = "cpu"
    workers: int = 0
    progress: StageProgress | None = None
    note: Callable[[str], None] | None = None
    estimates: list[TimeEstimate] | None = None
    task: TaskSpec = CLASSIFY


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Attributes:
        epochs: that were begun; fewer than asked for where patience ran out.
        steps: of the optimizer.
        best: best value of the task's main metric on the validation samples, of classifiers top-1 in percent,
            that of the weights kept; None without validation.
        best_epoch: the epoch, from 1, after which those weights were reached.
        start: training loss of the first step.
        loss: mean training loss of the last epoch.
        seconds: spent, not for the history.
        lr: the largest learning rate, as it was at the end.
        returns: how often training diverged and went back to an earlier state, with a smaller rate.
        unit: of ``best``, after the number.
    """

    epochs: int
    steps: int
    best: float | None
    best_epoch: int | None
    start: float
    loss: float
    seconds: float
    lr: float
    returns: int
    unit: str = " %"

    @property
    def figures(self) -> dict[str, Any]:
        """Figures for the history: nothing that would differ from one run to the next."""
        figures: dict[str, Any] = {"epochs": self.epochs, "steps": self.steps, "lr": self.lr}
        if self.returns:
            figures["returns"] = self.returns
        if self.best is not None:
            figures |= {"best": round(self.best, 4), "best_epoch": self.best_epoch}
        return figures
