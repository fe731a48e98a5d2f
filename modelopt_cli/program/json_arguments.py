"""Arguments of a call as JSON, and strictly back.

None, booleans, integers, finite floats, short plain strings and lists stand for themselves. Everything
else is an object with one key that says what it is:

    {"node": name}  {"tuple": [...]}  {"slice": [start, stop, step]}  {"ellipsis": true}
    {"float": "inf" | "-inf" | "nan"}  {"dtype": "float32"}  {"device": "cpu"}  {"memory_format": "..."}
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.safe_names import is_literal, shown

MAX_DEPTH = 6
MAX_ITEMS = 4096
MAX_INT = 2**63

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_MEMORY_FORMATS: dict[str, torch.memory_format] = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MEMORY_FORMAT_NAMES = {value: name for name, value in _MEMORY_FORMATS.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in a file.

    Raises:
        ArtifactError: a Program cannot hold tensors of this dtype.
    """
    if dtype not in _DTYPE_NAMES:
        raise ArtifactError(f"tensors of type {dtype} cannot be stored")
    return _DTYPE_NAMES[dtype]


def to_json(value: Any, depth: int = 0) -> Any:
    """A node's argument as JSON.

    Raises:
        ArtifactError: it has no form in a file.
    """
    if depth > MAX_DEPTH:
        raise ArtifactError("arguments are nested too deep")
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or type(value) is bool or (type(value) is int and abs(value) < MAX_INT):
        return value
    if type(value) is float:
        return number_to_json(value)
    if is_literal(value):
        return value
    if isinstance(value, list | tuple) and len(value) <= MAX_ITEMS:
        items = [to_json(item, depth + 1) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    return _special_to_json(value, depth)


def number_to_json(value: Any) -> Any:
    """A value with every infinite or undefined float in it tagged, since JSON has none."""
    if isinstance(value, list | tuple):
        return [number_to_json(item) for item in value]
    if type(value) is float and not math.isfinite(value):
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    return value


def _special_to_json(value: Any, depth: int) -> Any:
    if isinstance(value, slice):
        return {"slice": [to_json(part, depth + 1) for part in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": _MEMORY_FORMAT_NAMES[value]}
    raise ArtifactError(f"{shown(value)} among the arguments cannot be stored")


def from_json(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """The argument that ``to_json`` described.

    Args:
        value: parsed JSON, not trusted.
        nodes: the nodes that may be referred to: those before this one.
        depth: how deep inside the call's arguments.

    Raises:
        ArtifactError: it is anything but what ``to_json`` writes.
    """
    if depth > MAX_DEPTH:
        raise ArtifactError("arguments are nested too deep")
    if value is None or type(value) is bool or (type(value) is int and abs(value) < MAX_INT):
        return value
    if (type(value) is float and math.isfinite(value)) or is_literal(value):
        return value
    if isinstance(value, list) and len(value) <= MAX_ITEMS:
        return [from_json(item, nodes, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((tag, content),) = value.items()
        if tag in _TAGS:
            return _TAGS[tag](content, nodes, depth)
    raise ArtifactError(f"not an argument: {shown(value)}")


def number_from_json(value: Any, depth: int = 0) -> Any:
    """Undo ``number_to_json``; values of other forms come back unchanged."""
    if isinstance(value, list) and depth < MAX_DEPTH:
        return [number_from_json(item, depth + 1) for item in value]
    if isinstance(value, dict) and list(value) == ["float"]:
        return _look_up(_FLOATS)(value["float"], {}, 0)
    return value


_Reader = Callable[[Any, Mapping[str, fx.Node], int], Any]


def _look_up(table: Mapping[Any, Any]) -> _Reader:
    def read(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> Any:
        if isinstance(content, str | bool) and content in table:
            return table[content]
        raise ArtifactError(f"unknown value {shown(content)} in an argument")

    return read


def _node(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> fx.Node:
    if isinstance(content, str) and content in nodes:
        return nodes[content]
    raise ArtifactError(f"an argument refers to {shown(content)}, which does not come before it")


def _items(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> list[Any]:
    if not isinstance(content, list):
        raise ArtifactError("a tuple or slice must hold a list")
    return from_json(content, nodes, depth)  # type: ignore[no-any-return]


def _slice(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> slice:
    parts = _items(content, nodes, depth)
    if len(parts) != 3 or any(not (p is None or type(p) is int or isinstance(p, fx.Node)) for p in parts):
        raise ArtifactError("a slice has a start, a stop and a step")
    return slice(*parts)


_TAGS: dict[str, _Reader] = {
    "node": _node,
    "tuple": lambda content, nodes, depth: tuple(_items(content, nodes, depth)),
    "slice": _slice,
    "ellipsis": _look_up({True: ...}),
    "float": _look_up(_FLOATS),
    "dtype": _look_up(DTYPES),
    "device": _look_up({"cpu": torch.device("cpu")}),
    "memory_format": _look_up(_MEMORY_FORMATS),
}
