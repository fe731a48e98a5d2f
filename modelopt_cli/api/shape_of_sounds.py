"""The shape in which a network takes sounds where nobody says it: a row of samples, or one channel."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from modelopt_cli.data.dataset import Data
from modelopt_cli.errors import ArchitectureError, CaptureError
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import require_inputs
from modelopt_cli.program.input_batch import named
from modelopt_cli.program.verification import random_input, require_runnable
from modelopt_cli.settings import option
from modelopt_cli.text import first_line

_BATCH = 3
"""Samples of a trial: a convolution takes a batch of one row for a sound of one channel."""


def input_that_runs(data: Data, build: Callable[[], nn.Module]) -> InputSpec:
    """The input of a network as the data has it, or in the other shape of its source if only that runs.

    Args:
        data: opened without knowing what the network takes.
        build: gives the network, with any weights; is not called where the data has one shape alone.

    Raises:
        ArchitectureError: the network runs on neither.
    """
    row, other = data.input, data.source.other_shape
    if other is None:
        return row
    network = build()
    try:
        require_inputs(network, row)
    except CaptureError:
        return row  # it has several inputs, which is said where it is captured
    channel = replace(row, shape=other)
    if _refused(network, row) is None:
        return row
    if (refused := _refused(network, channel)) is None:
        return channel
    sizes = option("input_shape", "x".join(map(str, other)))
    reason = first_line(refused.__cause__ or refused)
    raise ArchitectureError(
        f"the network runs on samples neither of shape {row.shape} nor of {other}: {reason}",
        where=data.name,
        hint=f"say what it takes: {sizes}, or ?length=N in the data for sounds of N samples",
    )


def _refused(network: nn.Module, sample: InputSpec) -> CaptureError | None:
    if any(each.is_meta for each in network.parameters()):
        return None
    try:
        require_runnable(network, named(random_input(network, sample, _BATCH), sample))
    except CaptureError as error:
        return error
    return None
