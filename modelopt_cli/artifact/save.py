"""Writing artifacts: encode, lay out, write whole, read back."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modelopt_cli.artifact.codecs import CODECS, Codec
from modelopt_cli.artifact.container import check_names
from modelopt_cli.artifact.dtypes import NAMES, as_bytes
from modelopt_cli.artifact.header import (
    ONCE,
    Document,
    Parameter,
    arrange,
    digest_of,
    header_bytes,
    with_digest,
)
from modelopt_cli.artifact.reader import Artifact, open_artifact
from modelopt_cli.artifact.writer import atomic_write, check_output
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program.program import Encoding, Program
from modelopt_cli.program.spec import InputSpec

_PLAIN = Encoding("raw")


@dataclass(frozen=True)
class Written:
    """A finished file: its bytes on disk and the SHA-256 of them."""

    path: Path
    file_bytes: int
    sha256: str


def write_program(program: Program, path: str | Path, *, force: bool = False) -> Written:
    """Write a Program so that it runs again from the file alone.

    The file is read back and compared, bit for bit, before it takes its name.

    Raises:
        OutputError: ``path`` must not be written to.
        EnvironmentFailure: no space or no permission.
        ModeloptError: an encoding does not fit its parameter (a bug of a method).
    """
    check_output(path, force)
    return _write(*_program_parts(program), path, force)


def write_tensors(
    state: Mapping[str, torch.Tensor],
    encodings: Mapping[str, Encoding],
    path: str | Path,
    *,
    history: Iterable[dict[str, Any]] = (),
    arch: str | None = None,
    input: InputSpec | None = None,
    labels: Iterable[str] | None = None,
    force: bool = False,
) -> Written:
    """Write a state dict without a network; ``arch`` says what it can be loaded into, if known.

    Raises:
        As :func:`write_program`.
    """
    check_output(path, force)
    document = _describe(history, arch, input, labels)
    return _write(document, dict(state), dict(encodings), path, force)


def predicted_bytes(
    subject: Program | Mapping[str, torch.Tensor],
    encodings: Mapping[str, Encoding] | None = None,
    *,
    history: Iterable[dict[str, Any]] = (),
    arch: str | None = None,
    input: InputSpec | None = None,
    labels: Iterable[str] | None = None,
) -> int:
    """Exact size of the file that :func:`write_program` or :func:`write_tensors` would write.

    Only shapes and types are looked at: tensors and encoding parts may be on the meta device.

    Args:
        subject: a Program, or the state dict that ``write_tensors`` would get.
        encodings: instead of the Program's own, or beside the state dict.
        history: as for ``write_tensors``; ignored for a Program, as are the ones below.
        arch: see ``write_tensors``.
        input: see ``write_tensors``.
        labels: see ``write_tensors``.
    """
    if isinstance(subject, Program):
        document, state, own = _program_parts(subject)
    else:
        document, state, own = _describe(history, arch, input, labels), dict(subject), {}
    plan = _plan(document, state, own if encodings is None else dict(encodings))
    end = max((info.end for info in plan.tensors.values()), default=0)
    return len(header_bytes(plan.document, plan.tensors)) + end


@dataclass(frozen=True)
class _Plan:
    """Where everything goes, settled from shapes alone."""

    document: Document
    tensors: dict[str, Any]
    encodings: dict[str, Encoding]


def _program_parts(program: Program) -> tuple[Document, dict[str, torch.Tensor], dict[str, Encoding]]:
    from modelopt_cli.program.data import to_data

    data = {key: value for key, value in to_data(program).items() if key not in ONCE}
    document = _describe(program.history, program.arch, program.input, program.labels)
    return replace(document, program=data), dict(program.state_dict()), program.encodings


def _describe(
    history: Iterable[dict[str, Any]],
    arch: str | None,
    input: InputSpec | None,
    labels: Iterable[str] | None,
) -> Document:
    names = None if labels is None else tuple(labels)
    return Document((), network=arch, input=input, labels=names, history=tuple(history))


def _plan(document: Document, state: dict[str, torch.Tensor], encodings: dict[str, Encoding]) -> _Plan:
    """Assign every parameter its parts, and every part its place."""
    _check_state(state, encodings)
    tied = _tied(state, encodings)
    owners = {name: tensor for name, tensor in state.items() if name not in tied}
    taken, parameters, parts = set(owners), [], {}
    for name, tensor in owners.items():
        encoding, codec = encodings.get(name, _PLAIN), _codec(name, encodings)
        try:
            layout = codec.layout(tuple(tensor.shape), tensor.dtype, encoding)
        except ArtifactError as error:
            raise ModeloptError(error.what, where=name) from None
        names = {part: _part_name(name, part, codec, taken) for part in layout}
        parts.update({names[part]: (NAMES[spec.dtype], spec.shape) for part, spec in layout.items()})
        dtype, shape = NAMES[tensor.dtype], tuple(tensor.shape)
        parameters.append(Parameter(name, encoding.codec, dtype, shape, names, dict(encoding.params)))
    planned = replace(document, parameters=tuple(parameters), tied=tied)
    return _Plan(planned, arrange(parts), {name: encodings.get(name, _PLAIN) for name in owners})


def _check_state(state: Mapping[str, torch.Tensor], encodings: Mapping[str, Encoding]) -> None:
    check_names(state, "the state dict", ArtifactError)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise ModeloptError("is not a dense tensor and cannot be stored", where=name)
        if tensor.dtype not in NAMES:
            raise ModeloptError(f"has the type {tensor.dtype}, which cannot be stored", where=name)
    for name in encodings:
        if name not in state:
            raise ModeloptError("has an encoding but no tensor", where=name)


def _codec(name: str, encodings: Mapping[str, Encoding]) -> Codec:
    wanted = encodings.get(name, _PLAIN).codec
    if wanted not in CODECS:
        raise ModeloptError(f"unknown codec {wanted!r}", where=name)
    return CODECS[wanted]


def _tied(state: Mapping[str, torch.Tensor], encodings: Mapping[str, Encoding]) -> dict[str, str]:
    """Names that share their storage with another: an encoded one owns it, else the first."""
    owners: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name in sorted(state, key=lambda name: name not in encodings):
        tensor = state[name]
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        owner = owners.setdefault(key, name)
        if owner != name:
            tied[name] = owner
    return tied


def _part_name(name: str, part: str, codec: Codec, taken: set[str]) -> str:
    """``conv.weight`` itself for the payload; ``conv.scale``, or ``conv.weight.scale`` if that is taken."""
    if part == codec.payload[0]:
        return name
    layer = name.removesuffix(".weight")
    for candidate in (f"{layer}.{part}", f"{name}.{part}"):
        if candidate not in taken:
            taken.add(candidate)
            return candidate
    raise ModeloptError(f"no free name is left for its {part}", where=name)


def _write(
    document: Document,
    state: dict[str, torch.Tensor],
    encodings: dict[str, Encoding],
    path: str | Path,
    force: bool,
) -> Written:
    plan = _plan(document, state, encodings)
    stored = _encode(plan, state)
    blank = header_bytes(plan.document, plan.tensors)
    data = [stored[name] for name in plan.tensors]
    header = with_digest(blank, digest_of(blank, map(_bytes, data)))
    whole = hashlib.sha256()

    def chunks() -> Iterator[bytes | memoryview]:
        whole.update(header)
        yield header
        for tensor in data:
            chunk = _bytes(tensor)
            whole.update(chunk)
            yield chunk

    atomic_write(path, chunks(), force, verify=lambda part: _verify(part, plan.document, state))
    size = len(header) + sum(tensor.nbytes for tensor in data)
    return Written(Path(path), size, whole.hexdigest())


def _encode(plan: _Plan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every stored tensor by its name in the file; plain ones are not copied."""
    stored = {}
    for parameter in plan.document.parameters:
        encoding = plan.encodings[parameter.name]
        moved = replace(encoding, parts={part: _host(value) for part, value in encoding.parts.items()})
        try:
            parts = CODECS[encoding.codec].encode(_host(state[parameter.name]), moved)
        except ModeloptError as error:
            raise ModeloptError(error.what, where=parameter.name) from None
        stored.update({parameter.parts[part]: value for part, value in parts.items()})
    return stored


def _host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        raise ModeloptError("a tensor without data cannot be stored")
    return tensor.detach().cpu()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order; a view where the tensor already has it."""
    return as_bytes(tensor).numpy().data


def _verify(part: Path, document: Document, state: Mapping[str, torch.Tensor]) -> None:
    """Read the finished file as a stranger would, and compare it with what was meant."""
    try:
        with open_artifact(part) as artifact:
            _compare(artifact, document, state)
    except ArtifactError as error:
        raise ModeloptError(f"the file just written {error.what}", hint="nothing was replaced") from error


def _compare(artifact: Artifact, document: Document, state: Mapping[str, torch.Tensor]) -> None:
    if not artifact.document.same(document):
        raise ModeloptError("the file just written says something else than was meant")
    for parameter in artifact.document.parameters:
        tensor, _ = artifact.decode(parameter)
        if not _equal(tensor, _host(state[parameter.name])):
            raise ModeloptError("reads back with other values than were written", where=parameter.name)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit, or at least in value (zero and negative zero)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bytes(one), as_bytes(other)) or torch.equal(one, other)
