"""Batches of calibration data, and the outputs of a network by which it is compared with another one."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError, InputError
from modelopt_cli.methods.context import Context
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, channels_last, select, tensors_of
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.program.parted import code_of
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.tasks.task_output import form_of

LARGEST = 1_204_224
"""Numbers in a batch of several samples to calibrate on: those of eight images of 224x224."""


class Comparable(NamedTuple):
    """Outputs for a batch, as they are compared.

    Attributes:
        parts: logits ``(rows, classes)`` of each sample, pixel or token; or, where outputs stand for no
            softmax, numbers ``(N, D)`` of each output that counts.
        are_logits: True of the former.
    """

    parts: list[Tensor]
    are_logits: bool


def input_batches(data: Data, context: Context) -> Iterator[Inputs]:
    """The inputs of all samples in order, without their targets, on the CPU."""
    return (inputs for inputs, _ in data.batches(context.batch_size, workers=context.workers))


def calibration_batches(program: Program, data: Data, context: Context) -> Iterator[Inputs]:
    """The inputs of all samples in order, as a network takes them in little memory and time.

    There are as many at a time as ``LARGEST`` allows. Images have their channels innermost, except for a
    network whose own code calls its graphs: that may need the usual layout.
    """
    for batch in input_batches(data, context):
        numbers = sum(tensor.shape[1:].numel() for tensor in tensors_of(batch))
        size = max(1, LARGEST // max(1, numbers))
        for start in range(0, batch_size(batch), size):
            part = select(batch, slice(start, start + size))
            yield channels_last(part) if code_of(program) is None else part


def comparable(outputs: Any, inputs: Inputs, task: TaskSpec) -> Comparable:
    """The outputs that count for a task: the one that it judges or, where that is all, each with numbers.

    Raises:
        InputError: there is none with a value for each sample.
    """
    where = task.row.logits
    logits = task.logits(outputs) if where is not None and where.exclusive else None
    if logits is not None and logits.shape[1] > 1:
        return Comparable([logits], True)
    return Comparable([_rows(output, outputs, inputs) for output in judged_outputs(outputs, task)], False)


def judged_outputs(outputs: Any, task: TaskSpec) -> list[Any]:
    """The output that a task judges or, where it judges all together, each that holds floats."""
    judged = task.find(outputs)
    if isinstance(judged, Tensor):
        return [judged]
    return [each for each in flatten(judged).values() if each.is_floating_point()] or [judged]


def _rows(output: Any, outputs: Any, inputs: Inputs) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != batch_size(inputs):
        raise InputError(f"returns {form_of(outputs)}, nothing for each sample", where="the network")
    return output.reshape(len(output), -1)


def numbers_of(x: Tensor) -> Tensor:
    """The numbers of a tensor ``(numel,)``, in the order of the memory: a view, whatever its layout."""
    return x.detach().permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


def require_finite(value: Tensor, where: str | None = None, otherwise: str = "") -> None:
    """Refuse values of a network that hold NaN or infinity.

    Args:
        value: of a layer, or the network's logits, on calibration data.
        where: the layer or the data.
        otherwise: another next step than to check the inputs.

    Raises:
        DataError: they do.
    """
    # One pass without a temporary buffer: the extremes of values with a NaN are NaN.
    if value.numel() and not all(map(math.isfinite, torch.aminmax(numbers_of(value)))):
        hint = "check the checkpoint and the preprocessing" + (f", or {otherwise}" if otherwise else "")
        raise DataError("the network gives NaN or infinity on the calibration data", where=where, hint=hint)
