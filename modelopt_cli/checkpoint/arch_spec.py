"""The ``--arch`` option: ``torchvision:NAME?num_classes=10`` and its relatives, parsed."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl

from modelopt_cli.errors import ArchitectureError
from modelopt_cli.text import short

Source = Literal["torchvision", "timm", "builtin", "file", "module"]
Value = int | float | bool | str | None

FORMS = "torchvision:NAME, timm:NAME, builtin:NAME, FILE.py:CALLABLE or package.module:CALLABLE"
NAMED = ("torchvision", "timm", "builtin")
"""Sources whose networks are a library's or our own, not the user's code."""

# What a spec found in a file may set: numbers and switches of a network's shape, by any library's name,
# and strings from a literal list. Anything else (``checkpoint_path``, ``weights``) could read files.
_FOUND_NUMBERS = frozenset(
    {
        "num_classes", "in_channels", "in_chans", "width", "width_mult", "image_size", "img_size",
        "output_stride", "dropout", "attention_dropout", "stochastic_depth_prob", "drop_rate",
        "drop_path_rate", "aux_logits", "transform_input", "init_weights",
    }
)  # fmt: skip
_FOUND_STRINGS = {"global_pool": frozenset({"", "avg", "max", "avgmax", "catavgmax", "fast", "token", "map"})}
_FOUND_LARGEST = 4096

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
        raise ArchitectureError(f"--arch '{short(text)}' is none of {FORMS}")
    options = _options(query, text) if mark else {}
    if place in NAMED:
        return ArchSpec(text, place, "", name, options)  # type: ignore[arg-type]
    return ArchSpec(text, "file" if place.endswith(".py") else "module", place, name, options)


def check_found_spec(text: str, largest: int, where: str) -> None:
    """Refuse a spec that was found in a file unless all it can do is to build a network of bounded size.

    Args:
        text: the spec.
        largest: the longest side of the file's tensors, which bounds what a number may ask for.
        where: the file, for the message.

    Raises:
        ArchitectureError: it names the user's code, or an option that is not on the list of those whose
            values are plain numbers, switches and known words.
    """
    spec = parse_spec(text)
    hint = f"if you trust it, name '{short(text)}' yourself"
    if spec.source not in NAMED:
        raise ArchitectureError("names code as its architecture, which was not run", where=where, hint=hint)
    for name, value in spec.options.items():
        if not _may_be_found(name, value, max(largest, _FOUND_LARGEST)):
            what = f"its architecture sets '{short(name)}', which is not taken from a file"
            raise ArchitectureError(what, where=where, hint=hint)


def _may_be_found(name: str, value: Value, largest: int) -> bool:
    if isinstance(value, str):
        return value in _FOUND_STRINGS.get(name, ())
    return name in {*_FOUND_NUMBERS, *_FOUND_STRINGS} and (value is None or 0 <= value <= largest)


def _options(query: str, text: str) -> dict[str, Value]:
    try:
        if not query:
            raise ValueError("nothing after the question mark")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=64)
    except ValueError as error:
        raise ArchitectureError(
            f"--arch '{short(text)}': the part after '?' is not name=value&name=value"
        ) from error
    options: dict[str, Value] = {}
    for key, value in pairs:
        if not key.isidentifier() or key in options:
            why = "is given twice" if key in options else "is not a name"
            raise ArchitectureError(f"--arch '{short(text)}': option '{short(key)}' {why}")
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
