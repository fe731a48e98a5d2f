"""A network's outputs: tuples, lists and dictionaries, one inside the other, of tensors and None."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

MAX_DEPTH = 6
_VALUES = (Tensor, fx.Proxy, fx.Node, list, tuple, int, float, complex, str, bytes, type(None))


def plain(outputs: Any) -> Any:
    """Outputs in tuples, lists and dictionaries alone.

    A named tuple, a dataclass and a Hugging Face ``ModelOutput`` become the dictionary of their fields. Left
    out are fields with an object of another kind, such as a cache of keys and values for the next call.
    """
    named = _fields(outputs)
    if named is not None:
        return {name: plain(value) for name, value in named.items() if not _is_object(value)}
    if isinstance(outputs, tuple) and not isinstance(outputs, torch.Size):
        return tuple(map(plain, outputs))
    return list(map(plain, outputs)) if isinstance(outputs, list) else outputs


def _fields(outputs: Any) -> Mapping[Any, Any] | None:
    """The values of outputs that have names; None where they have none."""
    if isinstance(outputs, Mapping):
        return outputs
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return dict(zip(outputs._fields, outputs, strict=True))
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return None


def _is_object(value: Any) -> bool:
    """True of what is neither a tensor, nor a container of values, nor a number or text."""
    return _fields(value) is None and not isinstance(value, _VALUES)


def leaves(outputs: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Values of plain outputs that are no containers, by name: ``""`` for a sole value, ``boxes.0``."""
    if isinstance(outputs, Mapping):
        items: Iterable[tuple[Any, Any]] = outputs.items()
    elif isinstance(outputs, list | tuple) and not isinstance(outputs, torch.Size):
        items = enumerate(outputs)
    else:
        yield path, outputs
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def are_detections(outputs: Any) -> bool:
    """True of what a detector finds: ``boxes`` and ``scores``, in one dictionary or in one for each image.

    How many there are, and in which order, depends on the scores, so those of two networks do not belong
    together by their places.
    """
    images = outputs if isinstance(outputs, list | tuple) else [outputs]
    return bool(images) and all(isinstance(i, Mapping) and {"boxes", "scores"} <= i.keys() for i in images)


def flatten(outputs: Any) -> dict[str, Tensor]:
    """The tensors of outputs of any form, by name; see ``leaves``."""
    return {name: value for name, value in leaves(plain(outputs)) if isinstance(value, Tensor)}
