"""What the verbs that change weights and may fine-tune them have in common."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import modelopt_cli
from modelopt_cli.api.guard import Given
from modelopt_cli.api.inputs import input_history
from modelopt_cli.api.opening import labels_of
from modelopt_cli.api.tuning import Surroundings, Trainer, TrainingRequest, names_of_classes, trainer
from modelopt_cli.artifact.coding import Code
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context


@contextmanager
def fine_tuner(
    request: TrainingRequest | None,
    output: str | Path,
    identity: Mapping[str, Any],
    opened: Opened,
    how: Surroundings,
) -> Iterator[Trainer | None]:
    """As ``tuning.trainer``, if there is to be training.

    Raises:
        UsageError: the network cannot be traced, or as there.
    """
    if request is None:
        yield None
        return
    if opened.program is None:
        raise UsageError("fine-tuning needs a network that can be traced", hint="leave --epochs out")
    with trainer(request, output, identity, opened.program.input, how, labels_of(opened)) as tools:
        # Labels were counted by these names, so the result is to be judged by them.
        opened.program.labels = opened.program.labels or names_of_classes(
            opened.program, tools.training.train
        )
        yield tools


def context_of(
    opened: Opened,
    calibration: str | None,
    tools: Trainer | None,
    how: Surroundings,
    stage: str,
    code: Code = "plain",
) -> Context:
    """What a method is given beside a Program, whose file will record the preprocessing of the data.

    Args:
        opened: holds the Program.
        calibration: spec of the data to look at, or None.
        tools: what to train with, or None.
        how: the rest.
        stage: what the work is called where progress is shown.
        code: how the file will be written.

    Raises:
        DataError: the data cannot be used.
    """
    progress: Callable[[int, int | None], None] | None = None
    if how.progress is not None:
        progress = partial(how.progress, stage)
    return Context(
        data=None if calibration is None else _samples(opened, calibration, tools, how),
        seed=how.options.seed,
        batch_size=how.options.data_batch_size,
        workers=how.options.workers,
        progress=progress,
        origin=origin_of(opened, how.overrides),
        training=tools.training if tools is not None else None,
        device=how.options.device,
        code=code,
    )


def given_to(opened: Opened, context: Context) -> Given:
    """The network a method is given, and its outputs on a batch: its result is compared with them.

    Raises:
        DataError: the Program does not run on the data, or on noise of its shape where there is none.
    """
    data = context.data or (context.training.train if context.training is not None else None)
    return Given.of(opened, data=data, seed=context.seed, device=context.device)


def origin_of(opened: Opened, overrides: PreprocessOverrides | None) -> dict[str, Any]:
    """Entry in the history on the source, and on a preprocessing that was assumed."""
    origin = {"modelopt": modelopt_cli.__version__, "source_sha256": opened.source_sha256}
    return origin | input_history(opened, overrides)


def _samples(opened: Opened, calibration: str, tools: Trainer | None, how: Surroundings) -> Data:
    assert opened.program is not None
    if tools is not None and tools.training.train.name == calibration:
        samples = tools.training.train
    else:
        known, seed = opened.program.input, how.options.seed
        samples = open_data(calibration, input=known, overrides=how.overrides, seed=seed, labels=False)
        for note in samples.notes:
            how.note(note)
    opened.program.input = samples.input
    return samples
