"""The task of a command: what the user says, else the file, the architecture or the data."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import nn

from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import Data, open_data
from modelopt_cli.data.data_spec import parse_spec
from modelopt_cli.data.source import Samples
from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.measure.accuracy import run
from modelopt_cli.program import InputSpec
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec, parse_task

TASK, OUTPUT_NAME = "task", "output_name"
"""Keys in the history of what a file is for, where that is not to classify."""
SOURCE_TASK = "source_task"
"""Key in the history of what the architecture is for that a Program was loaded with."""


@dataclass(frozen=True)
class ChosenTask:
    """A task and who says so.

    Attributes:
        spec: the task.
        origin: in words; empty where nobody does, and the default is taken.
    """

    spec: TaskSpec
    origin: str = ""

    @property
    def described(self) -> str | None:
        """One line for the table; None for what is taken by default."""
        return f"{self.spec.text} ({self.origin})" if self.origin else None

    @property
    def history(self) -> dict[str, str]:
        """Entry in the history, so that later commands know; nothing where it was taken by default."""
        if not self.origin:
            return {}
        output = {} if self.spec.output is None else {OUTPUT_NAME: self.spec.output}
        return {TASK: self.spec.text, **output}


BY_DEFAULT = ChosenTask(CLASSIFY)


def choose_task(
    asked: str | None,
    output: str | None,
    models: Sequence[Opened],
    data: Iterable[Samples | Data | None],
) -> ChosenTask:
    """The task: what was asked for, else recorded in a file, else implied by an architecture, or by data.

    Args:
        asked: value of ``--task``.
        output: value of ``--output-name``.
        models: files that are open, of which the first that says something counts.
        data: of the command, likewise.

    Raises:
        UsageError: there is no such task.
        DataError: data that may say the task cannot be opened.
    """
    chosen = _chosen(asked, output, models, data)
    return replace(chosen, spec=_with_inferred(chosen.spec, models))


def choose_common_task(
    asked: str | None,
    output: str | None,
    models: Sequence[Opened],
    data: Iterable[Samples | Data | None],
) -> ChosenTask:
    """The task by which models are compared; arguments are those of :func:`choose_task`.

    Raises:
        UsageError: two files say different tasks, and none is asked for; or there is no such task.
        DataError: data that may say the task cannot be opened.
    """
    if asked is None:
        said = [(opened.path, task.spec.name) for opened in models for task in islice(_recorded([opened]), 1)]
        for path, name in said:
            if name != said[0][1]:
                problem = f"is for the task {name}, and {said[0][0]} is for {said[0][1]}"
                hint = f"give {option(TASK)} for both, or evaluate them in two commands"
                raise UsageError(problem, where=path, hint=hint)
    return choose_task(asked, output, models, data)


def _chosen(
    asked: str | None,
    output: str | None,
    models: Sequence[Opened],
    data: Iterable[Samples | Data | None],
) -> ChosenTask:
    if asked is not None:
        return ChosenTask(parse_task(asked).named(output), f"{option(TASK)} given")
    inferred = next(_recorded(models), None) or next(_implied(models), None) or next(_of_data(data), None)
    if inferred is None:
        origin = f"{option(OUTPUT_NAME)} given" if output is not None else ""
        return ChosenTask(CLASSIFY.named(output), origin)
    return ChosenTask(inferred.spec.named(output), inferred.origin)


def _with_inferred(spec: TaskSpec, models: Sequence[Opened]) -> TaskSpec:
    """The task with the options that the networks tell, where all tell the same."""
    told = []
    for opened in models if spec.row.infer is not None else ():
        network, sample = opened.network, opened.input
        if network is not None and sample is not None:
            with contextlib.suppress(ModeloptError):  # what does not run is found out where it matters
                told.append(spec.with_inferred(partial(_outputs_for, network, sample)))
    return told[0] if told and all(each.options == told[0].options for each in told) else spec


def _outputs_for(network: nn.Module, sample: InputSpec, samples: int) -> object:
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with evaluation_mode(network):
        return run(network, zeros(sample, samples, device), "the network")


def source_history(opened: Opened) -> tuple[dict[str, str], ...]:
    """The entry in the history that lets the task of an architecture travel with its Program.

    Args:
        opened: a network, of whose file nothing but its architecture may say the task.

    Returns:
        The entry; none where no architecture says a task.
    """
    architecture = opened.architecture
    if architecture is None or architecture.task is None:
        return ()
    return ({"method": "load", SOURCE_TASK: architecture.task},)


def _recorded(models: Sequence[Opened]) -> Iterator[ChosenTask]:
    """Tasks that files say in their history; the user's own metric is code, which no file may name."""
    for opened in models:
        for entry in reversed(opened.history):
            text, output = entry.get(TASK), entry.get(OUTPUT_NAME)
            if isinstance(text, str) and not (spec := parse_task(text)).is_own:
                yield ChosenTask(spec.named(output if isinstance(output, str) else None), "recorded")


def _implied(models: Sequence[Opened]) -> Iterator[ChosenTask]:
    for opened in models:
        architecture = opened.architecture
        if architecture is not None and architecture.task is not None:
            yield ChosenTask(parse_task(architecture.task), f"of {architecture.spec}")
        for entry in reversed(opened.history):
            text = entry.get(SOURCE_TASK)
            if isinstance(text, str) and not (spec := parse_task(text)).is_own:
                arch = opened.program.arch if opened.program is not None else None
                yield ChosenTask(spec, f"of {arch or 'its source'}")


def _of_data(data: Iterable[Samples | Data | None]) -> Iterator[ChosenTask]:
    for each in data:
        if isinstance(each, str):
            if not parse_spec(each).says_task:
                continue
            each = open_data(each, labels=False)
        source = each.source if isinstance(each, Data) else each
        if source is not None and source.task is not None:
            yield ChosenTask(parse_task(source.task), f"of {source.name}")
