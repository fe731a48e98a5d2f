"""The IDX format of the MNIST family, plain or gzipped.

Two zero bytes, a type code, the number of dimensions, each dimension as a big-endian 32-bit number, then the
values. Only unsigned bytes (0x08) occur in the MNIST family.
"""

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from modelopt_cli.errors import DataError
from modelopt_cli.regular import open_regular

_UNSIGNED_BYTE = 0x08
_CHUNK = 2**20
_SPLIT_NAMES = {"train": "train", "test": "(?:t10k|test)"}


def find_idx(folder: Path, split: str, part: str) -> Path:
    """The one file of a split, e.g. ``t10k-images-idx3-ubyte.gz``; a plain file goes before its ``.gz``.

    Args:
        folder: where the files lie.
        split: ``train`` or ``test``.
        part: ``images`` or ``labels``.

    Raises:
        DataError: there is none, or files of several datasets.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where=str(folder), hint="give the folder that holds the IDX files")
    pattern = re.compile(rf"(?P<stem>(?:.+-)?{_SPLIT_NAMES[split]}-{part}[-.]idx\d-ubyte)(?:\.gz)?")
    matching = {
        m["stem"]: p for p in sorted(folder.iterdir(), reverse=True) if (m := pattern.fullmatch(p.name))
    }
    if len(matching) == 1:
        return next(iter(matching.values()))
    if matching:
        raise DataError(
            f"holds several {split} sets: {', '.join(sorted(matching))}",
            where=str(folder),
            hint="keep one per folder",
        )
    expected = f"{'t10k' if split == 'test' else 'train'}-{part}-idx{3 if part == 'images' else 1}-ubyte[.gz]"
    raise DataError(f"holds no {split} {part} in IDX form", where=str(folder), hint=f"expected {expected}")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file: mapped where it is plain, in memory where it is gzipped.

    Raises:
        DataError: the file is not IDX, not of unsigned bytes, or its length is not what its header says.
    """
    try:
        if path.suffix != ".gz":
            return _map(path)
        with open_regular(path, DataError) as file, gzip.open(file) as stream:
            shape = _header(stream, path)
            size = math.prod(shape)
            data = _read(stream, size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError("is truncated or not gzip", where=str(path), hint="fetch it again") from None
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=str(path)) from None
    _check_length(len(data), size, path)
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _read(stream: gzip.GzipFile, limit: int) -> bytearray:
    """Up to ``limit`` bytes. Asked for at once, a size from a damaged header would be allocated at once."""
    data = bytearray()
    while chunk := stream.read(min(_CHUNK, limit - len(data))):
        data += chunk
    return data


def _map(path: Path) -> NDArray[np.uint8]:
    with open_regular(path, DataError) as stream:
        shape = _header(stream, path)
        offset = stream.tell()
        _check_length(os.fstat(stream.fileno()).st_size - offset, math.prod(shape), path)
        if math.prod(shape) == 0:
            return np.zeros(shape, dtype=np.uint8)
        mapped: NDArray[Any] = np.memmap(stream, dtype=np.uint8, mode="r", offset=offset, shape=shape)
        return mapped


def _header(stream: IO[bytes] | gzip.GzipFile, path: Path) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
        raise DataError("is not an IDX file", where=str(path), hint="fetch it again")
    if magic[2] != _UNSIGNED_BYTE:
        raise DataError(
            f"holds values of type 0x{magic[2]:02x}; only unsigned bytes are read", where=str(path)
        )
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError("ends inside its header", where=str(path), hint="fetch it again")
    return struct.unpack(f">{magic[3]}I", sizes)


def _check_length(length: int, expected: int, path: Path) -> None:
    if length != expected:
        more = "more" if length > expected else "fewer"
        raise DataError(
            f"holds {more} bytes than the {expected} its header says", where=str(path), hint="fetch it again"
        )
