"""Positions of the stored values of a sparse tensor: the forms in which they are written, one row each.

What is stored is a bool tensor ``keep`` of shape ``(rows, length)`` here, the rows being those of a ``Grid``.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

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
from modelopt_cli.artifact.codecs.grid import Grid, grid_of, kept_blocks, n_of_m_count, spread
from modelopt_cli.artifact.codecs.runs import MAX_RUN_BITS, kept_places, run_lengths

MAX_BLOCK = 1 << 16
MAX_M = 1 << 8


class PositionsForm(ABC):
    """A form of positions; its functions take checked settings, but for ``check`` and ``pattern``.

    Attributes:
        name: the setting ``form``.
        settings: names of the settings next to ``form``, ``count`` and ``values``.
    """

    name: ClassVar[str]
    settings: ClassVar[frozenset[str]]

    @abstractmethod
    def check(self, params: Params, shape: Shape) -> None:
        """Refuse settings that are malformed or do not fit a tensor of this shape."""

    @abstractmethod
    def kept(self, nonzero: Tensor, params: Params, grid: Grid) -> Tensor:
        """Mask of the elements that are stored of rows with these nonzeros: bool ``(rows, length)``."""

    @abstractmethod
    def stream_bytes(self, params: Params, grid: Grid) -> int | None:
        """Bytes of the positions; None where there is no stream of them."""

    @abstractmethod
    def write(self, keep: Tensor, params: Params, grid: Grid) -> Tensor | None:
        """The stream of positions, uint8; None where there is none."""

    @abstractmethod
    def read(self, stream: Tensor, params: Params, grid: Grid) -> Tensor:
        """Mask of the stored elements, bool ``(rows, length)``; undoes ``write``."""

    def pattern(self, params: Params) -> str | None:
        """The pattern of the zeros, ``"N:M"`` or ``"block:B"``, where there is one."""
        return None

    def label(self, params: Params) -> str:
        """The form in reports."""
        return self.name


class _Dense(PositionsForm):
    """Every element is stored, in order."""

    name, settings = "dense", frozenset()

    def check(self, params: Params, shape: Shape) -> None:
        expect(params["count"] == math.prod(shape), "form dense stores every element")

    def kept(self, nonzero: Tensor, params: Params, grid: Grid) -> Tensor:
        return torch.ones_like(nonzero)

    def stream_bytes(self, params: Params, grid: Grid) -> None:
        return None

    def write(self, keep: Tensor, params: Params, grid: Grid) -> None:
        return None

    def read(self, stream: Tensor, params: Params, grid: Grid) -> Tensor:
        return torch.ones(grid.rows, grid.length, dtype=torch.bool)


class _Blocks(PositionsForm):
    """Blocks that hold a nonzero are stored whole."""

    settings = frozenset({"axis", "block"})

    def check(self, params: Params, shape: Shape) -> None:
        _check_int(params, "block", 1, MAX_BLOCK)

    def kept(self, nonzero: Tensor, params: Params, grid: Grid) -> Tensor:
        return nonzero if grid.block == 1 else spread(kept_blocks(nonzero, grid.block), grid)

    def write(self, keep: Tensor, params: Params, grid: Grid) -> Tensor:
        return self.write_blocks(kept_blocks(keep, grid.block), params)

    def read(self, stream: Tensor, params: Params, grid: Grid) -> Tensor:
        return spread(self.read_blocks(stream, params, grid).reshape(grid.rows, grid.across), grid)

    def pattern(self, params: Params) -> str | None:
        return f"block:{params['block']}" if params.get("block", 1) > 1 else None

    @abstractmethod
    def write_blocks(self, blocks: Tensor, params: Params) -> Tensor:
        """The stream of a mask of blocks."""

    @abstractmethod
    def read_blocks(self, stream: Tensor, params: Params, grid: Grid) -> Tensor:
        """The mask of blocks of a stream."""


class _Mask(_Blocks):
    """A bit for each block."""

    name = "mask"

    def stream_bytes(self, params: Params, grid: Grid) -> int:
        return packed_size(grid.blocks, 1)

    def write_blocks(self, blocks: Tensor, params: Params) -> Tensor:
        return pack_mask(blocks)

    def read_blocks(self, stream: Tensor, params: Params, grid: Grid) -> Tensor:
        return unpack_mask(stream, grid.blocks)


class _Entries(_Blocks):
    """A number of ``bits`` bits for each kept block, or a few."""

    settings = frozenset({"axis", "block", "bits", "entries"})
    widths: ClassVar[tuple[int, int]]
    """The smallest and the largest number of bits."""

    def check(self, params: Params, shape: Shape) -> None:
        super().check(params, shape)
        _check_int(params, "bits", *self.widths)
        _check_int(params, "entries", 0, grid_of(params, shape).blocks)

    def stream_bytes(self, params: Params, grid: Grid) -> int:
        return packed_size(params["entries"], params["bits"])

    def write_blocks(self, blocks: Tensor, params: Params) -> Tensor:
        return self.write_index(np.flatnonzero(blocks.reshape(-1).numpy()), params["bits"])

    def read_blocks(self, stream: Tensor, params: Params, grid: Grid) -> Tensor:
        index = self.read_index(stream, params["entries"], params["bits"])
        expect(len(index) == 0 or int(index[-1]) < grid.blocks, "a position lies beyond the tensor")
        blocks = torch.zeros(grid.blocks, dtype=torch.bool)
        blocks[torch.from_numpy(index)] = True
        return blocks

    @abstractmethod
    def write_index(self, index: Integers, bits: int) -> Tensor:
        """The stream of the kept blocks' places, in increasing order."""

    @abstractmethod
    def read_index(self, stream: Tensor, count: int, bits: int) -> Integers:
        """The kept blocks' places of a stream."""


