"""Names and shapes of known networks, packed so that equal blocks are stored once.

``fingerprints.json`` is written by ``tools/fingerprints.py``. Layer names form a tree
(``layer1.0.conv1.weight``); equal subtrees, which deep networks are made of, share one node. A node is
either a leaf, ``[64, 3, 7, 7]``, or a mapping from a name's next part to the index of another node.
Dimensions that depend on the number of classes are ``"C"``, or ``"4C"`` where there are four for each;
those that depend on the image size are ``"S"``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from modelopt_cli.checkpoint.tensor_names import Pattern
from modelopt_cli.program.input_spec import InputSpec, Preprocess

VERSION = 1
CLASSIFICATION, IMAGENET_CLASSES = "classification", 1000


@dataclass(frozen=True)
class Fingerprint:
    """One torchvision network.

    Attributes:
        name: torchvision's, with ``?option=value`` where it is a variant.
        tensors: pattern of every parameter and buffer, batch-norm counters left out.
        inputs: what its published weights expect, the first set's first; several differ in crop.
        kind: ``classification``, or the module of torchvision that has it.
        classes: number of classes of its published weights; None where it has none.
    """

    name: str
    tensors: Mapping[str, Pattern]
    inputs: tuple[InputSpec, ...]
    kind: str = CLASSIFICATION
    classes: int | None = IMAGENET_CLASSES


class Packer:
    """Collects trees into one list of nodes, equal ones once."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, tensors: Mapping[str, Pattern]) -> int:
        """Index of the node that holds all of a network's patterns."""
        tree: dict[str, Any] = {}
        for name, pattern in tensors.items():
            *parents, leaf = name.split(".")
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[leaf] = list(pattern)
        return self._intern(tree)

    def _intern(self, node: Any) -> int:
        packed = (
            {part: self._intern(child) for part, child in node.items()} if isinstance(node, dict) else node
        )
        key = json.dumps(packed)
        if key not in self._index:
            self._index[key] = len(self.nodes)
            self.nodes.append(packed)
        return self._index[key]


def unpack(nodes: list[Any], index: int, prefix: str = "") -> Iterator[tuple[str, Pattern]]:
    """Names and patterns below a node."""
    node = nodes[index]
    if isinstance(node, list):
        yield prefix, tuple(node)
    else:
        for part, child in node.items():
            yield from unpack(nodes, child, f"{prefix}.{part}" if prefix else part)


def pack_input(spec: InputSpec) -> dict[str, Any]:
    """An input as JSON, the way the table stores it."""
    preprocess = spec.preprocess
    if preprocess is None:
        return {"shape": list(spec.shape), "names": [each.name for each in spec.tensors]}
    resize = preprocess.resize
    return {
        "resize": list(resize) if isinstance(resize, tuple) else resize,
        "crop": preprocess.crop,
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def _unpack_input(data: Mapping[str, Any]) -> InputSpec:
    if "shape" in data:
        first, *others = (InputSpec(tuple(data["shape"]), name=name) for name in data["names"])
        return replace(first, others=tuple(others))
    resize = tuple(data["resize"]) if isinstance(data["resize"], list) else data["resize"]
    preprocess = Preprocess(
        resize=resize,
        crop=data["crop"],
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
    return InputSpec((3, *(resize if data["crop"] is None else (data["crop"],) * 2)), preprocess)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files(__package__).joinpath("fingerprints.json").read_text("utf-8"))
    return table


@cache
def fingerprints() -> dict[str, Fingerprint]:
    """Every known torchvision network, by name."""
    table = _table()
    return {
        name: Fingerprint(
            name,
            dict(unpack(table["nodes"], entry["root"])),
            tuple(_unpack_input(data) for data in entry["inputs"]),
            *_kind(entry),
        )
        for name, entry in table["networks"].items()
    }


@cache
def torchvision_inputs() -> dict[str, tuple[InputSpec, ...]]:
    """Inputs by plain network name; cheaper than the fingerprints themselves."""
    networks = _table()["networks"].items()
    return {name: tuple(map(_unpack_input, entry["inputs"])) for name, entry in networks if "?" not in name}


def kind_of(name: str) -> tuple[str, int | None]:
    """Kind of a network by its plain name, and the number of classes of its published weights."""
    return _kind(_table()["networks"][name])


def _kind(entry: Mapping[str, Any]) -> tuple[str, int | None]:
    return entry.get("kind", CLASSIFICATION), entry.get("classes", IMAGENET_CLASSES)
