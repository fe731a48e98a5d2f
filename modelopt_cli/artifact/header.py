"""The artifact's header: what it says, byte for byte, and the digest that guards the file.

The JSON under the one metadata key ``modelopt`` has ``digest`` as its first key, and that metadata is
the first thing in the file, so the 64 digest characters stand at the same offset in every artifact.
"""

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from modelopt_cli.artifact import strictjson
from modelopt_cli.artifact.container import METADATA, Layout, TensorInfo, check_names, is_size
from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.metadata import MAX_NODES, input_from_data, input_to_data

FORMAT = 1
KEY = "modelopt"
BLANK = "0" * 64
PREFIX = b'{"__metadata__":{"modelopt":"{\\"digest\\":\\"'
"""Beginning of every artifact's header; the digest follows at once."""

DIGEST_AT = 8 + len(PREFIX)
"""Offset of the digest in the file."""

_DAMAGED_BYTES = len(PREFIX) // 4
"""Bytes of the prefix that may be wrong in a file that is still taken for a damaged artifact."""

ONCE = ("arch", "history", "input", "labels")
"""Fields of a Program's data form that every artifact holds itself, so ``program`` leaves them out."""

_FIELDS = {"digest", "format", "history", "input", "labels", "network", "parameters", "program", "tied"}


Kind = tuple[str, tuple[int, ...]]
"""Element type and shape of a tensor of the file."""


@dataclass(frozen=True)
class StoredParameter:
    """Storage of one parameter: ``parts`` maps the codec's part names to tensors of the file."""

    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    parts: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """Everything that an artifact says next to its tensors.

    Attributes:
        parameters: in state-dict order.
        tied: name of a parameter to the name of the one that holds its storage.
        program: the graph as data, or None where there is none.
        network: the architecture spec, needed to rebuild the network where it does not stand alone.
        input: shape and preprocessing of one sample.
        labels: class names in logit order.
        history: one object for each method applied, oldest first.
    """

    parameters: tuple[StoredParameter, ...]
    tied: dict[str, str] = field(default_factory=dict)
    program: dict[str, Any] | None = None
    network: str | None = None
    input: InputSpec | None = None
    labels: tuple[str, ...] | None = None
    history: tuple[dict[str, Any], ...] = ()

    @property
    def stands_alone(self) -> bool:
        """True if the network can be built from the file: it has a graph, and that is no graph of parts."""
        return self.program is not None and "parts" not in self.program

    def to_json(self, digest: str = BLANK) -> dict[str, Any]:
        """The object stored under ``modelopt``, as plain JSON values."""
        # The type of the first input stands there whatever it is: files have always had it.
        about = None if self.input is None else {"dtype": self.input.dtype, **input_to_data(self.input)}
        data = {"digest": digest, "format": FORMAT, **asdict(replace(self, input=None)), "input": about}
        return cast(dict[str, Any], json.loads(strictjson.canonical(data)))

    def same(self, other: "Document") -> bool:
        """True if both are written with the same bytes."""
        return strictjson.canonical(self.to_json()) == strictjson.canonical(other.to_json())


