"""Hyperparameters of a layer as data: one line of text declares each one's name, type and range.

A field is written ``name:type``; ``name@parameter`` is a switch, true where the layer has that parameter.

    int       any integer            size      0 or more            count     1 or more
    few       1 to 1,000
    float     finite or infinite          level     0 or more, finite    positive  above 0
    fraction  0 to 1                      bool
    ints      integers               sizes     0 or more each       counts    1 or more each
    targets   sizes, or None for "as the input"     positives            above 0 each
    pad       sizes, or "same" or "valid"
    bits      2 to 8, of integers
    q         scale and zero point of uint8 values, and their bits where those are not 8
    a|b|c     one of these strings

A type of several is a number or a list of up to 8. A digit after it says how many the list must have
(``counts2``: an int or two of them), ``x`` before the digit that it must be a list (``countsx2``). ``?`` at
the end allows None. ``=8`` at the end is a default: a value like it is left out.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

MAX_LIST = 8
MAX_INT = 2**40
MAX_SIDE = 2**31 - 1
"""Limit of the numbers in lists: windows, strides, paddings, which torch holds in 32 bits in places."""


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter: constructor name, where it is read from, and its type.

    ``presence`` fields are booleans read from whether the attribute is None. A value equal to ``default`` is
    left out of the data.
    """

    name: str
    attribute: str
    type: str
    presence: bool = False
    default: int | None = None

    def read(self, module: nn.Module) -> Any:
        """The JSON-able value this instance has."""
        value = getattr(module, self.attribute)
        if self.presence:
            return value is not None
        return list(value) if isinstance(value, tuple) else value

    def check(self, value: Any) -> Any:
        """The constructor argument for a value out of a file.

        Raises:
            ValueError: the value is not of this field's type, or out of its range.
        """
        if value is None:
            if not self.type.endswith("?"):
                raise ValueError(f"{self.name} is missing")
            return None
        base = self.type.removesuffix("?")
        if not _accepts(base, value):
            raise ValueError(f"{self.name} must be {_in_words(base)}")
        return tuple(value) if isinstance(value, list) else value


def parse_fields(text: str) -> tuple[Hyperparameter, ...]:
    """The fields that a line of text declares."""
    fields = []
    for item in text.split():
        if "@" in item:
            name, attribute = item.split("@")
            fields.append(Hyperparameter(name, attribute, "bool", presence=True))
        else:
            name, type_ = item.split(":")
            type_, _, default = type_.partition("=")
            fields.append(Hyperparameter(name, name, type_, default=int(default) if default else None))
    return tuple(fields)


def checked_config(fields: tuple[Hyperparameter, ...], config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments for hyperparameters out of a file.

    Raises:
        ValueError: one is missing, unknown, of another type or out of range.
    """
    names = {field.name for field in fields}
    defaults = {field.name: field.default for field in fields if field.default is not None}
    if not set(config) <= names or not names - set(defaults) <= set(config):
        raise ValueError(f"expected the fields {', '.join(sorted(names - set(defaults)))}")
    given = {**defaults, **config}
    return {field.name: field.check(given[field.name]) for field in fields}


def _is_int(value: Any, low: int = -MAX_INT, high: int = MAX_INT) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and not math.isnan(value))


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_q(value: Any) -> bool:
    few = isinstance(value, list) and len(value) in (2, 3)
    return few and type(value[0]) is float and all(map(_is_int, value[1:]))  # their ranges are QParams' own


_ONE: dict[str, Callable[[Any], bool]] = {
    "int": _is_int,
    "size": lambda v: _is_int(v, 0),
    "count": lambda v: _is_int(v, 1),
    "few": lambda v: _is_int(v, 1, 1000),
    "float": _is_number,
    "level": lambda v: _is_finite(v) and v >= 0,
    "positive": lambda v: _is_number(v) and v > 0,
    "fraction": lambda v: _is_number(v) and 0 <= v <= 1,
    "bool": lambda v: type(v) is bool,
    "bits": lambda v: _is_int(v, 2, 8),
    "q": _is_q,
}
_EACH: dict[str, Callable[[Any], bool]] = {
    "ints": lambda v: _is_int(v, -MAX_SIDE, MAX_SIDE),
    "sizes": lambda v: _is_int(v, 0, MAX_SIDE),
    "counts": lambda v: _is_int(v, 1, MAX_SIDE),
    "targets": lambda v: v is None or _is_int(v, 0, MAX_SIDE),
    "pad": lambda v: _is_int(v, 0, MAX_SIDE),
    "positives": _ONE["positive"],
}
_SEVERAL = re.compile(r"([a-z]+?)(x?)(\d?)")
_WORDS = {
    "int": "an integer",
    "size": "an integer of at least 0",
    "count": "an integer of at least 1",
    "few": "an integer from 1 to 1,000",
    "float": "a number",
    "level": "a number of at least 0",
    "positive": "a number above 0",
    "fraction": "a number from 0 to 1",
    "bool": "true or false",
    "bits": "an integer from 2 to 8",
    "q": "a scale, a zero point and perhaps bits",
    "ints": "integers",
    "sizes": "integers of at least 0",
    "counts": "integers of at least 1",
    "targets": "integers of at least 0, or none",
    "pad": 'integers of at least 0, "same" or "valid"',
    "positives": "numbers above 0",
}


def _accepts(base: str, value: Any) -> bool:
    if base in _ONE:
        return _ONE[base](value)
    if "|" in base:
        return isinstance(value, str) and value in base.split("|")
    name, strict, length = _several(base)
    if name == "pad" and isinstance(value, str):
        return value in ("same", "valid")
    if not isinstance(value, list):
        return not strict and _EACH[name](value)
    right = len(value) == int(length) if length else 0 < len(value) <= MAX_LIST
    return right and all(map(_EACH[name], value))


def _in_words(base: str) -> str:
    if "|" in base:
        return base
    if base in _WORDS:
        return _WORDS[base]
    name, _, length = _several(base)
    return f"{length} {_WORDS[name]}"


def _several(base: str) -> tuple[str, str, str]:
    match = _SEVERAL.fullmatch(base)
    assert match is not None, base
    name, strict, length = match.groups()
    return name, strict, length
