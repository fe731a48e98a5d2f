"""The codebook of one weight while it is trained."""

from functools import cached_property

import torch
from torch import Tensor

from modelopt_cli.methods.share.dkm import nearest
from modelopt_cli.methods.share.shared import Shared

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
