"""Reading artifacts: everything is checked, the digest first, before anything is believed."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from modelopt_cli.artifact import container
from modelopt_cli.artifact.codecs import CODECS, Codec
from modelopt_cli.artifact.coding import base_encoding
from modelopt_cli.artifact.compressed_header import expand_header, is_compressed
from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.artifact.encodings import is_plain
from modelopt_cli.artifact.header import (
    BLANK,
    DIGEST_AT,
    PREFIX,
    Document,
    StoredParameter,
    begins_like_artifact,
    parse_document,
    parse_stated,
)
from modelopt_cli.artifact.lazy import LazyState
from modelopt_cli.errors import ArtifactError, InputError, ModeloptError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.program import Encoding, Program
from modelopt_cli.regular import HeldFile, open_regular
from modelopt_cli.settings import option

PARTS = "parts of a network, which its own code calls"
_BLOCK = 1 << 20
_DAMAGED = "the file is damaged or forged"


@dataclass(frozen=True)
class TensorFile:
    """The decoded tensors of an artifact and what it says about them.

    Attributes:
        state: every parameter under its name, in state-dict order, then the tied names.
        encodings: how the parameters that are not plain were stored.
        history: one object for each method applied, oldest first.
        arch: the architecture spec the network was built from.
        input: shape and preprocessing of one sample.
        labels: class names in logit order.
        tied: names of parameters that are stored under another name, which they lead to.
    """

    state: Mapping[str, torch.Tensor]
    encodings: dict[str, Encoding] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    arch: str | None = None
    input: InputSpec | None = None
    labels: tuple[str, ...] | None = None
    tied: dict[str, str] = field(default_factory=dict)


class Artifact:
    """An open, checked artifact; tensors are read and decoded one at a time.

    Attributes:
        sha256: of the whole file; empty where it was not verified.
    """

    def __init__(self, held: HeldFile, *, verify: bool = True) -> None:
        self.where = where = str(held.path)
        self._held = held
        file = held.file
        head = file.read(DIGEST_AT)
        if begins_like_artifact(head) and head[8:] != PREFIX:
            raise ArtifactError("does not begin as an artifact must", where=where, hint=_DAMAGED)
        file.seek(0)
        self.layout = container.read_layout(file, where, ArtifactError)
        data = parse_stated(self.layout, where)
        if is_compressed(data):
            data, self.layout = expand_header(file, self.layout, data, where)
        self.document, self.digest = parse_document(data, self.layout, where)
        self.sha256 = _check_digest(file, self.digest, where) if verify else ""
        held.check()

    def decode(self, parameter: StoredParameter) -> tuple[torch.Tensor, Encoding]:
        """One parameter's tensor, and the encoding that its method asked for.

        Raises:
            ArtifactError: its parts do not fit together.
        """
        with self._damaged(parameter):
            codec = _codec(parameter)
            parts = {part: self._read(name) for part, name in parameter.parts.items()}
            tensor = codec.decode(parts, parameter.params, DTYPES[parameter.dtype], parameter.shape)
            return tensor, _encoding(parameter, codec, parts)

    def encoding(self, parameter: StoredParameter) -> Encoding:
        """The encoding that a parameter's method asked for; its values are not read.

        Raises:
            ArtifactError: its settings are none.
        """
        with self._damaged(parameter):
            codec = _codec(parameter)
            names = {part: name for part, name in parameter.parts.items() if part not in codec.payload}
            return _encoding(parameter, codec, {part: self._read(name) for part, name in names.items()})

    def stored_bytes(self, parameter: StoredParameter) -> int:
        """Bytes that all parts of a parameter take in the file."""
        parts = (self.layout.tensors[name] for name in parameter.parts.values())
        return sum(info.end - info.start for info in parts)

    @contextlib.contextmanager
    def _damaged(self, parameter: StoredParameter) -> Iterator[None]:
        try:
            yield
        except ArtifactError as error:
            where = f"{self.where}: {parameter.name}"
            raise ArtifactError(error.message, where=where, hint=error.hint or _DAMAGED) from None

    def _read(self, name: str) -> torch.Tensor:
        info = self.layout.tensors[name]
        tensor = container.read_tensor(self._held.file, self.layout, info, self.where, ArtifactError)
        self._held.check()
        return tensor


def _codec(parameter: StoredParameter) -> Codec:
    codec = CODECS.get(parameter.codec)
    if codec is None:
        raise ArtifactError(f"unknown codec {parameter.codec[:40]!r}", hint="update modelopt")
    return codec


def _encoding(parameter: StoredParameter, codec: Codec, parts: Mapping[str, torch.Tensor]) -> Encoding:
    settings = {part: value for part, value in parts.items() if part not in codec.payload}
    return base_encoding(Encoding(parameter.codec, dict(parameter.params), settings))


def is_artifact(path: str | Path) -> bool:
    """True if the file is an artifact or a damaged one: a look at its first bytes, no more."""
    try:
        with open_regular(path, InputError) as file:
            return begins_like_artifact(file.read(DIGEST_AT))
    except (ModeloptError, OSError):
        return False


def read_header(path: str | Path, verify: bool = True) -> dict[str, Any]:
    """The JSON object under the metadata key ``modelopt``, checked.

    Args:
        path: the artifact.
        verify: whether to read the whole file and compare its digest.

    Raises:
        ArtifactError: missing, damaged, from a newer version, or not an artifact.
    """
    with open_artifact(path, verify=verify) as artifact:
        return artifact.document.to_json(artifact.digest)


def read_tensors(path: str | Path) -> TensorFile:
    """All tensors of an artifact, decoded, whether or not it holds a network.

    Raises:
        ArtifactError: missing, damaged, from a newer version, or not an artifact.
    """
    with open_artifact(path) as artifact:
        return tensors_in(artifact)


def open_tensors(path: str | Path) -> TensorFile:
    """Open an artifact whose tensors are decoded when they are asked for, and not kept.

    Raises:
        ArtifactError: as :func:`read_tensors`, or the file is changed later on.
    """
    return lazy_tensors(Artifact(HeldFile(path, ArtifactError)))


def lazy_tensors(artifact: Artifact) -> TensorFile:
    """The tensors of an open artifact, each decoded when it is asked for.

    Raises:
        ArtifactError: a parameter's settings are none.
    """
    document = artifact.document
    encodings = {p.name: artifact.encoding(p) for p in document.parameters}
    named = {parameter.name: parameter for parameter in document.parameters}
    named |= {name: named[owner] for name, owner in document.tied.items()}
    kinds = {name: (p.dtype, p.shape) for name, p in named.items()}
    return _file(document, LazyState(kinds, lambda name: artifact.decode(named[name])[0]), encodings)


def read_program(path: str | Path, network: nn.Module | None = None) -> Program:
    """The network in an artifact, ready to be called; ``network`` is that of :func:`program_in`.

    Raises:
        ArtifactError: as :func:`read_tensors`, or the file holds tensors without a network.
    """
    with open_artifact(path) as artifact:
        return program_in(artifact, network)


def program_in(artifact: Artifact, network: nn.Module | None = None) -> Program:
    """The network in an open artifact.

    Args:
        artifact: whose network it is.
        network: whose code calls the graphs of an artifact that holds parts of a network.

    Raises:
        ArtifactError: as :func:`read_program`.
        ArchitectureError: the parts are not those of the network.
    """
    from modelopt_cli.program.serialization import from_data

    document, path = artifact.document, artifact.where
    if document.program is None or (network is None and not document.stands_alone):
        arch = document.network
        arch_option = option("arch", arch or None)
        hint = f"rebuild it with {arch_option}" if arch else f"name its architecture with {arch_option}"
        held = "tensors without their network" if document.program is None else PARTS
        raise ArtifactError(f"holds {held}", where=path, hint=hint)
    tensors = tensors_in(artifact)
    try:
        program = from_data(program_data(document), tensors.state, network)
    except ArtifactError as error:
        where = f"{path}: {error.where}" if error.where else path
        raise ArtifactError(error.message, where=where, hint=error.hint or _DAMAGED) from error
    program.encodings = dict(tensors.encodings)
    return program


def program_data(document: Document) -> dict[str, Any]:
    """The Program's data form, completed with the fields that every artifact holds once."""
    shared = document.to_json()
    return {
        **(document.program or {}),
        "arch": document.network,
        "history": shared["history"],
        "input": shared["input"],
        "labels": shared["labels"],
    }


