"""A shared weight: a few tables of values, and for each of its blocks which entry it is.

The codebook of one weight while it is trained.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modelopt_cli.artifact.encodings import is_pruned
from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share.dkm import nearest
from modelopt_cli.program import Encoding

_CHUNK = 1 << 22
"""Blocks that are decoded at once."""


@dataclass(frozen=True, eq=False)
class Shared:
    """See the module; the layout is that of the codec ``codebook``.

    A weight ``(O, ...)`` is taken as ``O`` rows, and each row as blocks of ``d`` neighbouring numbers. Runs
    of ``ceil(O / groups)`` rows have a table each.

    Attributes:
        shape: of the weight.
        indices: ``(O, blocks)`` of any integer type.
        table: floats ``(groups, entries, d)``; ``d`` is 1 for single weights.
        pruned: whether the entries that are 0 stand for weights that were pruned and stay so.
    """

    shape: tuple[int, ...]
    indices: Tensor
    table: Tensor
    pruned: bool = False

    @property
    def group_rows(self) -> int:
        """How many rows have a table in common; the last ones may be fewer."""
        return -(-len(self.indices) // len(self.table))

    def codes(self) -> Tensor:
        """The entry of every block, counted through all tables: int64 ``(O * blocks,)``."""
        groups = torch.arange(len(self.indices)).div(self.group_rows, rounding_mode="floor")
        return (groups[:, None] * self.table.shape[1] + self.indices.long()).flatten()

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, of the table's type or another; a part at a time, as weights can be large."""
        table = self.table.to(dtype or self.table.dtype)
        weight = torch.empty(len(self.indices), *self.indices.shape[1:], table.shape[2], dtype=table.dtype)
        groups = zip(self.indices.split(self.group_rows), weight.split(self.group_rows), table, strict=True)
        for indices, blocks, entries in groups:
            flat, target = indices.reshape(-1), blocks.view(-1, entries.shape[1])
            for first in range(0, len(flat), _CHUNK):
                some = flat[first : first + _CHUNK].int()
                torch.index_select(entries, 0, some, out=target[first : first + _CHUNK])
        return weight.view(self.shape)

    def encoding(self, dtype: torch.dtype = torch.float32) -> Encoding:
        """How the weight is stored as a parameter of a type."""
        groups, entries, size = self.table.shape
        params = {"entries": entries, "groups": groups, "vector": size, "pruned": self.pruned}
        table = self.table.to(dtype)
        return Encoding("codebook", params, {"table": table if size > 1 else table.squeeze(-1)})


