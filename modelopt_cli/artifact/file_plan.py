"""Plan of a file, from how each parameter is stored: its header and its order of data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs import CODECS, Codec, PartSpec
from modelopt_cli.artifact.compressed_header import compress_header, inner_name
from modelopt_cli.artifact.container import TensorInfo, check_names
from modelopt_cli.artifact.dtypes import NAMES
from modelopt_cli.artifact.header import Document, StoredParameter, arrange, header_bytes, in_order
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program.program import Encoding


@dataclass(frozen=True)
class ParameterRecord:
    """Storage of one parameter; ``layout`` has its parts in order of their names."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    params: Mapping[str, Any]
    layout: Mapping[str, PartSpec]


@dataclass(frozen=True)
class FilePlan:
    """A whole file but for the data.

    Attributes:
        document: what it says; its parameters are in the order of the records.
        tensors: where each part goes, in file order.
        head: everything in front of the data, with the digest blank.
    """

    document: Document
    tensors: Mapping[str, TensorInfo]
    head: bytes

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return len(self.head) + max((info.end for info in self.tensors.values()), default=0)


def record(name: str, tensor: Tensor, encoding: Encoding) -> ParameterRecord:
    """Storage of a tensor, from shapes alone.

    Raises:
        ModeloptError: it cannot be, or not so (a bug of a method).
    """
    check_names([name], "the state dict", ArtifactError)
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        raise ModeloptError("is not a dense tensor and cannot be stored", where=name)
    if tensor.dtype not in NAMES:
        raise ModeloptError(f"has the type {tensor.dtype}, which cannot be stored", where=name)
    if encoding.codec not in CODECS:
        raise ModeloptError(f"unknown codec {encoding.codec!r}", where=name)
    shape = tuple(tensor.shape)
    try:
        layout = CODECS[encoding.codec].layout(shape, tensor.dtype, encoding)
    except ArtifactError as error:
        raise ModeloptError(error.message, where=name) from None
    ordered = {part: layout[part] for part in sorted(layout)}
    return ParameterRecord(name, NAMES[tensor.dtype], shape, encoding.codec, dict(encoding.params), ordered)


def plan_file(
    about: Document, records: Sequence[ParameterRecord], tied: Mapping[str, str], *, compressed: bool
) -> FilePlan:
    """Give every part its name and place.

    Args:
        about: everything that the file says next to its parameters.
        records: in state-dict order.
        tied: names that stand for the tensor of another.
        compressed: the header is compressed.

    Raises:
        ModeloptError: a part can be given no name.
    """
    named = _inner_names(records) if compressed else _outer_names(records)
    parameters = [
        StoredParameter(r.name, r.codec, r.dtype, r.shape, names, dict(r.params))
        for r, names in zip(records, named, strict=True)
    ]
    document = replace(about, parameters=tuple(parameters), tied=dict(tied))
    parts = {
        names[part]: (NAMES[spec.dtype], spec.shape)
        for r, names in zip(records, named, strict=True)
        for part, spec in r.layout.items()
    }
    if compressed:
        tensors = in_order(parts)
        return FilePlan(document, tensors, compress_header(document, tensors))
    tensors = arrange(parts)
    return FilePlan(document, tensors, header_bytes(document.to_json(), tensors))


def _inner_names(records: Iterable[ParameterRecord]) -> list[dict[str, str]]:
    return [{part: inner_name(i, part) for part in r.layout} for i, r in enumerate(records)]


def _outer_names(records: Sequence[ParameterRecord]) -> list[dict[str, str]]:
    taken = {r.name for r in records}
    return [{part: _part_name(r, part, CODECS[r.codec], taken) for part in r.layout} for r in records]


def _part_name(record: ParameterRecord, part: str, codec: Codec, taken: set[str]) -> str:
    """``conv.weight`` itself for the payload; ``conv.scale``, or ``conv.weight.scale`` if that is taken."""
    if part == codec.payload[0]:
        return record.name
    layer = record.name.removesuffix(".weight")
    for candidate in (f"{layer}.{part}", f"{record.name}.{part}"):
        if candidate not in taken:
            taken.add(candidate)
            return candidate
    raise ModeloptError(f"no free name is left for its {part}", where=record.name)
