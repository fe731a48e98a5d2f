"""Strict reading of safetensors files, ours and others'.

The container is eight bytes of header length (little-endian), a JSON header, and the tensors' bytes
with no gap and no overlap. Nothing is allocated that the size of the file does not warrant.
"""

import math
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from modelopt_cli.artifact import strictjson
from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.errors import CheckpointError, EnvironmentFailure, InputError
from modelopt_cli.regular import open_regular

METADATA = "__metadata__"
MAX_HEADER = 100_000_000
"""Longest header the safetensors library reads, too."""

_MAX_RANK = 64
_MAX_NAME = 1024
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: ``dtype`` by its safetensors name; bytes ``start`` to ``end`` of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A checked header: the tensors in file order, the metadata, and where the data begins."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_safetensors_header(
    path: str | Path, error: type[InputError] = CheckpointError
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file, in file order, and its metadata.

    Raises:
        InputError: of the class ``error``: the file is missing, damaged, or not safetensors.
    """
    with open_regular(path, error) as file:
        layout = read_layout(file, str(path), error)
    return layout.tensors, layout.metadata


def read_safetensors(path: str | Path, error: type[InputError] = CheckpointError) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, each with memory of its own, in file order.

    Raises:
        InputError: of the class ``error``, as :func:`read_safetensors_header`.
    """
    with open_regular(path, error) as file:
        layout = read_layout(file, str(path), error)
        return {
            name: read_tensor(file, layout, info, str(path), error) for name, info in layout.tensors.items()
        }


def read_layout(file: BinaryIO, where: str, error: type[InputError]) -> Layout:
    """Check the whole header against the format and against the size of the file."""
    size = os.fstat(file.fileno()).st_size
    header = strictjson.parse(_read_header(file, size, where, error), error, where)
    metadata = _metadata(header.pop(METADATA, {}), where, error)
    data_start = file.tell()
    tensors = {name: _tensor(name, entry, where, error) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_contiguous(ordered, size - data_start, where, error)
    return Layout(ordered, metadata, data_start)


def read_tensor(
    file: BinaryIO, layout: Layout, info: TensorInfo, where: str, error: type[InputError]
) -> torch.Tensor:
    """One tensor, by plain reads into memory of its own."""
    dtype = DTYPES[info.dtype]
    if info.start == info.end:
        return torch.empty(info.shape, dtype=dtype)
    buffer = torch.empty(info.end - info.start, dtype=torch.uint8)
    view = buffer.numpy().data
    file.seek(layout.data_start + info.start)
    try:
        filled = file.readinto(view)  # type: ignore[attr-defined]
    except OSError as cause:
        raise EnvironmentFailure(f"cannot be read: {os.strerror(cause.errno or 5)}", where=where) from cause
    if filled != len(view):
        raise error("became shorter while it was read", where=where)
    if dtype is torch.bool and bool((buffer > 1).any()):
        raise error("holds a boolean that is neither 0 nor 1", where=where)
    return buffer.view(dtype).reshape(info.shape)


def check_names(names: Iterable[object], where: str, error: type[InputError]) -> None:
    """Refuse tensor names that are empty, overlong, or hold control characters or lone surrogates."""
    for name in names:
        if not isinstance(name, str) or not name or name == METADATA or len(name) > _MAX_NAME:
            raise error(f"bad tensor name {str(name)[:80]!r}", where=where)
        if _CONTROL.search(name):
            raise error(f"control character in the tensor name {name[:80]!r}", where=where)


def _read_header(file: BinaryIO, size: int, where: str, error: type[InputError]) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise error("is too short to be a safetensors file", where=where)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise error("is not a safetensors file: its header would be too long", where=where)
    if length > size - 8:
        raise error("ends inside its header", where=where, hint="the file is truncated or not safetensors")
    data = file.read(length)
    if len(data) != length:
        raise error("became shorter while it was read", where=where)
    return data


def _metadata(value: Any, where: str, error: type[InputError]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error(f"{METADATA} must map strings to strings", where=where)
    return value


def _tensor(name: str, entry: Any, where: str, error: type[InputError]) -> TensorInfo:
    check_names([name], where, error)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problem = f"tensor {name[:80]!r} must have exactly dtype, shape and data_offsets"
        raise error(problem, where=where)
    size = tensor_bytes(name, entry["dtype"], entry["shape"], where, error)
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise error(f"tensor {name[:80]!r} has bad data_offsets", where=where)
    start, end = offsets
    if end - start != size:
        problem = f"tensor {name[:80]!r} has data_offsets that do not fit its dtype and shape"
        raise error(problem, where=where)
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), start, end)


def tensor_bytes(name: str, dtype: object, shape: object, where: str, error: type[InputError]) -> int:
    """Bytes of a tensor whose type and shape come from a file.

    Raises:
        InputError: of the class ``error``: they are none.
    """

    def refuse(problem: str) -> NoReturn:
        raise error(f"tensor {name[:80]!r} {problem}", where=where)

    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(is_size(n) for n in shape):
        refuse("has a bad shape")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        refuse("has a shape too large to address")
    return math.prod(shape) * DTYPES[dtype].itemsize


def is_size(value: object) -> bool:
    """True if ``value`` is a plain non-negative integer of at most 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def _check_contiguous(tensors: dict[str, TensorInfo], size: int, where: str, error: type[InputError]) -> None:
    position = 0
    for name, info in tensors.items():
        if info.end > size:
            raise error(f"tensor {name[:80]!r} reaches beyond the end of the file", where=where)
        if info.start < position:
            raise error(f"tensor {name[:80]!r} overlaps another", where=where)
        if info.start > position:
            raise error(f"there is a gap before tensor {name[:80]!r}", where=where)
        position = info.end
    if position != size:
        raise error("has trailing bytes after its last tensor", where=where)