class _Coordinates(_Entries):
    """The place of each kept block."""

    name, widths = "coordinate", (0, MAX_BITS)

    def write_index(self, index: Integers, bits: int) -> Tensor:
        return pack(index, bits) if bits else torch.zeros(0, dtype=torch.uint8)

    def read_index(self, stream: Tensor, count: int, bits: int) -> Integers:
        if bits == 0:
            expect(count <= 1, "positions are not in increasing order")
            return np.zeros(count, np.int64)
        index = unpack(stream, count, bits)
        expect(bool((np.diff(index) > 0).all()), "positions are not in increasing order")
        return index


class _Runs(_Entries):
    """The number of skipped blocks before each kept one."""

    name, widths = "runs", (1, MAX_RUN_BITS)

    def write_index(self, index: Integers, bits: int) -> Tensor:
        return pack(run_lengths(index, bits), bits)

    def read_index(self, stream: Tensor, count: int, bits: int) -> Integers:
        return kept_places(unpack(stream, count, bits), bits)


class _NOfM(PositionsForm):
    """Places of ``n`` elements in each whole group of ``m``; shorter groups are stored whole."""

    name, settings = "n:m", frozenset({"axis", "n", "m"})

    def check(self, params: Params, shape: Shape) -> None:
        _check_int(params, "m", 2, MAX_M)
        _check_int(params, "n", 1, params["m"] - 1)
        expect(params["count"] == n_of_m_count(grid_of(params, shape), params["n"]), "the count is wrong")

    def kept(self, nonzero: Tensor, params: Params, grid: Grid) -> Tensor:
        """Exactly ``n`` of each whole group: its nonzeros, then its first zeros."""
        keep = torch.ones_like(nonzero)
        groups = nonzero[:, : grid.grouped].reshape(-1, grid.block)
        # A group with fewer nonzeros is filled up with zeros, so that every group takes as many positions.
        counts = groups.sum(1, keepdim=True)
        zeros_so_far = torch.cumsum(~groups, 1)
        chosen = groups | (zeros_so_far <= params["n"] - counts)
        keep[:, : grid.grouped] = chosen.reshape(len(nonzero), grid.grouped)
        return keep

    def stream_bytes(self, params: Params, grid: Grid) -> int:
        groups = grid.rows * (grid.length // grid.block)
        return packed_size(groups * params["n"], _position_bits(params["m"]))

    def write(self, keep: Tensor, params: Params, grid: Grid) -> Tensor:
        index = np.flatnonzero(keep[:, : grid.grouped].reshape(-1).numpy()) % grid.block
        return pack(index, _position_bits(params["m"]))

    def read(self, stream: Tensor, params: Params, grid: Grid) -> Tensor:
        n, m = params["n"], params["m"]
        groups = grid.rows * (grid.length // m)
        index = unpack(stream, groups * n, _position_bits(m)).reshape(groups, n)
        expect(bool((index < m).all()), f"a position lies outside its group of {m}")
        expect(bool((np.diff(index, axis=1) > 0).all()), "positions are not in increasing order")
        marked = torch.zeros(groups, m, dtype=torch.bool)
        marked.scatter_(1, torch.from_numpy(index), True)
        keep = torch.ones(grid.rows, grid.length, dtype=torch.bool)
        keep[:, : grid.grouped] = marked.reshape(grid.rows, grid.grouped)
        return keep

    def pattern(self, params: Params) -> str:
        return f"{params['n']}:{params['m']}"

    label = pattern


FORMS: dict[str, PositionsForm] = {
    form.name: form for form in (_Dense(), _Mask(), _Coordinates(), _Runs(), _NOfM())
}
"""Every form, by the setting ``form``."""
DENSE = _Dense.name
"""The form without positions."""


def form_of(params: Params) -> PositionsForm:
    """The form that settings name.

    Raises:
        ArtifactError: there is no such form.
    """
    name = params.get("form")
    known = isinstance(name, str) and name in FORMS
    expect(known, f"unknown form of sparse storage {str(name)[:40]!r}")
    return FORMS[str(name)]


def check(params: Params, shape: Shape) -> None:
    """Refuse settings that are malformed or do not fit a tensor of this shape.

    Raises:
        ArtifactError: naming the setting.
    """
    form = form_of(params)
    names = form.settings | {"form", "count", "values"}
    expect(set(params) == names, f"form {form.name} needs exactly {', '.join(sorted(names))}")
    axis = params.get("axis")
    expect(axis is None or (type(axis) is int and 0 <= axis < len(shape)), "the axis does not exist")
    _check_int(params, "count", 0, math.prod(shape))
    form.check(params, shape)


def _check_int(params: Params, name: str, low: int, high: int) -> None:
    value = params[name]
    expect(type(value) is int and low <= value <= high, f"{name} must be {low} to {high}")


def _position_bits(m: int) -> int:
    """Bits that a position within a group of ``m`` takes."""
    return (m - 1).bit_length()
