"""Search for the smallest sparse form of a tensor.

Single weights can always be written: by a mask, by coordinates or by runs of zeros. Blocks and N:M groups are
smaller where zeros have such a pattern. Counting each pattern on all of a large tensor would be slow, so a
part of the tensor rules most of them out first. Sizes are exact, not estimates: they follow from counts.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.bits import MAX_BITS
from modelopt_cli.artifact.codecs.grid import Grid, kept_blocks, n_of_m_count
from modelopt_cli.artifact.codecs.positions import MAX_BLOCK, MAX_M
from modelopt_cli.artifact.codecs.runs import best_run_bits
from modelopt_cli.artifact.codecs.sparse import SPARSE, settings_of
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.program import Encoding

BLOCKS = (4, 8)
GROUPS = (4, 8, 16)
"""Row blocks and N:M groups that are looked for where no pattern is known."""

SAMPLE = 1 << 16
"""Elements, about, of the part that rules patterns out."""

_PATTERN = re.compile(r"([1-9]\d{0,4}):([1-9]\d{0,4})|block:([1-9]\d{0,4})")
SizedForm = tuple[int, dict[str, Any]]
"""Bytes, and the settings of the codec."""


def smallest_form(tensor: Tensor, base: Encoding, pattern: str | None = None) -> SizedForm:
    """The smallest form's exact bytes, scales included, and the settings of the codec.

    Args:
        tensor: of a type that the codec stores.
        base: ``raw``, or ``affine`` for a tensor on its grid.
        pattern: ``"N:M"`` or ``"block:B"``, where one is known; ``GROUPS`` and ``BLOCKS`` otherwise.
    """
    group, block = _parse(pattern)
    search = _Search(tensor, base)
    single = search.sized(_block_forms(search.rows(None), None, 1))
    search.best = min((size for size, _ in single), default=search.best)
    patterns: list[SizedForm] = []
    # Kernels for N:M and for blocks want their pattern along the input channels; else rows are flat.
    for axis in [1, None] if tensor.dim() > 2 else [None]:
        for m in [group] if group else GROUPS:
            patterns += search.n_of_m(axis, m)
        for width in [block] if block else BLOCKS:
            patterns += search.blocks(axis, width)
    return min(patterns + single, key=lambda form: form[0])  # the first among equals: the same bytes always


def _parse(pattern: str | None) -> tuple[int | None, int | None]:
    """The ``M`` and the block of a pattern, as far as it has them."""
    if pattern is None:
        return None, None
    match = _PATTERN.fullmatch(pattern)
    if match is None:
        raise ValueError(f"not a pattern: {pattern!r}")
    return (int(match[2]), None) if match[2] else (None, int(match[3]))


class _Search:
    """Search for forms that beat those of single weights.

    Attributes:
        best: bytes of the smallest form of single weights.
        width: bytes of a stored value.
        sample: every so many rows of ``nonzero``.
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

    def sized(self, forms: Iterable[dict[str, Any]]) -> list[SizedForm]:
        """Each form with its bytes, without those that may not stand for so large a tensor."""
        sizes = []
        for form in forms:
            params = {**form, "values": self.values}
            with suppress(ArtifactError):
                size = SPARSE.predicted_bytes(self.shape, self.dtype, params, self.parts)
                sizes.append((size, params))
        return sizes

    def n_of_m(self, axis: int | None, m: int) -> list[SizedForm]:
        """``n:m`` with the smallest ``n``.

        The largest count of any group decides on ``n``. In a part of the tensor it is at most that of all, so
        if the form is too large for the part's ``n`` already, the rest need not be looked at.
        """
        least = self.sized(self._n_of_m_form(self._sampled(axis), axis, m))
        if not least or least[0][0] > self.best:
            return []
        return self.sized(self._n_of_m_form(self.rows(axis), axis, m))

    def _n_of_m_form(self, rows: Tensor, axis: int | None, m: int) -> list[dict[str, Any]]:
        full = rows.shape[1] // m  # groups of a row; a shorter rest is stored as it is
        if not 2 <= m <= MAX_M or full * len(rows) == 0:
            return []
        groups = rows[:, : full * m].reshape(len(rows) * full, m)
        n = max(int(groups.sum(1, dtype=torch.int16).max()), 1)
        count = n_of_m_count(Grid(self.shape, axis, m), n)
        return [{"form": "n:m", "axis": axis, "n": n, "m": m, "count": count}] if n < m else []

    def blocks(self, axis: int | None, block: int) -> list[SizedForm]:
        """Forms of blocks, unless the zeros inside the blocks cost more than positions can save."""
        sample = self._sampled(axis)
        if not 1 < block <= min(MAX_BLOCK, sample.shape[1]):
            return []
        # Blocks store the zeros within them. What they save is positions, which never take more than the mask
        # of single weights: a bit for each element.
        ones = int(sample.sum())
        extra = (int(kept_blocks(sample, block).sum()) * block - ones) * self.width
        if extra > sample.numel() // 8:
            return []
        return self.sized(_block_forms(self.rows(axis), axis, block))


def _block_forms(rows: Tensor, axis: int | None, block: int) -> Iterator[dict[str, Any]]:
    """``mask``, ``coordinate`` and ``runs`` for one size of blocks."""
    marked = kept_blocks(rows, block)
    # The last block of a row is shorter where the row is no multiple of the block.
    last_width = rows.shape[1] % block
    count = int(marked.sum()) * block - (int(marked[:, -1].sum()) * (block - last_width) if last_width else 0)
    index = np.flatnonzero(marked.reshape(-1).numpy())
    common = {"axis": axis, "block": block, "count": count}
    yield {"form": "mask", **common}
    widest = (max(marked.numel(), 1) - 1).bit_length()  # bits of the last coordinate there can be
    if widest <= MAX_BITS:
        yield {"form": "coordinate", **common, "bits": widest, "entries": len(index)}
    bits, entries = best_run_bits(index)
    yield {"form": "runs", **common, "bits": bits, "entries": entries}
