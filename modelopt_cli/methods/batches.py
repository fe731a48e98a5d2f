"""Batches of calibration data, and the output of a network by which it is compared with another one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError, InputError
from modelopt_cli.methods.context import Context
from modelopt_cli.program.input_batch import Inputs, batch_size, call, to
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.tasks.task_output import find_output, form_of

_NAMES = ("logits", "out")


def input_batches(data: Data, context: Context) -> Iterator[Inputs]:
    """The inputs of all samples in order, without their targets, on the CPU."""
    return (inputs for inputs, _ in data.batches(context.batch_size, workers=context.workers))


def output_of(network: nn.Module, inputs: Inputs, device: str) -> Tensor:
    """Main output of a network: ``logits`` or ``out``, else the only floating-point tensor, or the first.

    Raises:
        InputError: it returns none with a value for each sample.
    """
    return main_output(call(network, to(inputs, device)), inputs)


def main_output(outputs: Any, inputs: Inputs, task: TaskSpec | None = None) -> Tensor:
    """The main output among all, or that of a task; raises as ``output_of``."""
    output = find_output(outputs, _NAMES) if task is None else task.find(outputs)
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != batch_size(inputs):
        raise InputError(f"returns {form_of(outputs)}, nothing for each sample", where="the network")
    return output


def output_rows(network: nn.Module, inputs: Inputs, device: str) -> Tensor:
    """The same as a row of numbers for each sample; raises as ``output_of``."""
    return output_of(network, inputs, device).flatten(1)


def require_finite(value: Tensor, where: str | None = None, otherwise: str = "") -> None:
    """Refuse values of a network that hold NaN or infinity.

    Args:
        value: of a layer, or the network's logits, on calibration data.
        where: the layer or the data.
        otherwise: another next step than to check the inputs.

    Raises:
        DataError: they do.
    """
    if not torch.isfinite(value).all():
        hint = "check the checkpoint and the preprocessing" + (f", or {otherwise}" if otherwise else "")
        raise DataError("the network gives NaN or infinity on the calibration data", where=where, hint=hint)
