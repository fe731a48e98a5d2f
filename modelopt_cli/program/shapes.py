"""Shapes of all values of a Program, without computing any."""

from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import meta_copy
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.spec import InputSpec


def value_shapes(program: Program, batch: int, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Shapes of every value, by node name; what is no tensor is kept as it is.

    Args:
        program: not changed; nothing is computed or copied.
        batch: size of the input's first dimension.
        shape: of one sample; None means that the Program was made for.
    """
    shapes: dict[str, Any] = {}

    class _Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            shapes[n.name] = _shape_of(result)
            return result

    sample = program.input if shape is None else InputSpec(shape, dtype=program.input.dtype)
    copied = meta_copy(program).float()
    with torch.no_grad():
        _Recorder(copied).run(zeros(sample, batch, "meta"))
    return shapes


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, torch.Size) or not isinstance(value, tuple | list):
        return value
    return tuple(_shape_of(part) for part in value)
