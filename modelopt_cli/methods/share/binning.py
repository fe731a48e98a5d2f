"""A tensor as at most a few ten thousand weighted points, fine enough for a codebook of a size.

A tensor with few values, or few distinct ones, becomes exactly those. Any other is cut into bins that keep
their weight and their mean: a centroid of complete bins is exact, and only the bins that a boundary between
two centroids runs through go to one of them undivided. For uniform bins of width h that adds about
``h^2 / 12`` of squared error for each unit of weight, where the best codebook of k centroids has
``(integral of f^(1/3))^3 / (12 k^2)`` (Panter and Dite, 1951); a sample tells the density f. So the middle
99.5 % of the values get as few uniform bins as keep the loss below ``LOSS``, and values further out are kept
one by one. Where too many would be needed, the bins follow the companding law ``f^(1/3)`` instead, at the
cost of sorting: each cell of a codebook of k centroids then spans about ``BINS / (2 k)`` bins, whatever f is.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.methods.share.points import CHUNK, Array, Indices, Points, bin_edges, condense, flat_values

BINS = 2**16
"""Distinct values that are kept as they are, at most, and bins by the companding law."""
UNIFORM_BINS = 2**18
"""Largest number of uniform bins; more no longer fit the cache, and take longer than sorting."""
LOSS = 4e-5
"""Largest expected loss from uniform bins, relative to the squared error of the best codebook."""
SORTED = 2**14
"""Values up to which a tensor is sorted in any case."""
SORTED_CHUNK = 2**22
"""Values worked on at a time where a chunk is sorted."""
_MANY_SAMPLES, _FEW_SAMPLES = 2**17, 2**13
"""Samples that tell the density: for companded bins, which follow it, and for uniform ones."""
_OUTSIDE = 400
"""One value in so many lies below the uniform bins, and one above."""

_Chunk = tuple[Array, Array | None]
"""Values, and their importance unless all count the same."""


def points_of(
    values: Tensor, size: int, importance: Tensor | None = None, *, skip_zeros: bool = False
) -> Points:
    """The points that stand for a tensor in a search for ``size`` centroids.

    Memory beyond the input is bounded, about 200 MB at most.

    Args:
        values: floats of any shape.
        size: number of centroids to search; decides how fine the bins must be.
        importance: weight of each value's squared error; the same shape, finite, not negative. Zero
            everywhere means the same as None.
        skip_zeros: leave exact zeros out.

    Raises:
        ModeloptError: no values, or not finite in float32, or importance that does not fit.
    """
    flat, weight = flat_values(values, importance)
    # The cheapest that is exact enough: uniform bins in one pass, the distinct values, bins after sorting.
    if flat.numel() > SORTED:
        x, w = _sample(flat, weight, _FEW_SAMPLES, skip_zeros)
        low, high = float(x[len(x) // _OUTSIDE]), float(x[-1 - len(x) // _OUTSIDE])
        bins = _uniform_bins(high - low, x[1:-1], w[1:-1], size)
        if bins <= UNIFORM_BINS:
            return _uniform(_chunks(flat, weight, CHUNK, skip_zeros), low, high, bins)
    points = _distinct(_chunks(flat, weight, SORTED_CHUNK, skip_zeros))
    if points is not None:
        return points
    edges = bin_edges(*_sample(flat, weight, _MANY_SAMPLES, skip_zeros), BINS)
    return _companded(_chunks(flat, weight, SORTED_CHUNK, skip_zeros), edges)


def _sample(flat: Tensor, weight: Tensor | None, count: int, skip_zeros: bool) -> tuple[Array, Array]:
    """Sorted values from random places, and the weights there, between the least and the greatest value."""
    # Random places, because evenly spaced ones would be a few columns of a matrix.
    places = torch.randint(flat.numel(), (count,), generator=torch.Generator().manual_seed(0))
    if skip_zeros:
        places = places[flat[places] != 0]
    x, w = flat[places].double().numpy(), np.ones(len(places))
    if weight is not None and (weight[places] > 0).any():
        w = weight[places].double().numpy()
    order = np.argsort(x)
    low, high = (float(v) for v in torch.aminmax(flat))
    return np.concatenate(([low], x[order], [high])), np.concatenate(([0.0], w[order], [0.0]))


def _uniform_bins(width: float, x: Array, weight: Array, size: int) -> int:
    """The number of uniform bins over ``width`` that keeps the loss below ``LOSS``, or one that is too large.

    Between neighbours of the sample the density is ``mass / gap``, so that Panter and Dite's integral is a
    sum of ``cbrt(mass * gap^2)``. A twelfth stands on both sides and is left out.
    """
    gap = np.diff(x)
    unit = gap.max()
    # Many ties tell of few values, which may all be kept.
    if not (width > 0 and unit > 0) or np.count_nonzero(gap == 0) > len(gap) / 2:
        return 2 * UNIFORM_BINS
    # A gap between two heaps of values says nothing of how dense they are, so each gap stands for the
    # least of three in a row: of random ones that is a third on average, hence the 9.
    least_gap = np.minimum(np.minimum(gap[:-2], gap[1:-1]), gap[2:]) / unit
    mass = (weight[2:-1] + weight[1:-2]) / 2
    least_error = 9 * np.cbrt(mass * least_gap**2).sum() ** 3 / size**2
    bins = 2**12
    while bins <= UNIFORM_BINS and (width / unit / bins) ** 2 * weight.sum() > LOSS * least_error:
        bins *= 2
    return bins


def _chunks(flat: Tensor, weight: Tensor | None, size: int, skip_zeros: bool) -> Iterator[_Chunk]:
    for start in range(0, flat.numel(), size):
        x = flat[start : start + size].double().numpy()
        w = None if weight is None else weight[start : start + size].double().numpy()
        if skip_zeros and not (kept := x != 0).all():
            x, w = x[kept], None if w is None else w[kept]
        yield x, w


def _uniform(chunks: Iterator[_Chunk], low: float, high: float, bins: int) -> Points:
    """Equal bins from ``low`` to ``high``, and values outside of them one by one."""
    # A bin more at either end takes what lies outside: cheaper than telling it apart first.
    sums, step = np.zeros((3, bins + 2)), (high - low) / bins
    outside: list[_Chunk] = []
    for x, w in chunks:
        place = x - (low - step)
        place *= 1 / step
        np.clip(place, 0, bins + 1, out=place)
        index = place.astype(np.intp)
        beyond = np.flatnonzero((index == 0) | (index == bins + 1))
        outside.append((x[beyond], None if w is None else w[beyond]))
        _add(sums, index, x, w)
    return Points.merged([Points.of_sums(*sums[:, 1:-1]), _outer(outside)])


def _outer(chunks: list[_Chunk]) -> Points:
    x = np.concatenate([x for x, _ in chunks])
    weights = [w for _, w in chunks if w is not None]
    return condense(Points.of_values(x, np.concatenate(weights) if weights else None), BINS)


def _companded(chunks: Iterator[_Chunk], edges: Array) -> Points:
    """Bins between given edges."""
    sums = np.zeros((3, BINS))
    for x, w in chunks:
        if w is None:
            x = np.sort(x)
        else:
            order = np.argsort(x)
            x, w = x[order], w[order]
        # Edges are searched among the values, not values among the edges: far fewer searches.
        bounds = np.concatenate(([0], np.searchsorted(x, edges), [len(x)]))
        _add(sums, np.repeat(np.arange(len(edges) + 1), np.diff(bounds)), x, w)
    return Points.of_sums(*sums)


def _add(sums: Array, index: Indices, x: Array, w: Array | None) -> None:
    """Add count, weight and weight * x of a chunk to those of its bins."""
    bins = sums.shape[1]
    count = np.bincount(index, minlength=bins)
    sums[0] += count
    sums[1] += count if w is None else np.bincount(index, w, bins)
    sums[2] += np.bincount(index, x if w is None else w * x, bins)


def _distinct(chunks: Iterator[_Chunk]) -> Points | None:
    """The distinct values with their weights; None where there are more than ``BINS``."""
    points = Points(np.zeros(0), np.zeros(0), np.zeros(0))
    for x, w in chunks:
        points = Points.merged([points, Points.of_values(x, w)])
        if len(points.x) > BINS:
            return None
    return points
