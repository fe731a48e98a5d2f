"""One command at work: the few steps that each command does its own way."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from modelopt_cli import __version__
from modelopt_cli.api.choosing_task import BY_DEFAULT, ChosenTask, choose_task
from modelopt_cli.api.compressed import CompressedModel
from modelopt_cli.api.evaluating import Compared
from modelopt_cli.api.guard import Original
from modelopt_cli.api.opening import ModelFile
from modelopt_cli.api.preprocessing_notes import input_history
from modelopt_cli.api.rehearsal import rehearse
from modelopt_cli.api.request import Request
from modelopt_cli.api.result import Result
from modelopt_cli.api.trainer import Trainer
from modelopt_cli.artifact import Written
from modelopt_cli.checkpoint import Opened
from modelopt_cli.methods.context import Context
from modelopt_cli.program import InputSpec


@dataclass(frozen=True)
class Made:
    """Outcome of a command, before it is written.

    Attributes:
        model: for the output.
        result: what there is to say of it.
        scratch: the same student trained without a teacher, and where to write it.
    """

    model: CompressedModel
    result: Result
    scratch: tuple[CompressedModel, Path] | None = None


class Work(ABC):
    """One command at work.

    Attributes:
        request: the command.
        opened: the model that is worked on, once it is open.
        task: what it is for, once it is open.
        known: what a sample looks like, as far as that was known before.
        always_trains: a dry run times some training steps, so it checks all that training needs.
    """

    always_trains = False
    opened: Opened
    task: ChosenTask = BY_DEFAULT
    known: InputSpec | None

    def __init__(self, request: Request) -> None:
        self.request = request

    @property
    def sources(self) -> list[str | Path]:
        """Files that are read, and must not be written."""
        return [self.request.source] if self.request.source is not None else []

    @property
    def outputs(self) -> list[Path]:
        """Files that are written."""
        return [Path(self.request.output)]

    def check(self) -> None:  # noqa: B027 -- most commands have nothing more to check
        """Refuse what cannot be done, before anything is opened."""

    @abstractmethod
    def open(self) -> None:
        """Open the models and check what depends on them."""

    def refuse_without_graph(self) -> None:  # noqa: B027 -- some commands need none
        """Refuse what takes a graph, of a model that has none, before its data are opened."""

    @property
    def models(self) -> list[Opened]:
        """All models that are open, of which the first that says its task counts."""
        return [self.opened]

    def settle_task(self) -> None:
        """Choose the task, by which all data of the command are read.

        Raises:
            UsageError: there is no such task.
        """
        request, training = self.request, self.request.training
        data = [training.train if training is not None else None, request.data, request.calibration]
        self.task = choose_task(request.task, request.output_name, self.models, data)

    def rehearse(self) -> None:
        """Refuse what could not be measured in the end."""
        rehearse([self.opened], self.request, task=self.task)

    @abstractmethod
    def training(self) -> AbstractContextManager[Trainer | None]:
        """Data and folder for training; None where there is none."""

    @abstractmethod
    def make(self, trainer: Trainer | None) -> Made:
        """Do the work, and compare the result with the original."""

    def finish(self, made: Made, written: Written | None) -> Result:
        """The result, once it is known whether it was written."""
        return replace(made.result, written=written)

    def read_back(self, path: Path) -> Opened:
        """One of the outputs, as anyone will meet it."""
        return ModelFile.of(path).open(self.request.arch, self.known)

    @abstractmethod
    def compared(self, outputs: list[tuple[str | Path, Opened]]) -> tuple[Compared, Request]:
        """Models to put side by side once the outputs are written and read back, and the limits for them."""

    def context(self, trainer: Trainer | None, stage: str) -> Context:
        """Context of a method, without calibration data."""
        request, progress = self.request, self.request.progress
        shown: Callable[[int, int | None], None] | None = None
        if progress is not None:
            shown = partial(progress, stage)
        return Context(
            seed=request.options.seed,
            batch_size=request.options.data_batch_size,
            workers=request.options.workers,
            progress=shown,
            origin=origin_of(self.opened, request) | self.task.history,
            task=self.task.spec,
            training=trainer.training if trainer is not None else None,
            device=request.options.device,
            code=request.code,
        )

    def original(self, context: Context) -> Original:
        """The model before it is changed, and its outputs on a batch.

        Raises:
            DataError: a Program does not run on the data, or on noise of its shape where there is none.
        """
        data = context.data or (context.training.train if context.training is not None else None)
        return Original.of(self.opened, data=data, seed=context.seed, device=context.device)


def origin_of(opened: Opened, request: Request) -> dict[str, Any]:
    """Entry in the history on the source, and on a preprocessing that was assumed."""
    origin = {"modelopt": __version__, "source_sha256": opened.source_sha256}
    return origin | input_history(opened, request.preprocessing)
