"""Unsigned integers of any width as a stream of bytes, the lowest bit first.

Entry ``i`` of width ``b`` takes bits ``i * b`` to ``i * b + b - 1`` of the stream, its lowest bit first;
bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``. The last byte is filled up with zeros.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import expect

MAX_BITS = 32
_CHUNK = 1 << 20
"""Entries worked on at once; a multiple of 8, so that every chunk ends with a whole byte."""

Integers = npt.NDArray[np.int64]


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` entries of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(entries: npt.NDArray[np.integer[Any]], bits: int) -> Tensor:
    """A uint8 stream of integers from 0 to ``2**bits - 1``, ``bits`` at most ``MAX_BITS``."""
    chunks = [_pack(entries[i : i + _CHUNK], bits) for i in range(0, len(entries), _CHUNK)]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *chunks]))


def unpack(stream: Tensor, count: int, bits: int, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
    """The ``count`` integers of a stream of ``packed_size(count, bits)`` bytes.

    Args:
        stream: uint8.
        count: of the entries.
        bits: of each.
        dtype: that the integers are to have, wide enough for them.

    Raises:
        ArtifactError: the bits behind the last entry are not zero.
    """
    data = stream.numpy()
    spare = len(data) * 8 - count * bits
    expect(spare == 0 or int(data[-1]) >> (8 - spare) == 0, "the bits behind the last position are not zero")
    entries = np.empty(count, dtype)
    for i in range(0, count, _CHUNK):
        some = min(_CHUNK, count - i)
        entries[i : i + some] = _unpack(data[i * bits // 8 :], some, bits)
    return entries


def pack_mask(mask: Tensor) -> Tensor:
    """One bit for each element of a bool tensor."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpack_mask(stream: Tensor, count: int) -> Tensor:
    """The ``count`` booleans of a stream of ``packed_size(count, 1)`` bytes.

    Raises:
        ArtifactError: the bits behind the last one are not zero.
    """
    data = stream.numpy()
    spare = len(data) * 8 - count
    expect(spare == 0 or int(data[-1]) >> (8 - spare) == 0, "the bits behind the last position are not zero")
    return torch.from_numpy(np.unpackbits(data, count=count, bitorder="little").view(np.bool_))


def _width(bits: int) -> type[np.unsignedinteger]:
    return np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32


def _pack(entries: npt.NDArray[np.integer[Any]], bits: int) -> npt.NDArray[np.uint8]:
    words = entries.astype(np.dtype(_width(bits)).newbyteorder("<"))
    spread = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
    return np.packbits(spread[:, :bits], bitorder="little")


def _unpack(data: npt.NDArray[np.uint8], count: int, bits: int) -> npt.NDArray[np.unsignedinteger]:
    used = data[: packed_size(count, bits)]
    spread = np.unpackbits(used, count=count * bits, bitorder="little").reshape(count, bits)
    word = np.dtype(_width(bits)).newbyteorder("<")
    integers = np.packbits(spread, axis=1, bitorder="little")
    padded = np.zeros((count, word.itemsize), np.uint8)
    padded[:, : integers.shape[1]] = integers
    return padded.view(word).reshape(count)
