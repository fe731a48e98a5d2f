"""A tensor as at most a few ten thousand weighted points on a line, all that scalar k-means looks at.

A tensor with few values, or few distinct ones, becomes exactly those. Any other is cut into bins that keep
their weight and their mean: a centroid of whole bins is exact, and only the bins that a boundary between
two entries runs through are attributed as a whole. For uniform bins of width h that adds about ``h^2 / 12``
of squared error for each unit of weight, where the best table of k entries has
``(integral of f^(1/3))^3 / (12 k^2)`` (Panter and Dite, 1951); a sample tells f. So the middle 99.5 % of the
values get as few uniform bins as keep the loss below ``LOSS``, and what lies further out is kept value by
value. Where too many would be needed, the bins follow the companding law ``f^(1/3)`` instead, at the cost
of sorting: each cell of a table of k entries then spans about ``BINS / (2 k)`` bins, whatever f is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.errors import ModeloptError

BINS = 2**16
UNIFORM_BINS = 2**18
"""The most that uniform bins may be; more no longer fit the cache, and take longer than sorting."""
LOSS = 4e-5
"""Largest expected loss from uniform bins, relative to the squared error of the best table."""
SORTED = 2**14
"""Values up to which a tensor is sorted in any case."""
CHUNK = 2**16
"""Values worked on at a time: what fits a processor's cache."""
SORTED_CHUNK = 2**22
"""The same where a chunk is sorted."""

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Points:
    """Points on a line.

    Attributes:
        x: positions, ascending.
        weight: importance of the values at each point, summed.
        count: number of values at each point.
    """

    x: Array
    weight: Array
    count: Array

    @cached_property
    def middle(self) -> int:
        """The point that halves the weight."""
        mass = np.cumsum(self.weight)
        return int(np.searchsorted(mass[:-1], mass[-1] / 2))

    @cached_property
    def moments(self) -> tuple[Array, Array, Array]:
        """Running sums of weight, weight * d and weight * d^2, where d is the distance from the middle."""
        d = self.x - self.x[self.middle]
        zeroth, first, second = self.weight, self.weight * d, self.weight * d * d
        return running(zeroth, self.middle), running(first, self.middle), running(second, self.middle)

    @cached_property
    def squares(self) -> Array:
        """Running sums of weight * x^2, what it costs to give points the value 0."""
        return running(self.weight * self.x**2, int(np.searchsorted(self.x, 0.0)))

    def spread(self, begin: Indices, end: Indices) -> Array:
        """Squared error about their own mean of the points from ``begin`` to before ``end``."""
        zeroth, first, second = (sums[end] - sums[begin] for sums in self.moments)
        mean = np.divide(first, zeroth, out=np.zeros_like(first), where=zeroth > 0)
        return np.maximum(second - first * mean, 0.0)

    def means(self, bounds: Indices) -> Array:
        """Mean of the points between every two bounds; NaN where there is none."""
        zeroth, first = (np.diff(sums[bounds]) for sums in self.moments[:2])
        means: Array = np.divide(first, zeroth, out=np.full(len(first), np.nan), where=zeroth > 0)
        means += self.x[self.middle]
        return means

    def where(self, mask: NDArray[np.bool_]) -> "Points":
        """The points a mask chooses."""
        return Points(self.x[mask], self.weight[mask], self.count[mask])


def running(x: Array, middle: int) -> Array:
    """Sums whose differences are the sums over ranges: ``r[end] - r[begin]`` for ``x[begin:end]``.

    They are taken outwards from the middle, so that distant values do not swallow those near it.
    """
    return np.concatenate((-np.cumsum(x[:middle][::-1])[::-1], np.zeros(1), np.cumsum(x[middle:])))


