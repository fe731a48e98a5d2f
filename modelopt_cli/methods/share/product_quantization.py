"""Product quantization: one codebook of short vectors for the blocks that weights are cut into.

Jégou, Douze and Schmid ("Product quantization for nearest neighbor search", TPAMI 2011); with the diagonal
of the activations' second moments as importance, so that the error counts where it reaches the outputs, as
in Stock et al., "And the bit goes down" (ICLR 2020). Distances come from matrix products over chunks.
"""

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.errors import ModeloptError

CHUNK_ELEMENTS = 2**22
"""Distances held at a time."""
SAMPLE = 32
"""Blocks for each centroid that the start is drawn from."""
ROUNDS = 512
"""A draw adds one centroid in so many, at least one."""


def cluster_vectors(
    blocks: Tensor, size: int, *, importance: Tensor | None = None, seed: int = 0, iterations: int = 25
) -> Tensor:
    """A codebook of vectors by Lloyd's algorithm.

    Args:
        blocks: floats ``(n, d)``.
        size: of the codebook, at most 65,536.
        importance: weight of the squared error of each block ``(n,)``, or of each number in it ``(n, d)``.
        seed: for the start, which is drawn by squared distance.
        iterations: at most.

    Returns:
        The codebook, float32 ``(size, d)``; with fewer rows where there are fewer distinct blocks.

    Raises:
        ModeloptError: shapes that do not fit, numbers that are not finite, a codebook that is too large.
    """
    if not 1 <= size <= 2**16:
        raise ModeloptError(f"a codebook of vectors has 1 to 65536 centroids, not {size}")
    data = _Blocks(blocks, importance)
    codebook = _drawn(data, size, seed)
    previous = None
    for _ in range(iterations):
        index, error = data.nearest(codebook)
        if previous is not None and torch.equal(index, previous):
            break
        previous = index
        codebook = _moved(data, index, error, codebook)
    distinct: Tensor = torch.unique(codebook * data.scale, dim=0)
    return distinct


def assign_vectors(blocks: Tensor, codebook: Tensor, importance: Tensor | None = None) -> Tensor:
    """The nearest centroid of each block, up to the rounding of float32 products.

    Args:
        blocks: floats ``(n, d)``.
        codebook: ``(size, d)``, at most 65,536 centroids.
        importance: as for ``cluster_vectors``; one number for a whole block changes nothing.

    Returns:
        ``(n,)``: uint8 for up to 256 centroids, else uint16.
    """
    data = _Blocks(blocks, importance)
    index, _ = data.nearest(codebook.detach().cpu().float() / data.scale)
    return index.to(torch.uint8 if len(codebook) <= 256 else torch.uint16)


