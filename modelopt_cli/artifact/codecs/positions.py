"""Positions of the stored values of a sparse tensor, and the forms in which they are written.

A tensor is read as rows of ``length`` neighbouring elements. The elements of a row are taken in blocks of
``block`` (the last one perhaps shorter), and a block is stored whole or not at all. What is stored is a
bool tensor ``keep`` of shape ``(rows, length)`` here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import Params, Shape, expect
from modelopt_cli.artifact.codecs.bits import (
    MAX_BITS,
    Integers,
    pack,
    pack_mask,
    packed_size,
    unpack,
    unpack_mask,
)

MAX_BLOCK = 1 << 16
MAX_RUN_BITS = 24
MAX_M = 1 << 8

SETTINGS: dict[str, frozenset[str]] = {
    "dense": frozenset(),
    "mask": frozenset({"axis", "block"}),
    "coordinate": frozenset({"axis", "block", "bits", "entries"}),
    "runs": frozenset({"axis", "block", "bits", "entries"}),
    "n:m": frozenset({"axis", "n", "m"}),
}
"""Settings of each form next to ``form``, ``count`` and ``values``."""


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


def check(params: Params, shape: Shape) -> None:
    """Refuse settings that are malformed or do not fit a tensor of this shape.

    Raises:
        ArtifactError: naming the setting.
    """
    form = params.get("form")
    expect(isinstance(form, str) and form in SETTINGS, f"unknown form of sparse storage {str(form)[:40]!r}")
    names = SETTINGS[str(form)] | {"form", "count", "values"}
    expect(set(params) == names, f"form {form} needs exactly {', '.join(sorted(names))}")
    axis = params.get("axis")
    expect(axis is None or (type(axis) is int and 0 <= axis < len(shape)), "the axis does not exist")
    if "block" in names:
        _check_int(params, "block", 1, MAX_BLOCK)
    if form == "n:m":
        _check_int(params, "m", 2, MAX_M)
        _check_int(params, "n", 1, params["m"] - 1)
    _check_int(params, "count", 0, math.prod(shape))
    if form == "dense":
        expect(params["count"] == math.prod(shape), "form dense stores every element")
    if form == "n:m":
        expect(params["count"] == n_of_m_count(grid_of(params, shape), params["n"]), "the count is wrong")
    if "entries" in names:
        low, high = (1, MAX_RUN_BITS) if form == "runs" else (0, MAX_BITS)
        _check_int(params, "bits", low, high)
        _check_int(params, "entries", 0, grid_of(params, shape).blocks)


def _check_int(params: Params, name: str, low: int, high: int) -> None:
    value = params[name]
    expect(type(value) is int and low <= value <= high, f"{name} must be {low} to {high}")


def stream_bytes(params: Params, shape: Shape) -> int | None:
    """Bytes of the positions, from checked settings; None where the form needs none."""
    form = params["form"]
    if form == "dense":
        return None
    grid = grid_of(params, shape)
    if form == "mask":
        return packed_size(grid.blocks, 1)
    if form == "n:m":
        groups = grid.rows * (grid.length // grid.block)
        return packed_size(groups * params["n"], position_bits(params["m"]))
    return packed_size(params["entries"], params["bits"])


def position_bits(m: int) -> int:
    """Bits that a position within a group of ``m`` takes."""
    return (m - 1).bit_length()


def n_of_m_count(grid: Grid, n: int) -> int:
    """Values that form ``n:m`` stores: ``n`` for each whole group, and all of a row's shorter rest."""
    return grid.rows * (grid.length // grid.block * n + grid.length % grid.block)


# --- what is to be stored ------------------------------------------------------------------------------


def kept(rows: Tensor, params: Params, grid: Grid) -> Tensor:
    """Mask of the elements of a tensor's rows that a form stores: bool ``(rows, length)``."""
    nonzero = rows != 0
    if params["form"] == "dense":
        return torch.ones_like(nonzero)
    if params["form"] == "n:m":
        return _n_of_m(nonzero, grid, params["n"])
    return nonzero if grid.block == 1 else _spread(kept_blocks(nonzero, grid.block), grid)


def kept_blocks(nonzero: Tensor, block: int) -> Tensor:
    """Mask of the blocks that hold a nonzero: bool ``(rows, blocks in a row)``."""
    full, length = nonzero.shape[1] // block, nonzero.shape[1]
    blocks = nonzero[:, : full * block].reshape(len(nonzero), full, block).any(2)
    if full * block == length:
        return blocks
    return torch.cat((blocks, nonzero[:, full * block :].any(1, keepdim=True)), 1)


def _spread(blocks: Tensor, grid: Grid) -> Tensor:
    """The elements of the marked blocks."""
    wide = blocks.unsqueeze(2).expand(-1, -1, grid.block)
    return wide.reshape(grid.rows, grid.across * grid.block)[:, : grid.length]


def _n_of_m(nonzero: Tensor, grid: Grid, n: int) -> Tensor:
    """Exactly ``n`` of each whole group: its nonzeros, then its first zeros; and all of the rest."""
    keep = torch.ones_like(nonzero)
    grouped = grid.length // grid.block * grid.block
    groups = nonzero[:, :grouped].reshape(len(nonzero) * (grouped // grid.block), grid.block)
    # A group with fewer nonzeros is filled up with zeros, so that every group takes as many positions.
    counts = groups.sum(1, keepdim=True)
    zeros_so_far = torch.cumsum(~groups, 1)
    keep[:, :grouped] = (groups | (zeros_so_far <= n - counts)).reshape(len(nonzero), grouped)
    return keep


# --- positions to bytes --------------------------------------------------------------------------------


def write(keep: Tensor, params: Params, grid: Grid) -> Tensor:
    """The stream of positions, uint8, for elements chosen by :func:`kept`."""
    if params["form"] == "n:m":
        grouped = grid.length // grid.block * grid.block
        index = np.flatnonzero(keep[:, :grouped].reshape(-1).numpy()) % grid.block
        return pack(index, position_bits(params["m"]))
    blocks = kept_blocks(keep, grid.block)
    if params["form"] == "mask":
        return pack_mask(blocks)
    index = np.flatnonzero(blocks.reshape(-1).numpy())
    if params["form"] == "coordinate":
        return pack(index, params["bits"]) if params["bits"] else torch.zeros(0, dtype=torch.uint8)
    return pack(run_lengths(index, params["bits"]), params["bits"])


def gaps(index: Integers) -> Integers:
    """Numbers of blocks that are skipped before each kept one."""
    return np.diff(index, prepend=-1) - 1


def run_lengths(index: Integers, bits: int) -> Integers:
    """Skipped blocks before each kept one; the largest number says: so many, and none kept yet."""
    escape = (1 << bits) - 1
    skipped = gaps(index)
    escapes = skipped // escape  # before each kept block
    ends = np.cumsum(escapes + 1) - 1  # entries that end with a kept block
    entries = np.full(len(index) + int(escapes.sum()), escape, np.int64)
    entries[ends] = skipped % escape
    return entries


# --- bytes to positions --------------------------------------------------------------------------------


def read(stream: Tensor, params: Params, grid: Grid) -> Tensor:
    """Mask of the stored elements, bool ``(rows, length)``; undoes :func:`write`.

    Raises:
        ArtifactError: positions that are out of range, out of order or beyond the tensor.
    """
    form = params["form"]
    if form == "n:m":
        return _read_n_of_m(stream, params, grid)
    if form == "mask":
        blocks = unpack_mask(stream, grid.blocks)
    else:
        index = _read_coordinates(stream, params) if form == "coordinate" else _read_runs(stream, params)
        expect(len(index) == 0 or int(index[-1]) < grid.blocks, "a position lies beyond the tensor")
        blocks = torch.zeros(grid.blocks, dtype=torch.bool)
        blocks[torch.from_numpy(index)] = True
    return _spread(blocks.reshape(grid.rows, grid.across), grid)


def _read_coordinates(stream: Tensor, params: Params) -> Integers:
    if params["bits"] == 0:
        expect(params["entries"] <= 1, "positions are not in increasing order")
        return np.zeros(params["entries"], np.int64)
    index = unpack(stream, params["entries"], params["bits"])
    expect(bool((np.diff(index) > 0).all()), "positions are not in increasing order")
    return index


def _read_runs(stream: Tensor, params: Params) -> Integers:
    entries = unpack(stream, params["entries"], params["bits"])
    ends = entries != (1 << params["bits"]) - 1
    expect(len(entries) == 0 or bool(ends[-1]), "the last run of zeros ends nowhere")
    # An entry moves on by the blocks that it skips, and by one more where a kept block ends it.
    return np.asarray((np.cumsum(entries + ends) - 1)[ends])


def _read_n_of_m(stream: Tensor, params: Params, grid: Grid) -> Tensor:
    n, m = params["n"], params["m"]
    groups = grid.rows * (grid.length // m)
    index = unpack(stream, groups * n, position_bits(m)).reshape(groups, n)
    expect(bool((index < m).all()), f"a position lies outside its group of {m}")
    expect(bool((np.diff(index, axis=1) > 0).all()), "positions are not in increasing order")
    marked = torch.zeros(groups, m, dtype=torch.bool)
    marked.scatter_(1, torch.from_numpy(index), True)
    keep = torch.ones(grid.rows, grid.length, dtype=torch.bool)
    grouped = grid.length // m * m
    keep[:, :grouped] = marked.reshape(grid.rows, grouped)
    return keep
