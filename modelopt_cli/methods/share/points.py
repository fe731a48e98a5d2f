"""Weighted points on a line, all that scalar k-means looks at; ``binning.py`` makes them from a tensor."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.errors import ModeloptError

CHUNK = 2**16
"""Values worked on at a time: what fits a processor's cache."""

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

    @classmethod
    def of_sums(cls, count: Array, weight: Array, first: Array) -> "Points":
        """Points from sums over bins: of values, of weights and of weight * x.

        A bin without weight says nothing about any codebook, and is left out.
        """
        used = weight > 0
        return cls(first[used] / weight[used], weight[used], count[used])

    @classmethod
    def of_values(cls, x: Array, weight: Array | None, count: Array | None = None) -> "Points":
        """One point for each distinct position; without weights every value counts 1."""
        if not len(x):
            return cls(x, x, x)
        order = np.argsort(x, kind="stable") if weight is not None else None
        x = np.sort(x) if order is None else x[order]
        starts = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1])))
        number = np.diff(np.append(starts, len(x))).astype(np.float64)
        if order is None or weight is None:
            return cls(x[starts], number, number)
        total = np.add.reduceat(weight[order], starts)
        return cls(x[starts], total, number if count is None else np.add.reduceat(count[order], starts))

    @classmethod
    def merged(cls, parts: list["Points"]) -> "Points":
        """All points of several, those of one position as one."""
        x, weight, count = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "weight", "count")
        )
        return cls.of_values(x, weight, count)

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
        at = self.middle
        return running_sums(zeroth, at), running_sums(first, at), running_sums(second, at)

    @cached_property
    def squares(self) -> Array:
        """Running sums of weight * x^2, the error of giving points the value 0."""
        return running_sums(self.weight * self.x**2, int(np.searchsorted(self.x, 0.0)))

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


def running_sums(x: Array, middle: int) -> Array:
    """Sums whose differences are the sums over ranges: ``r[end] - r[begin]`` for ``x[begin:end]``.

    They are taken outwards from the middle, so that distant values do not swallow those near it.
    """
    return np.concatenate((-np.cumsum(x[:middle][::-1])[::-1], np.zeros(1), np.cumsum(x[middle:])))


def flat_values(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Values and importance, flat and on the CPU; importance that is zero everywhere becomes None.

    Raises:
        ModeloptError: no values, or not finite in float32, or importance that does not fit.
    """
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
    index = np.searchsorted(bin_edges(points.x, points.weight, bins), points.x, side="right")
    sums = [np.bincount(index, w, bins) for w in (points.count, points.weight, points.weight * points.x)]
    return Points.of_sums(*np.stack(sums).astype(np.float64))


def bin_edges(x: Array, weight: Array, bins: int) -> Array:
    """Inner edges of bins over sorted positions.

    Half of the bins follow ``f^(1/3)``, the density of the best codebook's centroids, so that every cell of a
    codebook spans about the same number of bins; the other half hold equal weight, so that one distant value
    cannot take all of them.
    """
    # Both are taken over their largest, lest their products overflow or vanish.
    gap, mass = np.diff(x), (weight[1:] + weight[:-1]) / 2
    gap, mass = gap / (gap.max() or 1.0), mass / (mass.max() or 1.0)
    # The density between two positions is mass / gap, so a sum of f^(1/3) * gap is one of cbrt(mass * gap^2).
    laws = [law for law in (np.cumsum(np.cbrt(mass * gap * gap)), np.cumsum(mass)) if law[-1] > 0]
    if not laws:
        return x[:0]
    law = sum((law / law[-1] for law in laws), np.zeros(len(gap)))
    return np.interp(np.linspace(0, len(laws), bins + 1)[1:-1], np.concatenate((np.zeros(1), law)), x)
