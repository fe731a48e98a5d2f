"""Metadata of a Program (input, labels, history, arch) as JSON and strictly back, with the checks for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, get_args

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.input_spec import InputSpec, InputType, Interpolation, Preprocess
from modelopt_cli.program.program import Program

MAX_LABELS = 1_000_000
MAX_TEXT = 10_000
MAX_SIDE = 1_000_000
MAX_NODES = 20_000
"""Nodes of a graph."""
MAX_RANK = 8  # dimensions of a sample
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
    """An InputSpec as JSON; the element type is there if it is not float32."""
    preprocess = {k: _plain(v) for k, v in asdict(spec.preprocess).items()} if spec.preprocess else None
    dtype = {} if spec.dtype == "float32" else {"dtype": spec.dtype}
    return {"shape": list(spec.shape), "preprocess": preprocess, **dtype}


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
    spec = keyed({"dtype": "float32", **mapped(data, "input")}, ("shape", "preprocess", "dtype"), "input")
    shape, dtype = _sides(listed(spec["shape"], "shape", MAX_RANK), "the input shape"), spec["dtype"]
    if dtype not in get_args(InputType):
        raise ArtifactError("unknown element type")
    if spec["preprocess"] is None:
        return InputSpec(shape, dtype=dtype)
    mapping = keyed(spec["preprocess"], tuple(f.name for f in fields(Preprocess)), "preprocess")
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
    return InputSpec(shape, Preprocess(resize, crop, mapping["interpolation"], mean, std, channels), dtype)


def _sides(values: Sequence[Any], name: str) -> tuple[Any, ...]:
    if not values or any(type(v) is not int or not 0 < v <= MAX_SIDE for v in values):
        raise ArtifactError(f"{name} must be positive whole numbers")
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
