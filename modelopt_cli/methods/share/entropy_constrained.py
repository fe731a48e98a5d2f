"""Entropy-constrained scalar quantization: codebooks for values whose indices are entropy coded afterwards.

Chou, Lookabaugh and Gray ("Entropy-constrained vector quantization", IEEE Trans. ASSP 1989) minimise the
squared error plus price times the bits, where an index k costs ``-log2 p_k``, by three steps in turn: every
value takes the centroid that costs it least, centroids move to the means of their values, and the p become
the frequencies of the centroids. On a line a centroid's values still are an interval. Its cost is a parabola,
and all have one curvature, so the cheapest centroids are the lower envelope of as many lines; a centroid that
is nowhere on it is not used.

The curvature is the importance. Values of different importance have different envelopes, so the search
puts values of like importance into one class.
"""

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share.binning import points_of
from modelopt_cli.methods.share.kmeans import bucketed
from modelopt_cli.methods.share.points import (
    CHUNK,
    Array,
    Indices,
    Points,
    bin_edges,
    flat_values,
    running_sums,
)

CLASSES = 16
"""Classes of like importance, at most."""
SAMPLE = 2**24
"""Values that a search with importance looks at, at most."""
GAIN = 1e-6
"""Fraction of the cost below which an iteration's gain ends the search."""


