"""ATen's operators by the names under which ``torch.export`` writes them; nothing else can be called.

A name out of a file is looked up here, never imported or evaluated.
"""

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from modelopt_cli.program.allowlist import FUNCTIONS, METHODS
from modelopt_cli.program.aten import NOTHING, ROWS

WEIGHT_NORM = "_weight_norm"
"""It makes a weight of others, and leaves the graph when that is read."""
_SPACE = "torch.ops.aten."
_ON_SIZES: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos"),
        *("lt", "le", "eq", "ne", "gt", "ge", "and_", "or_"),
    )
}


def aten_callable(name: str) -> Callable[..., Any] | None:
    """The operator, or Python's for sizes, of this name; None where a Program can hold none such.

    Args:
        name: as a file has it: ``torch.ops.aten.conv2d.default``, ``_operator.mul``.
    """
    if name in _ON_SIZES:
        return _ON_SIZES[name]
    packet, _, overload = name.removeprefix(_SPACE).partition(".")
    if not name.startswith(_SPACE) or packet not in _operators():
        return None
    return _overloads(packet).get(overload)


@cache
def _operators() -> frozenset[str]:
    """Operators that can be written as a call on the allow-list."""
    functions = {name.partition(".")[2] for name in FUNCTIONS}
    spaced = {name.replace(".", "_", 1) for name in FUNCTIONS}  # linalg_norm is torch.linalg.norm
    in_place = {f"{name.removeprefix('F.')}_" for name in FUNCTIONS if name.startswith("F.")}
    return frozenset({WEIGHT_NORM, *functions, *spaced, *in_place, *METHODS, *ROWS, *NOTHING})


@cache
def _overloads(packet: str) -> dict[str, OpOverload]:
    found = getattr(torch.ops.aten, packet, None)  # a name of our own tables
    return {} if found is None else {name: getattr(found, name) for name in found.overloads()}