@contextlib.contextmanager
def open_artifact(path: str | Path, *, verify: bool = True) -> Iterator[Artifact]:
    """Open an artifact for reading tensor by tensor; see :class:`Artifact`."""
    held = HeldFile(path, ArtifactError)
    try:
        yield Artifact(held, verify=verify)
    finally:
        held.close()


def tensors_in(artifact: Artifact) -> TensorFile:
    """All tensors of an open artifact, decoded.

    Raises:
        ArtifactError: as :func:`read_tensors`.
    """
    document = artifact.document
    state, encodings = {}, {}
    for parameter in document.parameters:
        state[parameter.name], encodings[parameter.name] = artifact.decode(parameter)
    state.update({name: state[owner] for name, owner in document.tied.items()})
    return _file(document, state, encodings)


def _file(
    document: Document, state: Mapping[str, torch.Tensor], encodings: Mapping[str, Encoding]
) -> TensorFile:
    encoded = {name: encoding for name, encoding in encodings.items() if not is_plain(encoding)}
    about = (document.history, document.network, document.input, document.labels, document.tied)
    return TensorFile(state, encoded, *about)


def _check_digest(file: BinaryIO, stated: str, where: str) -> str:
    """Compare the digest that the file states with its bytes; return the SHA-256 of them as they are."""
    file.seek(0)
    head = file.read(DIGEST_AT + len(BLANK))
    if head[8:] != PREFIX + stated.encode():
        raise ArtifactError("does not begin as an artifact must", where=where, hint=_DAMAGED)
    blanked, sha256 = hashlib.sha256(head[:DIGEST_AT] + BLANK.encode()), hashlib.sha256(head)
    while block := file.read(_BLOCK):
        blanked.update(block)
        sha256.update(block)
    if blanked.hexdigest() != stated:
        raise ArtifactError(
            "does not match its digest", where=where, hint="the file is damaged; copy or make it again"
        )
    return sha256.hexdigest()
