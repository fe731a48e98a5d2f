"""Forward passes of a network that is measured, and one-line errors for all that may go wrong in them."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from modelopt_cli.errors import DataError, EnvironmentFailure, InputError, ModeloptError
from modelopt_cli.program.input_batch import Inputs, batch_size, call, sample_shapes
from modelopt_cli.settings import option
from modelopt_cli.tasks import Misfit

Progress = Callable[[int, int | None], None]


@contextlib.contextmanager
def naming_samples(where: str, first: int = 0, name: Callable[[int], str] | None = None) -> Iterator[None]:
    """Around what holds a batch's targets against a network: errors say which sample or which network.

    Args:
        where: the network's file, for messages.
        first: place of the batch's first sample in the data.
        name: gives a sample's name from its place; without it the network is named.

    Raises:
        DataError: for a ``Misfit``.
    """
    try:
        yield
    except Misfit as error:
        place = where if name is None else name(first + error.place)
        raise DataError(error.message, where=place, hint=error.hint) from error
    except InputError as error:
        error.where = error.where or where
        raise


def run(model: nn.Module, inputs: Inputs, where: str) -> object:
    """One forward pass without gradients, whose failures become one line.

    Raises:
        DataError: the model does not take such samples.
        EnvironmentFailure: the memory does not suffice.
    """
    with torch.inference_mode(), failing_in_one_line(inputs, where):
        return call(model, inputs)


def smaller_batches() -> str:
    """Next step where a batch does not fit into memory."""
    return f"use smaller batches, with {option('batch_size')} or {option('data_batch_size')}"


@contextlib.contextmanager
def failing_in_one_line(inputs: Inputs, where: str) -> Iterator[None]:
    """Turn all that a model's forward pass raises into the errors that :func:`run` lists."""
    try:
        yield
    except ModeloptError as error:
        error.where = error.where or where
        raise
    except Exception as error:  # a layer may raise anything on inputs that it does not take
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if is_out_of_memory(error):
            hint = smaller_batches() if batch_size(inputs) > 1 else None
            message = f"not enough memory for a batch of {batch_size(inputs)}"
            raise EnvironmentFailure(message, where=where, hint=hint) from error
        # Batch norm says so in training.
        hint = f"raise {option('batch_size')}" if "more than 1 value per channel" in first else None
        raise DataError(
            f"cannot run on samples of {sample_shapes(inputs)}: {first}", where=where, hint=hint
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch or Python ran out of memory; torch's CPU allocator only says so in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
