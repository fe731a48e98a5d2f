"""Clustered weights: a few codebooks, and for each block of a weight the centroid that it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.codebook import Codebook
from modelopt_cli.artifact.encodings import codebook_shape, is_pruned
from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share.dkm import nearest
from modelopt_cli.program import Encoding

_CHUNK = 1 << 22
"""Blocks that are decoded at once."""
_SUM_BITS = 62
"""Bits of an int64 that sums of integers may use."""


@dataclass(frozen=True, eq=False)
class ClusteredWeight:
    """A weight as indices of centroids, in the layout of the codec ``codebook``.

    A weight ``(O, ...)`` is taken as ``O`` rows, and each row as blocks of ``d`` neighbouring numbers. Runs
    of ``ceil(O / groups)`` rows have a codebook each.

    Attributes:
        shape: of the weight.
        indices: ``(O, blocks)`` of any integer type.
        codebooks: floats ``(groups, centroids, d)``; ``d`` is 1 for single weights.
        pruned: centroids that are 0 stand for weights that were pruned and stay so.
    """

    shape: tuple[int, ...]
    indices: Tensor
    codebooks: Tensor
    pruned: bool = False

    @property
    def group_rows(self) -> int:
        """Rows that have a codebook in common; the last group may have fewer."""
        return -(-len(self.indices) // len(self.codebooks))

    def codes(self) -> Tensor:
        """The centroid of every block, counted through all codebooks: int64 ``(O * blocks,)``."""
        groups = torch.arange(len(self.indices)).div(self.group_rows, rounding_mode="floor")
        return (groups[:, None] * self.codebooks.shape[1] + self.indices.long()).flatten()

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, of the codebooks' type or another; a part at a time, as weights can be large."""
        codebooks = self.codebooks.to(dtype or self.codebooks.dtype)
        blocks_shape = (len(self.indices), *self.indices.shape[1:], codebooks.shape[2])
        weight = torch.empty(blocks_shape, dtype=codebooks.dtype)
        rows = self.group_rows
        for indices, blocks, codebook in zip(
            self.indices.split(rows), weight.split(rows), codebooks, strict=True
        ):
            flat, target = indices.reshape(-1), blocks.view(-1, codebook.shape[1])
            for first in range(0, len(flat), _CHUNK):
                part = flat[first : first + _CHUNK].int()
                torch.index_select(codebook, 0, part, out=target[first : first + _CHUNK])
        return weight.view(self.shape)

    def encoding(self, dtype: torch.dtype = torch.float32) -> Encoding:
        """The encoding that stores the weight as a parameter of a type."""
        groups, centroids, size = self.codebooks.shape
        params = {"entries": centroids, "groups": groups, "vector": size, "pruned": self.pruned}
        table = self.codebooks.to(dtype)
        return Encoding(Codebook.name, params, {"table": table if size > 1 else table.squeeze(-1)})


