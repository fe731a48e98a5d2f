"""The elements of a sparse tensor as rows and blocks.

A tensor is read as rows of ``length`` neighbouring elements. The elements of a row are taken in blocks of
``block`` (the last one perhaps shorter), and a block is stored whole or not at all.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import Params, Shape


@dataclass(frozen=True)
class Grid:
    """A tensor of ``shape``, read as ``rows`` of ``length`` elements in blocks of ``block``."""

    shape: Shape
    axis: int | None
    block: int = 1

    @property
    def length(self) -> int:
        """Elements in a row: those along ``axis``, or all but the first dimension."""
        if self.axis is not None:
            return self.shape[self.axis]
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows."""
        if self.axis is not None:
            return math.prod(n for i, n in enumerate(self.shape) if i != self.axis)
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def grouped(self) -> int:
        """Elements of a row that are in whole blocks."""
        return self.length // self.block * self.block

    @property
    def across(self) -> int:
        """Number of blocks in a row."""
        return -(-self.length // self.block)

    @property
    def blocks(self) -> int:
        """Number of blocks in all rows."""
        return self.rows * self.across

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor's rows, ``(rows, length)``."""
        moved = tensor if self.axis is None else tensor.movedim(self.axis, -1)
        return moved.reshape(self.rows, self.length)

    def restore(self, rows: Tensor) -> Tensor:
        """The tensor whose rows these are, contiguous."""
        if self.axis is None:
            return rows.reshape(self.shape)
        moved = [n for i, n in enumerate(self.shape) if i != self.axis]
        return rows.reshape(*moved, self.length).movedim(-1, self.axis).contiguous()


def grid_of(params: Params, shape: Shape) -> Grid:
    """The grid that checked settings describe."""
    return Grid(shape, params.get("axis"), params.get("m", params.get("block", 1)))


def kept_blocks(nonzero: Tensor, block: int) -> Tensor:
    """Mask of the blocks that hold a nonzero: bool ``(rows, blocks in a row)``."""
    full, length = nonzero.shape[1] // block, nonzero.shape[1]
    blocks = nonzero[:, : full * block].reshape(len(nonzero), full, block).any(2)
    if full * block == length:
        return blocks
    return torch.cat((blocks, nonzero[:, full * block :].any(1, keepdim=True)), 1)


def spread(blocks: Tensor, grid: Grid) -> Tensor:
    """The elements of the marked blocks."""
    wide = blocks.unsqueeze(2).expand(-1, -1, grid.block)
    return wide.reshape(grid.rows, grid.across * grid.block)[:, : grid.length]


def n_of_m_count(grid: Grid, n: int) -> int:
    """Values that form ``n:m`` stores: ``n`` for each whole group, and all of a row's shorter rest."""
    return grid.rows * (grid.length // grid.block * n + grid.length % grid.block)
