"""Writing artifacts: encode one tensor at a time, lay out, write in one step, read back."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs import CODECS, PLAIN
from modelopt_cli.artifact.coding import CODINGS, PLAIN_CODE, Code, stored_encoding
from modelopt_cli.artifact.dtypes import as_bytes
from modelopt_cli.artifact.file_plan import FilePlan, ParameterRecord, plan_file, record
from modelopt_cli.artifact.header import ONCE, Document, digest_of, with_digest
from modelopt_cli.artifact.lazy import described
from modelopt_cli.artifact.output_path import check_output
from modelopt_cli.artifact.reader import Artifact, open_artifact
from modelopt_cli.artifact.stream import Item, TensorStream, tied_names
from modelopt_cli.artifact.temporary_buffer import TemporaryBuffer, temporary_buffer
from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.program import Encoding, Program

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Written:
    """A finished file: its bytes on disk and the SHA-256 of them."""

    path: Path
    file_bytes: int
    sha256: str


def write_program(
    program: Program, path: str | Path, *, force: bool = False, code: Code = PLAIN_CODE
) -> Written:
    """Write a Program so that it runs again from the file alone.

    The file is read back and compared, value by value, before it takes its name.

    Args:
        program: what to write.
        path: where.
        force: whether an existing file may be replaced.
        code: how tightly integers are packed; a key of ``CODINGS``.

    Raises:
        OutputError: ``path`` must not be written to.
        EnvironmentFailure: no space or no permission.
        ModeloptError: an encoding does not fit its parameter (a bug of a method).
    """
    check_output(path, force)
    return _write(_of_program(program), path, force, code)


def write_tensors(
    state: Mapping[str, Tensor],
    encodings: Mapping[str, Encoding],
    path: str | Path,
    *,
    history: Iterable[dict[str, Any]] = (),
    arch: str | None = None,
    input_spec: InputSpec | None = None,
    labels: Iterable[str] | None = None,
    force: bool = False,
    code: Code = PLAIN_CODE,
) -> Written:
    """Write a state dict without a network; ``arch`` says what it can be loaded into, if known.

    Raises:
        As :func:`write_program`.
    """
    check_output(path, force)
    about = _describe(history, arch, input_spec, labels)
    return _write(_of_state(about, state, encodings), path, force, code)


def write_stream(
    stream: TensorStream,
    path: str | Path,
    *,
    history: Iterable[dict[str, Any]] = (),
    arch: str | None = None,
    input_spec: InputSpec | None = None,
    labels: Iterable[str] | None = None,
    force: bool = False,
    code: Code = PLAIN_CODE,
) -> Written:
    """Write a state dict of which no two tensors need to be in memory at once.

    Raises:
        As :func:`write_program`, and what making the tensors raises.
    """
    check_output(path, force)
    return _write(_of_stream(_describe(history, arch, input_spec, labels), stream), path, force, code)


def predicted_bytes(
    model: Program | TensorStream | Mapping[str, Tensor],
    encodings: Mapping[str, Encoding] | None = None,
    *,
    history: Iterable[dict[str, Any]] = (),
    arch: str | None = None,
    input_spec: InputSpec | None = None,
    labels: Iterable[str] | None = None,
    code: Code = PLAIN_CODE,
) -> int:
    """Exact size of the file that :func:`write_program` or :func:`write_tensors` would write.

    Where ``code`` is plain only shapes and types are looked at: tensors and encoding parts may be on the
    meta device. Otherwise the size depends on the values.

    Args:
        model: a Program, or the state dict or stream that would be written.
        encodings: instead of the Program's own, or those of the state dict; a stream has its own.
        history: as for ``write_tensors``; ignored for a Program, as are the ones below but for ``code``.
        arch: see ``write_tensors``.
        input_spec: see ``write_tensors``.
        labels: see ``write_tensors``.
        code: see ``write_program``.
    """
    about = _describe(history, arch, input_spec, labels)
    if isinstance(model, Program):
        content = _of_program(model, encodings)
    elif isinstance(model, TensorStream):
        content = _of_stream(about, model)
    else:
        content = _of_state(about, model, encodings or {})
    records = list(itertools.starmap(partial(_record, code), content.items))
    return _plan(content, records, code).file_bytes


@dataclass(frozen=True)
class _Content:
    """Content of a file: ``items`` in state-dict order, and everything it says next to them."""

    about: Document
    items: Iterable[Item]
    tied: Mapping[str, str]


def _of_program(program: Program, encodings: Mapping[str, Encoding] | None = None) -> _Content:
    from modelopt_cli.program.serialization import to_data

    data = {key: value for key, value in to_data(program).items() if key not in ONCE}
    about = replace(_describe(program.history, program.arch, program.input, program.labels), program=data)
    return _of_state(about, program.state_dict(), program.encodings if encodings is None else encodings)


def _of_state(about: Document, state: Mapping[str, Tensor], encodings: Mapping[str, Encoding]) -> _Content:
    for name in encodings:
        if name not in state:
            raise ModeloptError("has an encoding but no tensor", where=name)
    tied = tied_names(described(state), encodings)
    items = ((name, state[name], encodings.get(name, PLAIN)) for name in state if name not in tied)
    return _Content(about, items, tied)


def _of_stream(about: Document, stream: TensorStream) -> _Content:
    return _Content(about, stream.items(), stream.tied)


def _describe(
    history: Iterable[dict[str, Any]],
    arch: str | None,
    input_spec: InputSpec | None,
    labels: Iterable[str] | None,
) -> Document:
    names = None if labels is None else tuple(labels)
    return Document((), network=arch, input=input_spec, labels=names, history=tuple(history))


def _record(code: Code, name: str, tensor: Tensor, encoding: Encoding) -> ParameterRecord:
    return record(name, tensor, stored_encoding(tensor, encoding, code))


def _plan(content: _Content, records: list[ParameterRecord], code: Code) -> FilePlan:
    return plan_file(content.about, records, content.tied, compressed=CODINGS[code].compressed_header)


@dataclass(frozen=True)
class _Encoded:
    """A parameter in the buffer: where its parts stand there, and the fingerprint of its values."""

    record: ParameterRecord
    places: Mapping[str, tuple[int, int]]
    values: bytes


def _write(content: _Content, path: str | Path, force: bool, code: Code) -> Written:
    with temporary_buffer(path) as buffer:
        # Unlike a loop's variable, starmap holds no tensor while the next one is planned.
        encoded = list(itertools.starmap(partial(_encode, code, buffer), content.items))
        planned = _plan(content, [each.record for each in encoded], code)
        return _publish(planned, encoded, buffer, path, force)


def _encode(code: Code, buffer: TemporaryBuffer, name: str, tensor: Tensor, encoding: Encoding) -> _Encoded:
    """Encode one parameter into the buffer, and keep nothing of it but where it went."""
    try:
        values = _host(tensor)
        parts = {part: _host(value) for part, value in encoding.parts.items()}
        integers = None if encoding.integers is None else _host(encoding.integers)
        moved = replace(encoding, parts=parts, integers=integers)
        stored = stored_encoding(values, moved, code)
        described = record(name, values, stored)
        parts = CODECS[stored.codec].encode(values, stored)
    except ModeloptError as error:
        raise ModeloptError(error.message, where=error.where or name) from None
    places = {part: buffer.append(_bytes(parts[part])) for part in described.layout}
    return _Encoded(described, places, fingerprint(values))


def _publish(
    planned: FilePlan, encoded: list[_Encoded], buffer: TemporaryBuffer, path: str | Path, force: bool
) -> Written:
    places = {
        parameter.parts[part]: place
        for parameter, each in zip(planned.document.parameters, encoded, strict=True)
        for part, place in each.places.items()
    }

    def data() -> Iterator[bytes]:
        return itertools.chain.from_iterable(buffer.blocks(*places[name]) for name in planned.tensors)

    head = with_digest(planned.head, digest_of(planned.head, data()))
    sha = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        for chunk in itertools.chain([head], data()):
            sha.update(chunk)
            yield chunk

    expected = [each.values for each in encoded]
    atomic_write(path, chunks(), force, verify=lambda part: _verify(part, planned.document, expected))
    return Written(Path(path), planned.file_bytes, sha.hexdigest())


def _host(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        raise ModeloptError("is not a dense tensor and cannot be stored")
    if tensor.is_meta:
        raise ModeloptError("a tensor without data cannot be stored")
    return tensor.detach().cpu()


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order; a view where the tensor already has it."""
    return as_bytes(tensor).numpy().data


def fingerprint(tensor: Tensor) -> bytes:
    """The same for equal tensors, and in practice for no others: NaN by its bits, negative zero as zero."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    signed = tensor.is_floating_point() and tensor.itemsize > 1
    for some in tensor.reshape(-1).split(_BLOCK):
        sha.update(_bytes(some + 0.0 if signed else some))
    return sha.digest()


def _verify(part: Path, document: Document, expected: list[bytes]) -> None:
    """Read the finished file as a stranger would, and compare it with what was meant."""
    try:
        with open_artifact(part) as artifact:
            _compare(artifact, document, expected)
    except ArtifactError as error:
        raise ModeloptError(f"the file just written {error.message}", hint="nothing was replaced") from error


def _compare(artifact: Artifact, document: Document, expected: list[bytes]) -> None:
    if not artifact.document.same(document):
        raise ModeloptError("the file just written says something else than was meant")
    for parameter, values in zip(artifact.document.parameters, expected, strict=True):
        if fingerprint(artifact.decode(parameter)[0]) != values:
            raise ModeloptError("reads back with other values than were written", where=parameter.name)
