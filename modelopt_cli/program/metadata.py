"""Metadata of a Program (input, labels, history, arch) as JSON and strictly back, with the checks for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, get_args

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.input_spec import (
    INPUT_NAME,
    INPUT_TYPE,
    InputSpec,
    InputType,
    Interpolation,
    Preprocess,
)
from modelopt_cli.program.program import Program
from modelopt_cli.program.safe_names import is_input_name

MAX_LABELS = 1_000_000
MAX_TEXT = 10_000
MAX_SIDE = 1_000_000
MAX_NODES = 20_000
"""Nodes of a graph."""
MAX_RANK = 8  # dimensions of a sample
MAX_INPUTS = 64
_PLAIN_INPUT: dict[str, Any] = {"dtype": INPUT_TYPE, "name": INPUT_NAME, "free": []}
"""Keys of an input that may be left out."""
_MAX_DEPTH = 16
_MAX_ITEMS = 1_000_000


def to_header(program: Program) -> dict[str, Any]:
    """Input, labels, history and arch as JSON."""
    return {
        "input": input_to_data(program.input),
        "labels": list(program.labels) if program.labels is not None else None,
        "history": list(program.history),
        "arch": program.arch,
    }


def input_to_data(spec: InputSpec) -> dict[str, Any]:
    """An InputSpec as JSON; all but shape and preprocessing is there if it is not what it is by default."""
    preprocess = {k: _plain(v) for k, v in asdict(spec.preprocess).items()} if spec.preprocess else None
    data: dict[str, Any] = {"shape": list(spec.shape), "preprocess": preprocess}
    data |= {} if spec.dtype == _PLAIN_INPUT["dtype"] else {"dtype": spec.dtype}
    data |= {} if spec.name == _PLAIN_INPUT["name"] else {"name": spec.name}
    data |= {"free": list(spec.free)} if spec.free else {}
    return data | ({"others": [input_to_data(other) for other in spec.others]} if spec.others else {})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def from_header(data: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``Program``.

    Raises:
        ArtifactError: it is not what ``to_header`` writes.
    """
    labels = data["labels"]
    if labels is not None:
        labels = tuple(_text(label, "a label") for label in listed(labels, "labels", MAX_LABELS))
    history = tuple(
        json_value(mapped(entry, "history")) for entry in listed(data["history"], "history", 1000)
    )
    arch = None if data["arch"] is None else _text(data["arch"], "arch")
    return {"input_spec": input_from_data(data["input"]), "labels": labels, "history": history, "arch": arch}


def input_from_data(data: Any) -> InputSpec:
    """The InputSpec that ``input_to_data`` described.

    Raises:
        ArtifactError: it is anything else.
    """
    first, *others = [_one_input(each) for each in _listed_inputs(data)]
    names = [first.name, *(other.name for other in others)]
    if len(set(names)) < len(names):
        raise ArtifactError("two inputs have the same name")
    return replace(first, others=tuple(others))


def _listed_inputs(data: Any) -> list[dict[str, Any]]:
    """The descriptions of all inputs, with all keys."""
    first = {"others": [], **_PLAIN_INPUT, **mapped(data, "input")}
    others = listed(first.pop("others"), "inputs", MAX_INPUTS - 1)
    return [first, *({**_PLAIN_INPUT, **mapped(other, "input")} for other in others)]


def _one_input(data: dict[str, Any]) -> InputSpec:
    spec = keyed(data, ("shape", "preprocess", *_PLAIN_INPUT), "input")
    listing, dtype, name = listed(spec["shape"], "shape", MAX_RANK), spec["dtype"], spec["name"]
    shape = _sides(listing, "the input shape") if listing else ()
    if dtype not in get_args(InputType):
        raise ArtifactError("unknown element type")
    if not is_input_name(name):
        raise ArtifactError("an input with an odd name")
    free = tuple(listed(spec["free"], "free sizes", MAX_RANK))
    places = range(len(shape))
    if any(type(place) is not int or place not in places for place in free) or len(set(free)) < len(free):
        raise ArtifactError("free sizes must be places in the input shape")
    return InputSpec(shape, _preprocess(spec["preprocess"]), dtype, name, free)


def _preprocess(data: Any) -> Preprocess | None:
    if data is None:
        return None
    mapping = keyed(data, tuple(f.name for f in fields(Preprocess)), "preprocess")
    resize, crop, channels = mapping["resize"], mapping["crop"], mapping["channels"]
    if isinstance(resize, list) and len(resize) == 2:
        resize = _sides(resize, "resize")
    elif resize is not None:
        (resize,) = _sides([resize], "resize")
    if type(crop) is not float and crop is not None:
        (crop,) = _sides([crop], "crop")
    if type(crop) is float and not 0.0 < crop <= 1.0:
        raise ArtifactError("crop must be pixels or a fraction")
    if (
        mapping["interpolation"] not in get_args(Interpolation)
        or type(channels) is not int
        or channels not in (1, 3)
    ):
        raise ArtifactError("unknown preprocessing")
    mean, std = (_numbers(mapping[name], name, channels) for name in ("mean", "std"))
    if min(std) <= 0:
        raise ArtifactError("std must be above 0")
    return Preprocess(resize, crop, mapping["interpolation"], mean, std, channels)


def _sides(values: Sequence[Any], name: str) -> tuple[Any, ...]:
    if not values or any(type(v) is not int or not 0 < v <= MAX_SIDE for v in values):
        raise ArtifactError(f"{name} must be positive integers")
    return tuple(values)


def _numbers(value: Any, name: str, count: int) -> tuple[float, ...]:
    values = listed(value, name, count)
    if len(values) != count or any(type(v) not in (int, float) or not abs(v) < 1e30 for v in values):
        raise ArtifactError(f"{name} must be one number for each channel")
    return tuple(float(v) for v in values)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ArtifactError(f"{name} must be a string")
    return value


def keyed(value: Any, keys: tuple[str, ...], name: str) -> dict[str, Any]:
    """``value`` as a dict with exactly these keys.

    Raises:
        ArtifactError: it is none, or has others.
    """
    mapping = mapped(value, name)
    if set(mapping) != set(keys):
        raise ArtifactError(f"{name} must have the keys {', '.join(keys)}")
    return mapping


def mapped(value: Any, name: str) -> dict[str, Any]:
    """``value`` as a dict with string keys.

    Raises:
        ArtifactError: it is none.
    """
    if (
        not isinstance(value, Mapping)
        or len(value) > _MAX_ITEMS
        or not all(isinstance(k, str) for k in value)
    ):
        raise ArtifactError(f"{name} must be an object")
    return dict(value)


def listed(value: Any, name: str, most: int) -> list[Any]:
    """``value`` as a list of at most ``most`` items.

    Raises:
        ArtifactError: it is none, or longer.
    """
    if not isinstance(value, list) or len(value) > most:
        raise ArtifactError(f"{name} must be a list of at most {most}")
    return value


def json_value(value: Any, depth: int = 0) -> Any:
    """A copy of ``value`` if it is JSON of bounded depth with finite numbers.

    Raises:
        ArtifactError: it is not.
    """
    if depth > _MAX_DEPTH:
        raise ArtifactError("the history is nested too deep")
    if isinstance(value, dict):
        return {key: json_value(item, depth + 1) for key, item in mapped(value, "history").items()}
    if isinstance(value, list):
        return [json_value(item, depth + 1) for item in value]
    if value is None or isinstance(value, str | bool) or type(value) is int:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    raise ArtifactError("the history holds something that is not JSON")