class _Blocks:
    """Blocks scaled into a range whose squares float32 can hold, and their importance with a mean near 1."""

    def __init__(self, blocks: Tensor, importance: Tensor | None) -> None:
        if blocks.dim() != 2 or not blocks.numel():
            raise ModeloptError(f"blocks must have the shape (n, d), not {tuple(blocks.shape)}")
        if importance is not None and importance.shape not in (blocks.shape, blocks.shape[:1]):
            raise ModeloptError(
                f"importance has shape {tuple(importance.shape)} where the blocks have {tuple(blocks.shape)}"
            )
        x = blocks.detach().cpu().float()
        self.scale = _power_of_two(float(x.abs().max()))
        self.x = x / self.scale
        self.weight = torch.ones(len(x), 1)
        if importance is not None:
            weight = importance.detach().cpu().float().reshape(len(x), -1)
            if not 0 <= float(weight.min()) <= float(weight.max()) < float("inf"):
                raise ModeloptError("importance must be finite and not negative")
            if float(weight.max()) > 0:
                self.weight = weight / _power_of_two(float(weight.max()))

    def rows(self, rows: Tensor) -> "_Blocks":
        """Some of the blocks."""
        part = copy.copy(self)
        part.x, part.weight = self.x[rows], self.weight[rows]
        return part

    def chunks(self, centroids: int) -> Iterator[slice]:
        """Parts of the blocks, so that distances to so many centroids are not too many at once."""
        count = max(CHUNK_ELEMENTS // centroids, 1)
        return (slice(start, start + count) for start in range(0, len(self.x), count))

    def nearest(self, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the nearest centroid, and the weighted squared error there; ``(n,)`` each."""
        index, error = torch.empty(len(self.x), dtype=torch.int64), torch.empty(len(self.x))
        squares = codebook.square().T
        for part in self.chunks(len(codebook)):
            x, weight = self.x[part], self.weight[part]
            # One weight for a whole block does not change which centroid is nearest, not even where it is 0.
            distance = squares.sum(0) if weight.shape[1] == 1 else weight @ squares
            scaled = x if weight.shape[1] == 1 else weight * x
            index[part] = torch.addmm(distance.expand(len(x), -1), scaled, codebook.T, alpha=-2).argmin(1)
            error[part] = (weight * (x - codebook[index[part]]).square()).sum(1)
        return index, error


def _power_of_two(most: float) -> float:
    """The power of two next below, within what float32 can divide by."""
    if not math.isfinite(most):
        raise ModeloptError("k-means needs values that are finite in float32")
    return 2.0 ** min(max(math.frexp(most)[1] - 1, -126), 126) if most else 1.0


def _drawn(data: _Blocks, size: int, seed: int) -> Tensor:
    """A start drawn by squared distance, one after the other (k-means++, Arthur and Vassilvitskii, 2007).

    Large codebooks draw several at a time (Bahmani et al., "Scalable k-means++", 2012), and all draw from a
    sample, unless it has too few distinct blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(data.x), generator=generator)[: SAMPLE * size]
    codebook = _extended(data.rows(sample), data.x[:0], size, generator)
    return codebook if len(codebook) == size else _extended(data, codebook, size, generator)


def _extended(data: _Blocks, codebook: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A codebook with blocks added up to ``size``, or until every block has an exact centroid."""
    error = data.nearest(codebook)[1] if len(codebook) else data.weight.mean(1)
    while len(codebook) < size:
        mass = error.double().cumsum(0)
        if not mass[-1] > 0:
            break
        count = min(len(codebook) // ROUNDS + 1, size - len(codebook))
        places = torch.rand(count, generator=generator, dtype=torch.float64) * mass[-1]
        rows = torch.searchsorted(mass, places, right=True).clamp_(max=len(mass) - 1).unique()
        more = data.nearest(data.x[rows])[1]
        error = torch.minimum(error, more) if len(codebook) else more
        codebook = torch.cat([codebook, data.x[rows]])
    return codebook


def _moved(data: _Blocks, index: Tensor, error: Tensor, codebook: Tensor) -> Tensor:
    """Every centroid at the mean of its blocks; an unused one at the worst block of a bad cluster."""
    weight = data.weight.double()
    first = torch.zeros(codebook.shape, dtype=torch.float64).index_add_(0, index, weight * data.x)
    mass = torch.zeros(len(codebook), weight.shape[1], dtype=torch.float64).index_add_(0, index, weight)
    moved = torch.where(mass > 0, first / mass.clamp_min(torch.finfo(torch.float64).tiny), codebook).float()
    unused = np.flatnonzero(np.bincount(index.numpy(), minlength=len(codebook)) == 0)
    if len(unused):
        errors = np.bincount(index.numpy(), error.numpy(), len(codebook))
        worst = np.argsort(-errors, kind="stable")[: len(unused)]
        worst = worst[errors[worst] > 0]
        order, block = np.argsort(error.numpy(), kind="stable"), np.zeros(len(codebook), dtype=np.intp)
        # The last of several assignments to one place stays, and it is the block with the largest error.
        block[index.numpy()[order]] = order
        moved[unused[: len(worst)]] = data.x[block[worst]]
    return moved