def shared_of(weight: Tensor, encoding: Encoding) -> Shared:
    """The form of a weight that is stored so: by ``codebook``, or on the levels of ``affine``."""
    params = encoding.params if encoding.codec == "codebook" else {}
    groups, size = params.get("groups", 1), params.get("vector", 1)
    indices = torch.zeros(len(weight), weight[0].numel() // size, dtype=torch.int64)
    table = torch.zeros(groups, params.get("entries", 256), size)
    return read_back(weight, Shared(tuple(weight.shape), indices, table, is_pruned(encoding)))


def read_back(weight: Tensor, shared: Shared) -> Shared:
    """The form of a weight that was trained as ``shared``: tables ascending, without unused entries.

    Where one of several tables is shorter than the longest, its last entry is repeated.

    Raises:
        ModeloptError: it has more distinct values than ``shared`` has entries.
    """
    groups, entries, size = shared.table.shape
    blocks = weight.detach().cpu().to(shared.table.dtype).reshape(len(shared.indices), -1, size)
    tables, indices = zip(
        *map(_distinct, blocks.split(shared.group_rows), [shared.pruned] * groups), strict=True
    )
    longest = max(map(len, tables))
    if longest > entries:
        raise ModeloptError(f"training left {longest} distinct values where {entries} are shared")
    padded = [torch.cat([table, table[-1:].expand(longest - len(table), -1)]) for table in tables]
    return Shared(shared.shape, torch.cat(indices), torch.stack(padded), shared.pruned)


def _distinct(blocks: Tensor, pruned: bool) -> tuple[Tensor, Tensor]:
    """The table of blocks ``(rows, n, d)``, with a 0 if they are pruned, and their indices ``(rows, n)``."""
    rows, count, size = blocks.shape
    values = blocks.reshape(-1, size) + 0.0  # which turns a negative zero into zero
    if pruned:
        values = torch.cat([values, values.new_zeros(1, size)])
    # For single numbers the search without a dimension gives the same, faster.
    table, found = torch.unique(values, dim=0 if size > 1 else None, return_inverse=True)
    return table.view(-1, size), found.flatten()[: rows * count].view(rows, count)


_SUM_BITS = 62


class Book:
    """Which blocks of a weight are one, and what they are.

    Blocks that were pruned, and the entries they have, never change.

    Attributes:
        codes: the entry of every block, int64 ``(n,)``.
        table: ``(k, d)``, the tables of all groups one after another.
    """

    def __init__(self, shared: Shared) -> None:
        self.table, self.codes = shared.table.flatten(0, 1), shared.codes()
        self._pruned = (self.table == 0).all(1) & shared.pruned
        self._blocks, self._entries = shared.group_rows * shared.indices.shape[1], shared.table.shape[1]

    def on(self, weight: Tensor) -> "Book":
        """This one, moved to where a weight is; it computes in the weight's type, or in float32 if wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if (self.table.device, self.table.dtype) != (weight.device, wide):
            self._pruned = self._pruned.to(weight.device)
            self.__dict__.pop("groups", None)
            self.adopt(self.codes.to(weight.device), self.table.to(weight.device, wide))
        return self

    def adopt(self, codes: Tensor, table: Tensor) -> None:
        """Take over other codes and another table."""
        self.codes, self.table = codes, table
        for outdated in ("_cells", "_counts"):
            self.__dict__.pop(outdated, None)

    def blocks(self, weight: Tensor) -> Tensor:
        """A weight, or anything of its shape, as blocks ``(n, d)``."""
        return weight.detach().to(self.table.dtype).reshape(-1, self.table.shape[1])

    def values(self) -> Tensor:
        """What every block is: ``(n, d)``."""
        return self.table[self.codes]

    def means(self, blocks: Tensor) -> Tensor:
        """The mean over every entry's blocks, ``(k, d)``; 0 for entries that have none, and for pruned ones.

        Whole numbers are summed, so that the order, which a GPU does not keep, does not matter.
        """
        largest = blocks.abs().max().double().clamp_min(torch.finfo(torch.float32).tiny)
        # A power of two, so small as the sum of so many numbers allows; NaN where one of them is not finite.
        unit = largest / largest.frexp().mantissa / 2 ** (_SUM_BITS - blocks.numel().bit_length())
        cells = self._cells
        sums = torch.zeros(self.table.numel(), dtype=torch.int64, device=cells.device)
        sums.index_add_(0, cells, (blocks.flatten().double() / unit).round().long())
        means: Tensor = sums.view_as(self.table) * unit / self._counts.clamp_min(1)[:, None]
        return means.to(blocks.dtype).masked_fill(self._pruned[:, None], 0)

    def reassign(self, blocks: Tensor) -> None:
        """Give every block its nearest entry, and every entry the mean of its blocks."""
        codes = self.codes.clone()
        for members, entries in self.groups:
            codes[members] = entries[nearest(blocks[members], self.table[entries])]
        self.adopt(codes, self.table)
        self.adopt_means(blocks)

    def adopt_means(self, blocks: Tensor) -> None:
        """Give every entry the mean of its blocks."""
        self.table = torch.where(self._counts[:, None] > 0, self.means(blocks), self.table)

    @property
    def kept(self) -> Tensor:
        """Which blocks are not pruned: ``(n,)``."""
        return ~self._pruned[self.codes]

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """Of every group of rows, the numbers of the blocks and of the entries that are not pruned."""
        kept, found = ~self._pruned, []
        pairs = zip(kept[self.codes].split(self._blocks), kept.split(self._entries), strict=True)
        for i, (blocks, entries) in enumerate(pairs):
            if blocks.any():
                offsets = i * self._blocks, i * self._entries
                found.append((blocks.nonzero()[:, 0] + offsets[0], entries.nonzero()[:, 0] + offsets[1]))
        return found

    @cached_property
    def _cells(self) -> Tensor:
        """Where in the table every number of the weight is."""
        size = self.table.shape[1]
        if size == 1:
            return self.codes
        return (self.codes[:, None] * size + torch.arange(size, device=self.codes.device)).flatten()

    @cached_property
    def _counts(self) -> Tensor:
        return torch.bincount(self.codes, minlength=len(self.table))
