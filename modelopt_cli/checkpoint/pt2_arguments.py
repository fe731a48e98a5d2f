"""Arguments of calls in the graph of a ``.pt2`` file: JSON to values, each kind by a row of one table.

The format is that of ``torch/_export/serde/schema.py`` (torch 2.13): a value is an object with one key, which
says what it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from modelopt_cli.errors import ArtifactError, CaptureError
from modelopt_cli.program.metadata import listed, mapped
from modelopt_cli.program.safe_names import shown
from modelopt_cli.text import short

MAX_ITEMS = 1 << 16
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool,
    13: torch.bfloat16,
}  # fmt: skip
"""``ScalarType``."""
STRIDED = 7
"""The one of ``Layout`` that is dense."""
_MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format,
}  # fmt: skip
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_MAX_INTEGER = 1 << 63
_MAX_TEXT = 1000

Values = Mapping[str, fx.Node]
"""Nodes of the graph made so far, by the names that the file gives them."""
_Read = Callable[[Any, Values], Any]


def argument(data: Any, values: Values) -> Any:
    """The value that an argument stands for.

    Args:
        data: JSON; not trusted.
        values: what it may refer to.

    Raises:
        ArtifactError: it is malformed, or refers to what is not there.
        CaptureError: it is of a kind that a Program cannot hold.
    """
    kind, value = single(data, "an argument")
    if kind not in _KINDS:
        raise CaptureError(f"has arguments of the kind {short(kind.removeprefix('as_'))}")
    return _KINDS[kind](value, values)


def single(data: Any, name: str) -> tuple[str, Any]:
    """The key and the value of an object that has one.

    Raises:
        ArtifactError: it has not.
    """
    items = list(mapped(data, name).items())
    if len(items) != 1:
        raise ArtifactError(f"{name} must say what it is, once")
    return items[0]


def pairs(first: Sequence[Any], second: Sequence[Any], names: str) -> list[tuple[Any, Any]]:
    """The values of two lists, place by place.

    Args:
        first: one list.
        second: the other one.
        names: of both, such as "outputs and output_specs".

    Raises:
        ArtifactError: they have different lengths.
    """
    if len(first) != len(second):
        raise ArtifactError(f"has {names} of different lengths, {len(first)} and {len(second)}")
    return list(zip(first, second, strict=True))


def name_in(data: Any, key: str = "name") -> str:
    """The name in an object.

    Raises:
        ArtifactError: there is none.
    """
    name = mapped(data, "a value").get(key)
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_TEXT:
        raise ArtifactError(f"not a name: {shown(name)}")
    return name


def integer(value: Any) -> int:
    """An integer of 64 bits.

    Raises:
        ArtifactError: it is none.
    """
    if type(value) is not int or not -_MAX_INTEGER <= value < _MAX_INTEGER:
        raise ArtifactError(f"not an integer of 64 bits: {shown(value)}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        raise ArtifactError(f"not a number: {shown(value)}")
    return float(value)


def _switch(value: Any) -> bool:
    if type(value) is not bool:
        raise ArtifactError(f"neither true nor false: {shown(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ArtifactError(f"not a text: {shown(value)}")
    return value


def _tensor(value: Any, values: Values) -> fx.Node:
    name = name_in(value)
    if name not in values:
        raise ArtifactError(f"refers to {shown(name)}, which is not defined before")
    return values[name]


def _of_size(data: Any, values: Values) -> Any:
    """A size: a number, or the name of one that is computed."""
    kind, value = single(data, "a size")
    if kind == "as_name":
        return _tensor({"name": value}, values)
    plain = {"as_int": integer, "as_float": _number, "as_bool": _switch}
    if kind not in plain:
        raise ArtifactError(f"not a size: {shown(kind)}")
    return plain[kind](value)


def _optional(data: Any, values: Values) -> Any:
    kind, value = single(data, "a tensor or nothing")
    if kind not in ("as_none", "as_tensor"):
        raise ArtifactError(f"neither a tensor nor nothing: {shown(kind)}")
    return _tensor(value, values) if kind == "as_tensor" else None


def _plain(read: Callable[[Any], Any]) -> _Read:
    return lambda value, values: read(value)


def _each(read: _Read) -> _Read:
    return lambda value, values: [read(item, values) for item in listed(value, "a list", MAX_ITEMS)]


def _one_of(table: Mapping[int, Any], name: str) -> _Read:
    def read(value: Any, values: Values) -> Any:
        if type(value) is not int:
            raise ArtifactError(f"not a {name}: {shown(value)}")
        if value not in table:
            raise CaptureError(f"names the {name} {value}")
        return table[value]

    return read


def _device(value: Any, values: Values) -> torch.device:
    """The device that all is read to, whichever is named."""
    mapped(value, "a device")
    return torch.device("cpu")


_KINDS: dict[str, _Read] = {
    "as_none": lambda value, values: None,
    "as_int": _plain(integer),
    "as_float": _plain(_number),
    "as_bool": _plain(_switch),
    "as_string": _plain(_text),
    "as_ints": _each(_plain(integer)),
    "as_floats": _each(_plain(_number)),
    "as_bools": _each(_plain(_switch)),
    "as_tensor": _tensor,
    "as_tensors": _each(_tensor),
    "as_optional_tensor": _optional,
    "as_optional_tensors": _each(_optional),
    "as_sym_int": _of_size,
    "as_sym_float": _of_size,
    "as_sym_bool": _of_size,
    "as_sym_ints": _each(_of_size),
    "as_sym_floats": _each(_of_size),
    "as_sym_bools": _each(_of_size),
    "as_scalar_type": _one_of(DTYPES, "element type"),
    "as_layout": _one_of({STRIDED: torch.strided}, "layout"),
    "as_memory_format": _one_of(_MEMORY_FORMATS, "memory format"),
    "as_device": _device,
}
"""Kind of an argument to how it is read."""