def constrain(
    values: Tensor,
    codebook: Tensor,
    price: float,
    *,
    importance: Tensor | None = None,
    fixed_zero: bool = False,
    iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """The codebook, and the bits of its centroids, with a small ``squared error + price * bits``.

    Args:
        values: floats of any shape.
        codebook: where to start, ascending.
        price: squared error that a bit is worth, weighted as ``importance`` weights it.
        importance: weight of each value's squared error, of the same shape; zero everywhere means uniform.
        fixed_zero: the centroid 0 stays, and exact zeros among the values count for it.
        iterations: at most.

    Returns:
        The centroids that are still used, ascending float32, and ``-log2`` of their frequencies, float32.

    Raises:
        ModeloptError: a negative price, no centroid 0 to be fixed, or values or importance that do not fit.
    """
    centroids = torch.unique(codebook.detach().cpu().double()).numpy()
    if not 0 <= price < float("inf"):
        raise ModeloptError(f"the price of a bit must be finite and not negative, not {price}")
    if fixed_zero and 0.0 not in centroids:
        raise ModeloptError("the codebook has no centroid 0 that could be fixed")
    source = _Source(values, len(centroids), importance, fixed_zero)
    bits, least = np.full(len(centroids), np.log2(len(centroids))), float("inf")
    for _ in range(iterations):
        centroids, bits, cost = source.iterate(centroids, bits, price)
        if cost >= least * (1 - GAIN):
            break
        least = cost
    return torch.from_numpy(centroids.astype(np.float32)), torch.from_numpy(bits.astype(np.float32))


def assign_rated(
    values: Tensor, codebook: Tensor, bits: Tensor, price: float, importance: Tensor | None = None
) -> Tensor:
    """The index with the least ``importance * (value - centroid)^2 + price * bits``; uint8, as the values.

    Of two that cost the same it is the lower one. Time with importance grows with the codebook.

    Args:
        values: floats of any shape.
        codebook: ascending, at most 256 centroids.
        bits: of each centroid.
        price: squared error that a bit is worth.
        importance: weight of each value's squared error; zero everywhere means uniform.

    Raises:
        ModeloptError: values or importance that do not fit.
    """
    flat, weight = flat_values(values, importance)
    centroids, costs = codebook.detach().cpu().double(), price * bits.detach().cpu().double()
    if weight is None:
        used, limits = envelope(centroids.numpy(), costs.numpy())
        index = torch.from_numpy(used.astype(np.uint8))
        return index[bucketed(flat, torch.from_numpy(limits)).long()].reshape(values.shape)
    # Every value has a curvature, and so an envelope, of its own: all centroids are compared.
    chosen = torch.empty(len(flat), dtype=torch.uint8)
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        x, w, index = flat[part].double(), weight[part].double(), chosen[part]
        least = torch.full_like(x, torch.inf)
        for k in range(len(centroids)):
            cost = (x - centroids[k]).square_().mul_(w).add_(costs[k])
            index[cost < least] = k
            torch.minimum(least, cost, out=least)
    return chosen.reshape(values.shape)


def envelope(centroids: Array, costs: Array) -> tuple[Indices, Array]:
    """Centroids cheapest somewhere by ``(x - centroid)^2 + cost``, and the ascending limits between them."""
    used = np.arange(len(centroids))
    while True:
        c, cost = centroids[used], costs[used]
        limits = (c[1:] + c[:-1]) / 2 + (cost[1:] - cost[:-1]) / (2 * (c[1:] - c[:-1]))
        # A centroid between limits that have met is nowhere cheaper than both of its neighbours.
        hidden = np.flatnonzero(limits[1:] <= limits[:-1]) + 1
        if not len(hidden):
            return used, limits
        used = np.delete(used, hidden)


class _Class:
    """Points of like importance."""

    def __init__(self, points: Points) -> None:
        self.x = points.x
        self.importance = points.weight.sum() / points.count.sum()
        middle = int(np.searchsorted(points.x, 0.0))
        sums = (points.count, points.weight, points.weight * points.x)
        self.sums = np.stack([running_sums(p, middle) for p in sums])
        self.square = float(points.weight @ points.x**2)

    def sums_by_centroid(self, centroids: Array, costs: Array) -> Array:
        """Count, weight and weight * x of the points that each centroid gets: ``(3, centroids)``."""
        # Costs over the importance: the class' parabolas then have the curvature that `envelope` expects.
        used, limits = envelope(centroids, costs / self.importance)
        inner = np.searchsorted(self.x, limits, side="right")
        bounds = np.concatenate(([0], inner, [len(self.x)]))
        sums = np.zeros((3, len(centroids)))
        sums[:, used] = np.diff(self.sums[:, bounds])
        return sums


class _Source:
    """All values: the classes, and the numbers of zeros that stay and of values without importance."""

    def __init__(self, values: Tensor, size: int, importance: Tensor | None, fixed_zero: bool) -> None:
        flat, weight = flat_values(values, importance)
        self.fixed_zero, self.unimportant = fixed_zero, 0
        if weight is None:
            self.zeros = len(flat) - int(flat.count_nonzero()) if fixed_zero else 0
            any_nonzero = self.zeros < len(flat)
            self.classes = [_Class(points_of(flat, size, skip_zeros=fixed_zero))] if any_nonzero else []
            return
        if len(flat) > SAMPLE:
            places = torch.randint(len(flat), (SAMPLE,), generator=torch.Generator().manual_seed(0))
            flat, weight = flat[places], weight[places]
        kept = flat != 0 if fixed_zero else torch.ones_like(flat, dtype=torch.bool)
        self.zeros = len(flat) - int(kept.sum())
        self.unimportant = int((kept & (weight == 0)).sum())
        kept &= weight > 0
        self.classes = _classes(flat[kept], weight[kept], size)

    def iterate(self, centroids: Array, bits: Array, price: float) -> tuple[Array, Array, float]:
        """Centroids and bits after one round, ascending, and the cost of the values with them."""
        count, weight, first = np.zeros((3, len(centroids)))
        for part in self.classes:
            sums = part.sums_by_centroid(centroids, price * bits)
            count, weight, first = count + sums[0], weight + sums[1], first + sums[2]
        # A value whose error does not count takes the cheapest index.
        count[np.argmin(bits)] += self.unimportant
        zero = (centroids == 0) & self.fixed_zero
        # Without any value of its own it costs what a single one would.
        count[zero] = np.maximum(count[zero] + self.zeros, 1)
        moved = np.divide(first, weight, out=centroids.copy(), where=(weight > 0) & ~zero)
        # sum w (x - c)^2, with the sums of w x^2, w x and w that are known.
        distortion = sum(part.square for part in self.classes) + float(
            (moved * (moved * weight - 2 * first)).sum()
        )
        centroids, owner = np.unique(moved[count > 0], return_inverse=True)
        count = np.bincount(owner, count[count > 0]).astype(np.float64)
        bits = np.log2(count.sum() / count)
        return centroids, bits, distortion + price * float(count @ bits)


def _classes(flat: Tensor, weight: Tensor, size: int) -> list[_Class]:
    """Values divided by the logarithm of their importance, which may span many magnitudes."""
    if not len(flat):
        return []
    log = weight.double().log2()
    ordered = np.sort(log[:: len(log) // 2**16 + 1].numpy())
    edges = torch.from_numpy(bin_edges(ordered, np.ones(len(ordered)), CLASSES))
    index = torch.bucketize(log, edges, right=True)
    parts = [index == k for k in range(CLASSES)]
    return [_Class(points_of(flat[p], size, weight[p])) for p in parts if p.any()]
