"""The parts of a network as plain data, and strictly back onto the network that calls them.

    {"reason": text, "remaining": [names], "submodules": [{"path": name, "inputs": [...], "arguments": ...}]}

``remaining`` are the tensors outside of the parts, which are among the attributes of the Program. ``inputs``
are described as those of a Program, with the names of the placeholders, in the order of the graph.
``arguments`` is a list of the positional arguments and ``{"dict": pairs}`` of the others: a tensor is
``{"input": name}``, lists and tuples are lists, and anything else is a constant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modelopt_cli.errors import ArchitectureError, ArtifactError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.metadata import MAX_NODES, MAX_TEXT, input_from_data, input_to_data, keyed, listed
from modelopt_cli.program.parts import Part, Parts
from modelopt_cli.program.safe_names import is_path, path_in_program, shown
from modelopt_cli.settings import option
from modelopt_cli.text import short

_MAX_DEPTH = 8


def parts_to_data(parts: Parts) -> dict[str, Any]:
    """The parts as JSON."""
    submodules = [
        {"path": path, "inputs": [input_to_data(e) for e in part.inputs], "arguments": part.arguments}
        for path, part in parts.by_path.items()
    ]
    reason, remaining = parts.reason[:MAX_TEXT], list(parts.remaining)
    return {"reason": reason, "remaining": remaining, "submodules": submodules}


def parts_from_data(data: Any, attributes: Mapping[str, Any], network: nn.Module | None) -> Parts:
    """The parts that ``parts_to_data`` described, of a network that has such submodules.

    Args:
        data: of a file.
        attributes: the tensors that lie in no layer, by path.
        network: whose code calls the parts.

    Raises:
        ArtifactError: it is anything else, or there is no network.
        ArchitectureError: the network has other submodules or weights.
    """
    fields = keyed(data, ("reason", "remaining", "submodules"), "parts")
    remaining = listed(fields["remaining"], "remaining tensors", MAX_NODES)
    if not all(isinstance(name, str) and name in attributes for name in remaining):
        raise ArtifactError("a remaining tensor is not among the attributes")
    if not isinstance(fields["reason"], str):
        raise ArtifactError("parts are there for a reason")
    by_path: dict[str, Part] = {}
    for entry in listed(fields["submodules"], "submodules", MAX_NODES):
        path, part = _part(entry)
        if any(path == other or path.startswith(f"{other}.") for other in by_path):
            raise ArtifactError("lies inside another part", where=path)
        by_path[path] = part
    names = [each.name for part in by_path.values() for each in part.inputs]
    if not names or len(set(names)) < len(names):
        raise ArtifactError("the inputs of parts must have names of their own")
    if network is None:
        raise ArtifactError("holds parts of a network, which its own code calls")
    _require_submodules(network, by_path)
    parts = Parts.of(network, by_path, fields["reason"])
    _require_remaining(parts, remaining)
    return parts


def _part(entry: Any) -> tuple[str, Part]:
    fields = keyed(entry, ("path", "inputs", "arguments"), "a part")
    path = fields["path"]
    if not isinstance(path, str) or not is_path(path_in_program(path)):
        raise ArtifactError(f"not a submodule's name: {shown(fields['path'])}")
    inputs: tuple[InputSpec, ...] = tuple(map(input_from_data, listed(fields["inputs"], "inputs", MAX_NODES)))
    named = list[str]()
    _check_arguments(fields["arguments"], named, 0)
    if sorted(named) != sorted(each.name for each in inputs) or any(each.others for each in inputs):
        raise ArtifactError("the arguments of a part are not its inputs", where=path)
    return path, Part(inputs, fields["arguments"])


def _check_arguments(value: Any, named: list[str], depth: int) -> None:
    """Refuse what ``described`` does not give, and collect the names of the inputs."""
    if depth > _MAX_DEPTH:
        raise ArtifactError("arguments of a part are nested too deep")
    if isinstance(value, list):
        for each in value:
            _check_arguments(each, named, depth + 1)
    elif isinstance(value, dict) and list(value) == ["input"] and isinstance(value["input"], str):
        named.append(value["input"])
    elif isinstance(value, dict) and list(value) == ["dict"] and isinstance(value["dict"], list):
        for pair in value["dict"]:
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ArtifactError("a dictionary of arguments holds pairs of a name and a value")
            _check_arguments(pair[1], named, depth + 1)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ArtifactError("an argument of a part is no constant")


def _require_submodules(network: nn.Module, by_path: Mapping[str, Part]) -> None:
    there = dict(network.named_modules(remove_duplicate=False))
    for path in by_path:
        if path not in there:
            raise ArchitectureError(
                f"{type(network).__name__} has no submodule {short(path)}, a part of the file's network",
                hint=f"give the {option('arch')} that the file was made with",
            )


def _require_remaining(parts: Parts, names: Sequence[str]) -> None:
    """Refuse a network with other weights outside of the parts than the file has."""
    missing, extra = set(parts.remaining) - set(names), set(names) - set(parts.remaining)
    if missing or extra:
        has, name = ("no" if missing else "a"), short(min(missing or extra))
        raise ArchitectureError(
            f"the file has {has} tensor {name} outside of the parts, unlike the network",
            hint=f"give the {option('arch')} that the file was made with",
        )
