"""Errors for inputs that a Program cannot take: their names, their number, their sizes."""

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

from torch import Tensor

from modelopt_cli.errors import InputError
from modelopt_cli.program.free_sizes import STEP
from modelopt_cli.program.input_spec import INPUT_TYPE, InputSpec
from modelopt_cli.text import first_line


def refused(
    input_spec: InputSpec,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: Exception,
    runs: Callable[[dict[str, Tensor]], bool],
) -> InputError | None:
    """The error for inputs that a Program failed on; None where they are not what is wrong.

    Args:
        input_spec: the inputs that it takes.
        args: those given by place.
        kwargs: those given by name.
        error: what was raised.
        runs: True if the Program runs on inputs by name.
    """
    names = [each.name for each in input_spec.tensors]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if given.keys() != set(names) or len(args) > len(names):
        return _misnamed(names, given, len(args))
    for each in input_spec.tensors:
        value = given[each.name]
        if isinstance(value, Tensor) and not each.fits(tuple(value.shape[1:])):
            free = f", of which dimensions {', '.join(str(p + 1) for p in each.free)} may vary"
            return InputError(
                f"{each.name} has shape {tuple(value.shape)}, and the Program takes {_shape(each)}"
                f"{free if each.free else ', a size that is fixed'}",
                hint="capture the network for the size that is needed",
            )
    return _unusable(input_spec, given, error, runs)


def _misnamed(names: list[str], given: Mapping[str, Any], by_place: int) -> InputError:
    wrong = {
        "missing": [name for name in names if name not in given],
        "unknown": [name for name in given if name not in names],
    }
    parts = [f"{', '.join(which)} {kind}" for kind, which in wrong.items() if which]
    problem = " and ".join(parts) or f"{by_place} are given"
    return InputError(
        f"the Program takes {', '.join(names)}: {problem}", hint="give all of them, by name or in this order"
    )


def _unusable(
    input_spec: InputSpec,
    given: Mapping[str, Any],
    error: Exception,
    runs: Callable[[dict[str, Tensor]], bool],
) -> InputError | None:
    """The error for a free size that the network cannot take, as an odd one before it halves its images.

    The size is to blame if the Program runs on zeros of the same types at the sizes it was captured with,
    and fails on those at the given ones.
    """
    changed = [e for e in input_spec.tensors if tuple(getattr(given[e.name], "shape", ())[1:]) != e.shape]
    if not changed or "memory" in str(error) or any(type(value) is not Tensor for value in given.values()):
        return None
    own = {each.name: given[each.name].new_zeros((1, *each.shape)) for each in input_spec.tensors}
    other = {name: value.new_zeros((1, *value.shape[1:])) for name, value in given.items()}
    if not runs(own) or runs(other):
        return None
    first = changed[0]
    shape, reason = tuple(given[first.name].shape), first_line(error).rstrip(".")
    return InputError(
        f"{first.name} has shape {shape}, a size that the network cannot take: {reason}",
        hint=_multiples(first, shape[1:]) or f"give a size nearer to {_shape(first)}",
    )


def _multiples(each: InputSpec, shape: tuple[int, ...]) -> str:
    """The multiples that capture tried, as a next step; empty where the sizes are such, or of tokens."""
    own = {place: gcd(each.shape[place], STEP) for place in each.free if each.dtype == INPUT_TYPE}
    wrong = [f"a multiple of {size} in dimension {p + 1}" for p, size in own.items() if shape[p] % size]
    return f"give {' and '.join(wrong)}, as in {_shape(each)}" if wrong else ""


def _shape(each: InputSpec) -> str:
    return f"({', '.join(map(str, ('N', *each.shape)))})"
