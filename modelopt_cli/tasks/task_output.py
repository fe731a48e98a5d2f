"""Finding of the output that a task judges, in whatever a network returns."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.settings import did_you_mean, option


def find_output(outputs: Any, names: Sequence[str], wanted: str | None = None) -> Tensor | None:
    """The output that is judged and learned.

    Args:
        outputs: of any structure.
        names: that are looked for, in this order; else it is the only floating-point tensor, or the first.
        wanted: the name that the user gave.

    Returns:
        The tensor; None where there is none.

    Raises:
        UsageError: there is none of the name that the user gave.
    """
    if isinstance(outputs, Tensor) and wanted is None:
        return outputs
    by_name = flatten(outputs)
    if wanted is not None:
        if wanted not in by_name:
            hint = did_you_mean(wanted, by_name) or f"there are {', '.join(map(repr, by_name)) or 'none'}"
            raise UsageError(f"the network has no output {wanted!r}", where=option("output_name"), hint=hint)
        return by_name[wanted]
    for name in names:
        if name in by_name:
            return by_name[name]
    return next((tensor for tensor in by_name.values() if tensor.is_floating_point()), None)


def form_of(outputs: Any) -> str:
    """Shape of a tensor, or else the type of an output, for a message."""
    return str(tuple(outputs.shape)) if isinstance(outputs, Tensor) else type(outputs).__name__


def require(holds: bool, outputs: Any, samples: int, network: str, form: str, hint: str) -> None:
    """Refuse outputs of another form.

    Args:
        holds: True if their form is right.
        outputs: that were returned.
        samples: number of samples in the batch.
        network: what returns the right form, such as ``a classifier``.
        form: the right form, without parentheses and the number of samples.
        hint: what to do next.

    Raises:
        InputError: unless ``holds``.
    """
    if not holds:
        raise InputError(
            f"returned {form_of(outputs)} for {samples} samples where {network} returns ({samples}, {form})",
            hint=hint,
        )


def finite(output: Tensor) -> Tensor:
    """An output in float32, or float64 where it is that.

    Raises:
        InputError: it holds a NaN.
    """
    checked = output if output.dtype == torch.float64 else output.float()
    if torch.isnan(checked).any():
        raise InputError("the network's output is not a number (NaN)", hint="check its weights")
    return checked
