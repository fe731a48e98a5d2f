"""Functions that a Program may call where torch has none without side effects."""

from typing import Any

from torch import Tensor


def set_item(input: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of ``input`` after ``copy[index] = value``: the pure form of an assignment.

    Args:
        input: any tensor.
        index: what may stand in brackets: numbers, slices, ``...``, None, tensors, or a tuple of them.
        value: a number, or a tensor that broadcasts to the shape of ``input[index]``.
    """
    changed = input.clone()
    changed[index] = value
    return changed
