"""The compression of headers: raw DEFLATE with a dictionary of what headers say. Imports no torch."""

import zlib
from functools import cache
from importlib.resources import files

FREE, EXPANSION = 4096, 256
"""The header has at most ``FREE + EXPANSION * (its compressed bytes)`` bytes."""

KEY = "sealed"
"""Metadata key of the header's compressed and full length."""

_RAW_DEFLATE = -15


@cache
def dictionary() -> bytes:
    """Texts that headers are made of."""
    return files(__package__).joinpath("compressed_header.txt").read_bytes()


def deflate(text: bytes) -> bytes:
    """The compressed text, never so short that a reader would refuse to expand it."""
    for level in (9, 0):  # what level 9 makes smaller than a reader allows is stored as it is
        packer = zlib.compressobj(level, zlib.DEFLATED, _RAW_DEFLATE, 9, zdict=dictionary())
        stream = packer.compress(text) + packer.flush()
        if len(text) <= FREE + EXPANSION * len(stream):
            break
    return stream


def inflate(stream: bytes, length: int) -> bytes:
    """Exactly ``length`` bytes from exactly these; never allocates more.

    Raises:
        ValueError: they are none, or of another length.
    """
    unpacker = zlib.decompressobj(_RAW_DEFLATE, zdict=dictionary())
    try:
        text = unpacker.decompress(stream, length + 1)
    except zlib.error:
        raise ValueError("a compressed header that cannot be inflated") from None
    if len(text) != length or not unpacker.eof or unpacker.unused_data:
        raise ValueError("a compressed header of another length than it states")
    return text
