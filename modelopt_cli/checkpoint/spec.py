"""The ``--arch`` option: ``torchvision:NAME?num_classes=10`` and its relatives, parsed."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl

from modelopt_cli.checkpoint.text import printable
from modelopt_cli.errors import ArchitectureError

Source = Literal["torchvision", "timm", "builtin", "file", "module"]
Value = int | float | bool | str | None

FORMS = "torchvision:NAME, timm:NAME, builtin:NAME, FILE.py:CALLABLE or package.module:CALLABLE"
_LITERALS: dict[str, Value] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class ArchSpec:
    """A parsed ``--arch``.

    Attributes:
        text: as it was given.
        source: where the network comes from.
        place: the file or package; empty for the named sources.
        name: the network's or callable's name.
        options: keyword arguments for it.
    """

    text: str
    source: Source
    place: str
    name: str
    options: dict[str, Value]


def parse_spec(text: str) -> ArchSpec:
    """Split a spec into source, place, name and options.

    Raises:
        ArchitectureError: it has none of the forms.
    """
    target, mark, query = text.partition("?")
    place, colon, name = target.rpartition(":")
    if not colon and target.endswith(".py"):
        place, name = target, ""
    elif not colon or not place or not name:
        raise ArchitectureError(f"--arch '{printable(text)}' is none of {FORMS}")
    options = _options(query, text) if mark else {}
    if place in ("torchvision", "timm", "builtin"):
        return ArchSpec(text, place, "", name, options)  # type: ignore[arg-type]
    return ArchSpec(text, "file" if place.endswith(".py") else "module", place, name, options)


def _options(query: str, text: str) -> dict[str, Value]:
    try:
        if not query:
            raise ValueError("nothing after the question mark")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=64)
    except ValueError as error:
        raise ArchitectureError(
            f"--arch '{printable(text)}': the part after '?' is not name=value&name=value"
        ) from error
    options: dict[str, Value] = {}
    for key, value in pairs:
        if not key.isidentifier() or key in options:
            why = "is given twice" if key in options else "is not a name"
            raise ArchitectureError(f"--arch '{printable(text)}': option '{printable(key)}' {why}")
        options[key] = _literal(value)
    return options


def _literal(value: str) -> Value:
    if value.lower() in _LITERALS:
        return _LITERALS[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
