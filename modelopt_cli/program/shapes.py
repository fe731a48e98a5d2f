"""Shapes of all values of a Program, without computing any."""

from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program.program import Program
from modelopt_cli.program.spec import InputSpec
from modelopt_cli.program.values import evaluation_mode, infer, meta_input


def program_values(program: Program, batch: int, shape: tuple[int, ...] | None = None) -> dict[fx.Node, Any]:
    """Every value of a Program in evaluation mode, tensors on the meta device: shape, type and structure.

    Args:
        program: not changed; nothing is computed or copied.
        batch: size of the input's first dimension.
        shape: of one sample; None means that the Program was made for.
    """
    sample = program.input if shape is None else InputSpec(shape, dtype=program.input.dtype)
    with evaluation_mode(program):
        return infer(program.graph, program, meta_input(program, sample, batch))


def value_shapes(program: Program, batch: int, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Shapes of every value, by node name; what is no tensor is kept as it is. As ``program_values``."""
    return {node.name: _shape_of(value) for node, value in program_values(program, batch, shape).items()}


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, torch.Size) or not isinstance(value, tuple | list):
        return value
    return tuple(_shape_of(part) for part in value)
