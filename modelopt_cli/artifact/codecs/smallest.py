"""Finding the smallest sparse form of a tensor."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.bits import MAX_BITS, Integers, packed_size
from modelopt_cli.artifact.codecs.positions import (
    MAX_BLOCK,
    MAX_M,
    MAX_RUN_BITS,
    Grid,
    gaps,
    kept_blocks,
    n_of_m_count,
)
from modelopt_cli.artifact.codecs.sparse import SPARSE, settings_of
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.program import Encoding

BLOCKS = (4, 8)
GROUPS = (4, 8, 16)
"""Row blocks and N:M groups that are looked for unasked."""

SAMPLE = 1 << 16
"""Elements, about, of the part in which patterns are looked for first."""

_PATTERN = re.compile(r"([1-9]\d{0,4}):([1-9]\d{0,4})|block:([1-9]\d{0,4})")
Form = tuple[int, dict[str, Any]]
"""Bytes, and the settings of the codec."""


def smallest_form(tensor: Tensor, base: Encoding, pattern: str | None = None) -> Form:
    """The smallest form's exact bytes, scales included, and the settings of the codec.

    Args:
        tensor: of a type that the codec stores.
        base: ``raw``, or ``affine`` for a tensor on its grid.
        pattern: ``"N:M"`` or ``"block:B"``, where one is known; ``GROUPS`` and ``BLOCKS`` otherwise.
    """
    n_of_m, block = _parse(pattern)
    search = _Search(tensor, base)
    plain = search.sized(_block_forms(search.rows(None), None, 1))
    search.best = min((size for size, _ in plain), default=search.best)
    found: list[Form] = []
    for axis in [1, None] if tensor.dim() > 2 else [None]:
        for m in [n_of_m] if n_of_m else GROUPS:
            found += search.n_of_m(axis, m)
        for width in [block] if block else BLOCKS:
            found += search.blocks(axis, width)
    return min(found + plain, key=lambda form: form[0])  # the first among equals


def _parse(pattern: str | None) -> tuple[int | None, int | None]:
    """The ``M`` and the block of a pattern, as far as it has them."""
    found = _PATTERN.fullmatch(pattern or ":")
    if pattern is not None and found is None:
        raise ValueError(f"not a pattern: {pattern!r}")
    if found is None:
        return None, None
    return (int(found[2]), None) if found[2] else (None, int(found[3]))


class _Search:
    """Looks for forms that beat those of single weights.

    Attributes:
        best: bytes of the smallest form of single weights.
    """

    def __init__(self, tensor: Tensor, base: Encoding) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.values = settings_of(base)
        self.parts = tuple(base.parts)
        self.width = 1 if self.values is not None else tensor.dtype.itemsize
        self.nonzero = tensor.detach().cpu() != 0
        self.best = 1 << 62
        step = max(tensor.numel() // SAMPLE, 1)
        self.sample = self.nonzero[::step] if tensor.dim() > 1 else self.nonzero

    def rows(self, axis: int | None) -> Tensor:
        return Grid(self.shape, axis).read(self.nonzero)

    def _sampled(self, axis: int | None) -> Tensor:
        return Grid(tuple(self.sample.shape), axis).read(self.sample)

    def sized(self, forms: Iterable[dict[str, Any]]) -> list[Form]:
        """Each form with its bytes, without those that may not stand for so large a tensor."""
        found = []
        for form in forms:
            params = {**form, "values": self.values}
            with suppress(ArtifactError):
                size = SPARSE.predicted_bytes(self.shape, self.dtype, params, self.parts)
                found.append((size, params))
        return found

    def n_of_m(self, axis: int | None, m: int) -> list[Form]:
        """``n:m`` with the smallest ``n``; what a part of the tensor needs is a bound from below."""
        least = self.sized(self._n_of_m_form(self._sampled(axis), axis, m))
        if not least or least[0][0] > self.best:
            return []
        return self.sized(self._n_of_m_form(self.rows(axis), axis, m))

    def _n_of_m_form(self, rows: Tensor, axis: int | None, m: int) -> list[dict[str, Any]]:
        whole = rows.shape[1] // m
        if not 2 <= m <= MAX_M or whole * len(rows) == 0:
            return []
        groups = rows[:, : whole * m].reshape(len(rows) * whole, m)
        n = max(int(groups.sum(1, dtype=torch.int16).max()), 1)
        count = n_of_m_count(Grid(self.shape, axis, m), n)
        return [{"form": "n:m", "axis": axis, "n": n, "m": m, "count": count}] if n < m else []

    def blocks(self, axis: int | None, block: int) -> list[Form]:
        """Forms of blocks, unless the zeros inside the blocks cost more than positions can save."""
        sample = self._sampled(axis)
        if not 1 < block <= min(MAX_BLOCK, sample.shape[1]):
            return []
        ones = int(sample.sum())
        extra = (int(kept_blocks(sample, block).sum()) * block - ones) * self.width
        if extra > sample.numel() // 8:
            return []
        return self.sized(_block_forms(self.rows(axis), axis, block))


def _block_forms(rows: Tensor, axis: int | None, block: int) -> Iterator[dict[str, Any]]:
    """``mask``, ``coordinate`` and ``runs`` for one size of blocks."""
    marked = kept_blocks(rows, block)
    rest = rows.shape[1] % block
    count = int(marked.sum()) * block - (int(marked[:, -1].sum()) * (block - rest) if rest else 0)
    index = np.flatnonzero(marked.reshape(-1).numpy())
    common = {"axis": axis, "block": block, "count": count}
    yield {"form": "mask", **common}
    whole = (max(marked.numel(), 1) - 1).bit_length()
    if whole <= MAX_BITS:
        yield {"form": "coordinate", **common, "bits": whole, "entries": len(index)}
    bits, entries = best_run_bits(index)
    yield {"form": "runs", **common, "bits": bits, "entries": entries}


def best_run_bits(index: Integers) -> tuple[int, int]:
    """The width of run lengths that takes the fewest bytes, and how many entries there are then.

    Args:
        index: the kept positions in increasing order.
    """
    lengths, counts = _histogram(gaps(index))
    entries = {
        bits: len(index) + int((lengths // ((1 << bits) - 1) * counts).sum())
        for bits in range(1, MAX_RUN_BITS + 1)
    }
    return min(entries.items(), key=lambda pair: packed_size(pair[1], pair[0]))


def _histogram(numbers: Integers) -> tuple[Integers, Integers]:
    """The distinct numbers and how often each occurs; small ones, the bulk, without sorting."""
    bulk = 1 << 12
    counts = np.bincount(np.minimum(numbers, bulk), minlength=bulk + 1)[:bulk]
    rare, rare_counts = np.unique(numbers[numbers >= bulk], return_counts=True)
    common = np.flatnonzero(counts)
    return np.concatenate((common, rare)), np.concatenate((counts[common], rare_counts))