def summarise(
    values: Tensor, entries: int, importance: Tensor | None = None, *, skip_zeros: bool = False
) -> Points:
    """The points that stand for a tensor in a search for ``entries`` values.

    Memory beyond the input is bounded, about 200 MB at most.

    Args:
        values: floats of any shape.
        entries: how many values will be searched; decides how fine the bins must be.
        importance: weight of each value's squared error; the same shape, finite, not negative. Zero
            everywhere means the same as None.
        skip_zeros: leave exact zeros out.

    Raises:
        ModeloptError: no values, or not finite in float32, or importance that does not fit.
    """
    flat, weight = checked(values, importance)
    if flat.numel() > SORTED:
        x, w = _sample(flat, weight, 2**13, skip_zeros)
        low, high = float(x[len(x) // 400]), float(x[-1 - len(x) // 400])
        bins = _uniform_bins(high - low, x[1:-1], w[1:-1], entries)
        if bins <= UNIFORM_BINS:
            return _uniform(_chunks(flat, weight, CHUNK, skip_zeros), low, high, bins)
    points = _distinct(_chunks(flat, weight, SORTED_CHUNK, skip_zeros))
    if points is not None:
        return points
    edges = layout(*_sample(flat, weight, 2**17, skip_zeros), BINS)
    return _companded(_chunks(flat, weight, SORTED_CHUNK, skip_zeros), edges)


def checked(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both flat, on the CPU and fit to work with; importance that is zero everywhere becomes None."""
    flat = values.detach().reshape(-1).cpu()
    if not flat.numel() or not flat.is_floating_point():
        raise ModeloptError(f"k-means needs floating-point values, not {flat.numel()} of {flat.dtype}")
    low, high = (float(v) for v in torch.aminmax(flat))
    if not max(-low, high) <= torch.finfo(torch.float32).max:
        raise ModeloptError("k-means needs values that are finite in float32")
    if importance is None:
        return flat, None
    if importance.shape != values.shape:
        raise ModeloptError(
            f"importance has shape {tuple(importance.shape)} where the values have {tuple(values.shape)}"
        )
    weight = importance.detach().reshape(-1).cpu()
    least, most = (float(v) for v in torch.aminmax(weight))
    if not 0 <= least <= most < float("inf"):
        raise ModeloptError("importance must be finite and not negative")
    return flat, (weight if most > 0 else None)


def condense(points: Points, bins: int) -> Points:
    """Points merged into at most ``bins``, each at the mean of those it stands for."""
    if len(points.x) <= bins:
        return points
    index = np.searchsorted(layout(points.x, points.weight, bins), points.x, side="right")
    sums = [np.bincount(index, w, bins) for w in (points.count, points.weight, points.weight * points.x)]
    return _means(*np.stack(sums).astype(np.float64))


def layout(x: Array, weight: Array, bins: int) -> Array:
    """Inner edges of bins over sorted positions.

    Half of the bins follow ``f^(1/3)``, the density of the best table's entries, so that every cell of a
    table spans about the same number of bins; the other half hold equal weight, so that one distant value
    cannot take all of them.
    """
    gap, mass = np.diff(x), (weight[1:] + weight[:-1]) / 2
    gap, mass = gap / (gap.max() or 1.0), mass / (mass.max() or 1.0)
    laws = [law for law in (np.cumsum(np.cbrt(mass * gap * gap)), np.cumsum(mass)) if law[-1] > 0]
    if not laws:
        return x[:0]
    law = sum((law / law[-1] for law in laws), np.zeros(len(gap)))
    return np.interp(np.linspace(0, len(laws), bins + 1)[1:-1], np.concatenate((np.zeros(1), law)), x)


def _sample(flat: Tensor, weight: Tensor | None, size: int, skip_zeros: bool) -> tuple[Array, Array]:
    """Sorted values from random places, and the weights there, between the least and the greatest value."""
    # Random places, because evenly spaced ones would be a few columns of a matrix.
    places = torch.randint(flat.numel(), (size,), generator=torch.Generator().manual_seed(0))
    if skip_zeros:
        places = places[flat[places] != 0]
    x, w = flat[places].double().numpy(), np.ones(len(places))
    if weight is not None and (weight[places] > 0).any():
        w = weight[places].double().numpy()
    order = np.argsort(x)
    low, high = (float(v) for v in torch.aminmax(flat))
    return np.concatenate(([low], x[order], [high])), np.concatenate(([0.0], w[order], [0.0]))


def _uniform_bins(width: float, x: Array, weight: Array, entries: int) -> int:
    """How many uniform bins over ``width`` keep the loss below ``LOSS``: a power of two, or too many."""
    gap = np.diff(x)
    unit = gap.max()
    # Many ties tell of few values, which may all be kept.
    if not (width > 0 and unit > 0) or np.count_nonzero(gap == 0) > len(gap) / 2:
        return 2 * UNIFORM_BINS
    # A gap between two heaps of values says nothing of how dense they are, so each gap stands for the
    # least of three in a row: of random ones that is a third on average, hence the 9.
    least_gap = np.minimum(np.minimum(gap[:-2], gap[1:-1]), gap[2:]) / unit
    mass = (weight[2:-1] + weight[1:-2]) / 2
    least = 9 * np.cbrt(mass * least_gap**2).sum() ** 3 / entries**2
    bins = 2**12
    while bins <= UNIFORM_BINS and (width / unit / bins) ** 2 * weight.sum() > LOSS * least:
        bins *= 2
    return bins


_Chunk = tuple[Array, Array | None]


def _chunks(flat: Tensor, weight: Tensor | None, size: int, skip_zeros: bool) -> Iterator[_Chunk]:
    for start in range(0, flat.numel(), size):
        x = flat[start : start + size].double().numpy()
        w = None if weight is None else weight[start : start + size].double().numpy()
        if skip_zeros and not (kept := x != 0).all():
            x, w = x[kept], None if w is None else w[kept]
        yield x, w


def _uniform(chunks: Iterator[_Chunk], low: float, high: float, bins: int) -> Points:
    """Equal bins from ``low`` to ``high``, and what lies outside of them value by value."""
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
    return _merged([_means(*sums[:, 1:-1]), _outer(outside)])


def _outer(chunks: list[_Chunk]) -> Points:
    x = np.concatenate([x for x, _ in chunks])
    weights = [w for _, w in chunks if w is not None]
    return condense(_grouped(x, np.concatenate(weights) if weights else None), BINS)


def _companded(chunks: Iterator[_Chunk], edges: Array) -> Points:
    sums = np.zeros((3, BINS))
    for x, w in chunks:
        if w is None:
            x = np.sort(x)
        else:
            order = np.argsort(x)
            x, w = x[order], w[order]
        # Far fewer searches than values.
        bounds = np.concatenate(([0], np.searchsorted(x, edges), [len(x)]))
        _add(sums, np.repeat(np.arange(len(edges) + 1), np.diff(bounds)), x, w)
    return _means(*sums)


def _add(sums: Array, index: Indices, x: Array, w: Array | None) -> None:
    """Add count, weight and weight * x of a chunk to those of its bins."""
    bins = sums.shape[1]
    count = np.bincount(index, minlength=bins)
    sums[0] += count
    sums[1] += count if w is None else np.bincount(index, w, bins)
    sums[2] += np.bincount(index, x if w is None else w * x, bins)


def _means(count: Array, weight: Array, first: Array) -> Points:
    """Points from the sums over bins; a bin without weight says nothing about any table."""
    used = weight > 0
    return Points(first[used] / weight[used], weight[used], count[used])


def _distinct(chunks: Iterator[_Chunk]) -> Points | None:
    """The distinct values with their weights; None where there are more than ``BINS``."""
    points = Points(np.zeros(0), np.zeros(0), np.zeros(0))
    for x, w in chunks:
        points = _merged([points, _grouped(x, w)])
        if len(points.x) > BINS:
            return None
    return points


def _merged(parts: list[Points]) -> Points:
    x, weight, count = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("x", "weight", "count")
    )
    return _grouped(x, weight, count)


def _grouped(x: Array, weight: Array | None, count: Array | None = None) -> Points:
    """One point for each distinct position."""
    if not len(x):
        return Points(x, x, x)
    order = np.argsort(x, kind="stable") if weight is not None else None
    x = np.sort(x) if order is None else x[order]
    starts = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1])))
    number = np.diff(np.append(starts, len(x))).astype(np.float64)
    if order is None or weight is None:
        return Points(x[starts], number, number)
    total = np.add.reduceat(weight[order], starts)
    return Points(x[starts], total, number if count is None else np.add.reduceat(count[order], starts))
