"""The arguments of a call of an ATen operator, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

# Of no consequence to what is computed, or the same everywhere in a network.
_IRRELEVANT = frozenset(
    {
        "pin_memory", "layout", "non_blocking", "cudnn_enable", "cudnn_enabled", "implicit", "device",
        "half_to_float", "benchmark", "deterministic", "allow_tf32",
    }
)  # fmt: skip
_REQUIRED = object()


def named_arguments(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of an operator's schema, without those that are its defaults."""
    schema = target._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    named = {}
    for argument in schema:
        name, default = argument.name, argument.default_value if argument.has_default_value() else _REQUIRED
        if name in given and name not in _IRRELEVANT and not _equal(given[name], default):
            named["input" if name == "self" else name] = given[name]
    return named


def _equal(value: Any, default: Any) -> bool:
    if isinstance(value, list | tuple):
        return isinstance(default, list) and list(value) == default
    return type(value) is type(default) and not isinstance(value, Tensor) and value == default
