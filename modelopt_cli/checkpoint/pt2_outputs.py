"""The containers that a network in a ``.pt2`` file returns its tensors in."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modelopt_cli.artifact import strictjson
from modelopt_cli.errors import ArtifactError, CaptureError
from modelopt_cli.program.metadata import listed, mapped
from modelopt_cli.program.output_structure import MAX_DEPTH
from modelopt_cli.text import short

_MAX_TEXT = 1 << 20
_MAX_ITEMS = 4096
_NAMED_TUPLE = "collections.namedtuple"
_END = object()


def output_structure(text: Any, fields: Mapping[str, Any], values: Sequence[Any]) -> Any:
    """Arrange the outputs of a network in the tuples, lists and dictionaries that it returns.

    A named tuple and a class of a library's own that has names, such as a Hugging Face ``ModelOutput``,
    become the dictionary of their fields.

    Args:
        text: JSON of a pytree's specification; not trusted.
        fields: names of the fields of named tuples, by the name of their type.
        values: in order.

    Raises:
        ArtifactError: it is malformed, or has another number of values.
        CaptureError: the network returns an object without names.
    """
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        raise ArtifactError("the outputs are not described")
    version_and_tree = strictjson.parse(b'{"spec":' + text.encode() + b"}", ArtifactError, "")["spec"]
    version, tree = listed(version_and_tree, "the outputs", 2)
    if version != 1:
        raise CaptureError(f"describes its outputs in version {short(version)}")
    pending = iter(values)
    structure = _structure(tree, fields, pending, 0)
    if next(pending, _END) is not _END:
        raise ArtifactError("the outputs are not as many as described")
    return structure


def _structure(tree: Any, fields: Mapping[str, Any], pending: Iterator[Any], depth: int) -> Any:
    node = mapped(tree, "the outputs")
    kind, children = node["type"], listed(node["children_spec"], "outputs", _MAX_ITEMS)
    if depth > MAX_DEPTH:
        raise ArtifactError(f"more than {MAX_DEPTH} containers of outputs, one inside the other")
    if kind is None:
        value = next(pending, _END)
        if value is _END:
            raise ArtifactError("the outputs are not as many as described")
        return value
    items = [_structure(child, fields, pending, depth + 1) for child in children]
    if kind == "builtins.tuple":
        return tuple(items)
    if kind == "builtins.list":
        return items
    names = _names(str(kind), node["context"], fields)
    if len(names) != len(items) or len(set(names)) != len(names):
        raise CaptureError(f"returns {short(kind)}, which has no names for its values")
    return dict(zip(names, items, strict=True))


def _names(kind: str, context: Any, fields: Mapping[str, Any]) -> list[str]:
    if kind == _NAMED_TUPLE:
        names: Any = mapped(fields.get(str(context), {}), "a named tuple").get("field_names")
    else:
        try:
            names = json.loads(context)
        except (TypeError, ValueError, RecursionError):
            names = None
    return [str(name) for name in names] if isinstance(names, list) else []