def clusters_of(weight: Tensor, encoding: Encoding) -> ClusteredWeight:
    """The clusters of a weight that is stored in codebooks, or on the levels of a scale."""
    codebooks = torch.zeros(codebook_shape(encoding))
    indices = torch.zeros(len(weight), weight[0].numel() // codebooks.shape[2], dtype=torch.int64)
    return read_back(weight, ClusteredWeight(tuple(weight.shape), indices, codebooks, is_pruned(encoding)))


def read_back(weight: Tensor, before: ClusteredWeight) -> ClusteredWeight:
    """The clusters of a weight that was trained as ``before``; codebooks ascend, without unused centroids.

    Where one of several codebooks is shorter than the longest, its last centroid is repeated.

    Raises:
        ModeloptError: it has more distinct values than ``before`` has centroids.
    """
    _, centroids, size = before.codebooks.shape
    blocks = weight.detach().cpu().to(before.codebooks.dtype).reshape(len(before.indices), -1, size)
    parts = [_distinct(part, before.pruned) for part in blocks.split(before.group_rows)]
    if (longest := max(len(codebook) for codebook, _ in parts)) > centroids:
        raise ModeloptError(f"training left {longest} distinct values where {centroids} are shared")
    codebooks, indices = zip(*parts, strict=True)
    return ClusteredWeight(before.shape, torch.cat(indices), stacked(codebooks), before.pruned)


def stacked(codebooks: Sequence[Tensor]) -> Tensor:
    """Codebooks ``(centroids, d)`` as one tensor, the last centroid of the shorter ones repeated."""
    longest = max(map(len, codebooks))
    return torch.stack([torch.cat((each, each[-1:].expand(longest - len(each), -1))) for each in codebooks])


def _distinct(blocks: Tensor, pruned: bool) -> tuple[Tensor, Tensor]:
    """The codebook of blocks ``(rows, n, d)``, with a 0 if they are pruned, and indices ``(rows, n)``."""
    rows, count, size = blocks.shape
    values = blocks.reshape(-1, size) + 0.0  # which turns a negative zero into zero
    if pruned:
        values = torch.cat([values, values.new_zeros(1, size)])
    # For single numbers the search without a dimension gives the same, faster.
    codebook, indices = torch.unique(values, dim=0 if size > 1 else None, return_inverse=True)
    return codebook.view(-1, size), indices.flatten()[: rows * count].view(rows, count)


class TrainableCodebook:
    """The centroids of one weight while it is trained, and which of its blocks are which centroid.

    Blocks that were pruned, and the centroids they have, never change.

    Attributes:
        codes: the centroid of every block, int64 ``(n,)``.
        centroids: ``(k, d)``, the codebooks of all groups one after another.
    """

    def __init__(self, clustered: ClusteredWeight) -> None:
        self.centroids, self.codes = clustered.codebooks.flatten(0, 1), clustered.codes()
        self._pruned = (self.centroids == 0).all(1) & clustered.pruned
        self._group_blocks = clustered.group_rows * clustered.indices.shape[1]
        self._group_centroids = clustered.codebooks.shape[1]

    def on(self, weight: Tensor) -> "TrainableCodebook":
        """The same, moved to where a weight is; it computes in the weight's type, or in float32 if wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if (self.centroids.device, self.centroids.dtype) != (weight.device, wide):
            self._pruned = self._pruned.to(weight.device)
            self.__dict__.pop("groups", None)
            self.adopt(self.codes.to(weight.device), self.centroids.to(weight.device, wide))
        return self

    def adopt(self, codes: Tensor, centroids: Tensor) -> None:
        """Take over other codes and other centroids."""
        self.codes, self.centroids = codes, centroids
        for outdated in ("_cells", "_counts"):
            self.__dict__.pop(outdated, None)

    def blocks(self, weight: Tensor) -> Tensor:
        """A weight, or anything of its shape, as blocks ``(n, d)``."""
        return weight.detach().to(self.centroids.dtype).reshape(-1, self.centroids.shape[1])

    def values(self) -> Tensor:
        """The centroid of every block: ``(n, d)``."""
        return self.centroids[self.codes]

    def means(self, blocks: Tensor) -> Tensor:
        """The mean over every centroid's blocks, ``(k, d)``; 0 for pruned ones and those that have none.

        Integers are summed, so that the order, which a GPU does not keep, does not matter.
        """
        largest = blocks.abs().max().double().clamp_min(torch.finfo(torch.float32).tiny)
        # A power of two, so small as the sum of so many numbers allows; NaN where one of them is not finite.
        unit = largest / largest.frexp().mantissa / 2 ** (_SUM_BITS - blocks.numel().bit_length())
        cells = self._cells
        sums = torch.zeros(self.centroids.numel(), dtype=torch.int64, device=cells.device)
        sums.index_add_(0, cells, (blocks.flatten().double() / unit).round().long())
        means: Tensor = sums.view_as(self.centroids) * unit / self._counts.clamp_min(1)[:, None]
        return means.to(blocks.dtype).masked_fill(self._pruned[:, None], 0)

    def reassign(self, blocks: Tensor) -> None:
        """Give every block its nearest centroid, and every centroid the mean of its blocks."""
        codes = self.codes.clone()
        for members, own in self.groups:
            codes[members] = own[nearest(blocks[members], self.centroids[own])]
        self.adopt(codes, self.centroids)
        self.adopt_means(blocks)

    def adopt_means(self, blocks: Tensor) -> None:
        """Give every centroid the mean of its blocks."""
        self.centroids = torch.where(self._counts[:, None] > 0, self.means(blocks), self.centroids)

    @property
    def unpruned(self) -> Tensor:
        """True for blocks that are not pruned: ``(n,)``."""
        return ~self._pruned[self.codes]

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """The numbers of the unpruned blocks, and of the unpruned centroids, of every group of rows."""
        unpruned, groups = ~self._pruned, []
        pairs = zip(
            unpruned[self.codes].split(self._group_blocks), unpruned.split(self._group_centroids), strict=True
        )
        for i, (blocks, centroids) in enumerate(pairs):
            if blocks.any():
                first_block, first_centroid = i * self._group_blocks, i * self._group_centroids
                members, own = blocks.nonzero()[:, 0], centroids.nonzero()[:, 0]
                groups.append((members + first_block, own + first_centroid))
        return groups

    @cached_property
    def _cells(self) -> Tensor:
        """The place among all centroids' numbers of every number of the weight."""
        size = self.centroids.shape[1]
        if size == 1:
            return self.codes
        return (self.codes[:, None] * size + torch.arange(size, device=self.codes.device)).flatten()

    @cached_property
    def _counts(self) -> Tensor:
        """Blocks of every centroid."""
        return torch.bincount(self.codes, minlength=len(self.centroids))