def header_bytes(stated: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bytes:
    """Length, JSON and padding of a whole header.

    Args:
        stated: the object under ``modelopt``, its digest blank.
        tensors: in file order.
    """
    outer: dict[str, Any] = {METADATA: {KEY: strictjson.canonical(stated).decode()}}
    for name, info in tensors.items():
        offsets = [info.start, info.end]
        outer[name] = {"data_offsets": offsets, "dtype": info.dtype, "shape": list(info.shape)}
    # Canonical piece by piece: the keys of the outer object follow the data, not the alphabet.
    text = b",".join(strictjson.canonical({key: value})[1:-1] for key, value in outer.items())
    padded = b"{" + text + b"}"
    padded += b" " * (-len(padded) % 8)
    return struct.pack("<Q", len(padded)) + padded


def with_digest(header: bytes, digest: str) -> bytes:
    """The header with ``digest`` in its place."""
    return header[:DIGEST_AT] + digest.encode() + header[DIGEST_AT + len(BLANK) :]


def digest_of(blank_header: bytes, data: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the whole file with the digest field blank."""
    sha = hashlib.sha256(blank_header)
    for chunk in data:
        sha.update(chunk)
    return sha.hexdigest()


def arrange(parts: Mapping[str, Kind]) -> dict[str, TensorInfo]:
    """Place tensors: widest elements first, then by name, which keeps each aligned to its element size."""
    order = sorted(parts, key=lambda name: (-DTYPES[parts[name][0]].itemsize, name))
    return in_order({name: parts[name] for name in order})


def in_order(parts: Mapping[str, Kind]) -> dict[str, TensorInfo]:
    """Place tensors as they come, with no gap."""
    position, placed = 0, {}
    for name, (dtype, shape) in parts.items():
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        placed[name] = TensorInfo(dtype, shape, position, end)
        position = end
    return placed


def begins_like_artifact(head: bytes) -> bool:
    """True if a file's first bytes are an artifact's, or a damaged artifact's: the digest then decides.

    A file whose mark is damaged must not pass for a checkpoint, whose bytes nothing guards.
    """
    start = head[8:DIGEST_AT]
    wrong = sum(a != b for a, b in zip(start, PREFIX, strict=False))
    return len(start) == len(PREFIX) and wrong <= _DAMAGED_BYTES


def parse_stated(layout: Layout, where: str) -> dict[str, Any]:
    """The JSON object under ``modelopt``, of a version that is known.

    Raises:
        ArtifactError: not ours, or from a newer version.
    """
    if KEY not in layout.metadata:
        hint = "give it as a checkpoint"
        raise ArtifactError("is a safetensors file but not a modelopt artifact", where=where, hint=hint)
    data = strictjson.parse(layout.metadata[KEY].encode(), ArtifactError, where)
    version = data.get("format")
    if type(version) is int and version > FORMAT:
        hint = "update modelopt to read it"
        raise ArtifactError(f"has format version {version}, newer than {FORMAT}", where=where, hint=hint)
    with damaged(where):
        expect(len(layout.metadata) == 1, "metadata next to its own")
    return data


def parse_document(data: dict[str, Any], layout: Layout, where: str) -> tuple[Document, str]:
    """The checked document and the digest it states.

    Args:
        data: the document's JSON.
        layout: where the tensors are that it speaks of.
        where: the file, for messages.

    Raises:
        ArtifactError: not as the format demands.
    """
    with damaged(where):
        document = _document(data)
        _check_parts(document, layout)
    return document, data["digest"]


@contextlib.contextmanager
def damaged(where: str) -> Iterator[None]:
    """Say of the file what is wrong with its header."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(
            f"has {error.message}", where=where, hint="the file is damaged or forged"
        ) from None


def expect(condition: bool, problem: str) -> None:
    """Raise ArtifactError(what) unless ``condition`` holds; see :func:`damaged`."""
    if not condition:
        raise ArtifactError(problem)


def _document(data: dict[str, Any]) -> Document:
    expect(data.keys() == _FIELDS, "missing or unknown header fields")
    expect(data["format"] == FORMAT and type(data["format"]) is int, "a bad format version")
    digest, network, program, history = data["digest"], data["network"], data["program"], data["history"]
    expect(
        isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef"),
        "a bad digest",
    )
    expect(network is None or isinstance(network, str), "a bad network")
    expect(program is None or isinstance(program, dict), "a bad program")
    nodes = (program or {}).get("nodes")
    expect(
        not isinstance(nodes, list) or len(nodes) <= MAX_NODES, f"a graph of more than {MAX_NODES:,} nodes"
    )
    expect(not any(key in (program or {}) for key in ONCE), "a program that repeats other fields")
    expect(_is_list(history, dict), "a bad history")
    expect(data["labels"] is None or _is_list(data["labels"], str), "bad labels")
    expect(_is_list(data["parameters"], dict), "bad parameters")
    expect(_is_map(data["tied"]), "a bad list of tied parameters")
    return Document(
        parameters=tuple(_parameter(entry) for entry in data["parameters"]),
        tied=data["tied"],
        program=program,
        network=network,
        input=input_from_json(data["input"]),
        labels=None if data["labels"] is None else tuple(data["labels"]),
        history=tuple(history),
    )


def _parameter(entry: dict[str, Any]) -> StoredParameter:
    fields = {"codec", "dtype", "name", "params", "parts", "shape"}
    expect(entry.keys() == fields, "a parameter with missing or unknown fields")
    check_names([entry["name"]], "", ArtifactError)
    strings = isinstance(entry["codec"], str) and isinstance(entry["dtype"], str)
    expect(strings and entry["dtype"] in DTYPES, "a parameter of unknown codec or dtype")
    shape = entry["shape"]
    expect(_is_list(shape, int) and len(shape) <= 64 and all(is_size(n) for n in shape), "a bad shape")
    expect(isinstance(entry["params"], dict), "bad codec settings")
    expect(_is_map(entry["parts"]) and len(entry["parts"]) > 0, "bad codec parts")
    return StoredParameter(**{**entry, "shape": tuple(shape)})


def _check_parts(document: Document, layout: Layout) -> None:
    """Every tensor belongs to exactly one parameter, and every name stands for one thing."""
    names = [parameter.name for parameter in document.parameters]
    expect(len(set(names)) == len(names), "a parameter twice")
    used = [part for parameter in document.parameters for part in parameter.parts.values()]
    expect(len(set(used)) == len(used), "a tensor used twice")
    expect(set(used) == layout.tensors.keys(), "tensors missing or belonging to no parameter")
    check_names(document.tied, "", ArtifactError)
    ties = not document.tied.keys() & set(names) and set(document.tied.values()) <= set(names)
    expect(ties, "a bad list of tied parameters")


def input_from_json(data: Any) -> InputSpec | None:
    """The input description, checked.

    Raises:
        ArtifactError: it is not one.
    """
    try:
        return None if data is None else input_from_data(data)
    except ArtifactError as error:
        raise ArtifactError(f"a bad input description: {error.message}") from None


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_map(value: object) -> bool:
    return isinstance(value, dict) and all(type(item) is str for item in value.values())
