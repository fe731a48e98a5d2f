"""The optimal clusters of points on a line.

They are contiguous, so that dynamic programming finds them (Wang and Song, "Ckmeans.1d.dp", The R Journal
2011): the least error of the first i points in m clusters is the least, over j, of the error of the first j
in m - 1 and the rest in one. The best j grows with i, so that one layer takes O(n log n) by divide and
conquer (Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", 2017),
here for all midpoints of a level at once.


Moving all boundaries of a table at once, which takes it out of the local optima of Lloyd's algorithm.

Lloyd's algorithm stops where no single boundary wants to move. Where one cell too many lies on one side, all
the boundaries between would have to move by a cell together: on 4,096 normally distributed values its 16
entries end 4 to 14 % above the least error. Here each boundary gets a few places to choose from, between its
two neighbours, and dynamic programming finds the best choice of all of them together, the search of
``exact.py`` in a window around a table.
"""

from dataclasses import dataclass

import numpy as np

from modelopt_cli.methods.share.points import Array, Indices, Points


def optimal(points: Points, entries: int, *, fixed_zero: bool = False) -> Array:
    """The table with the least weighted squared error, ascending, at most ``entries`` values.

    Args:
        points: a few thousand; time grows as entries * n * log n, memory as entries * n.
        entries: size of the table.
        fixed_zero: one entry is 0, and no point is.
    """
    if not fixed_zero:
        start = np.full(len(points.x) + 1, np.inf)
        start[0] = 0.0
        return _Layers(points, start, entries).table(entries)
    # Points that go to 0 lie next to it on either side, and each side's clusters follow further out.
    right = points.where(points.x > 0)
    left = points.where(points.x < 0)
    left = Points(-left.x[::-1], left.weight[::-1], left.count[::-1])
    sides = [_Layers(side, side.squares, entries - 1) for side in (left, right)]
    errors = [sides[0].errors[m] + sides[1].errors[entries - 1 - m] for m in range(entries)]
    m = int(np.argmin(errors))
    return np.concatenate((-sides[0].table(m)[::-1], np.zeros(1), sides[1].table(entries - 1 - m)))


@dataclass
class _Layers:
    """Least errors in 0, 1, 2, ... clusters, ``errors``, and where the clusters begin.

    ``start`` is what the first 0 .. n points cost in no cluster.
    """

    points: Points
    start: Array
    entries: int

    def __post_init__(self) -> None:
        self.chosen: list[Indices] = []
        self.errors = [float(self.start[-1])]
        best = self.start
        for _ in range(self.entries):
            best, chosen = _layer(best, self.points)
            self.chosen.append(chosen)
            self.errors.append(float(best[-1]))

    def table(self, entries: int) -> Array:
        """Means of the best ``entries`` clusters, ascending; empty ones are left out."""
        end, means = len(self.points.x), []
        for chosen in reversed(self.chosen[:entries]):
            begin = int(chosen[end])
            if begin < end:
                part = slice(begin, end)
                means.append(np.average(self.points.x[part], weights=self.points.weight[part]))
            end = begin
        return np.array(means[::-1], dtype=np.float64)


def _layer(before: Array, points: Points) -> tuple[Array, Indices]:
    """One cluster more: the least errors of the first 0 .. n points, and where their last cluster begins."""
    size = len(before)
    best, chosen = before.copy(), np.zeros(size, dtype=np.intp)
    if size == 1:
        return best, chosen
    stride = 1 << (size - 1).bit_length()
    while stride > 1:
        half = stride // 2
        ends = np.arange(half, size, stride)
        after = ends + half
        low = chosen[ends - half]
        high = np.where(after < size, np.minimum(chosen[np.minimum(after, size - 1)], ends), ends)
        best[ends], chosen[ends] = _least(before, points, ends, low, np.maximum(low, high))
        stride = half
    return best, chosen


def _least(
    before: Array, points: Points, ends: Indices, low: Indices, high: Indices
) -> tuple[Array, Indices]:
    """For each end the least error, over beginnings from low to high, and the first beginning that has it."""
    lengths = high - low + 1
    starts = np.cumsum(lengths) - lengths
    begin = np.arange(lengths.sum()) - np.repeat(starts - low, lengths)
    error = before[begin] + points.spread(begin, np.repeat(ends, lengths))
    least = np.minimum.reduceat(error, starts)
    at = np.flatnonzero(error == np.repeat(least, lengths))
    owner = np.searchsorted(starts, at, side="right") - 1
    found = np.zeros(len(ends), dtype=np.intp)
    found[owner[::-1]] = begin[at[::-1]]
    return least, found


PLACES = 17
"""Places each boundary may choose from; odd, for where it is now is the middle one."""


def rearranged(points: Points, bounds: Indices, width: float, zero: int | None) -> tuple[Indices, float]:
    """The best bounds within a window around the given ones, and their squared error.

    Args:
        points: what is divided.
        bounds: where each cell begins, ascending, and the end of the last: ``(entries + 1,)``.
        width: how far a boundary may move, as a part of the way to its neighbours.
        zero: the cell whose entry is 0, if one is fixed; positive and negative points stay on its sides.
    """
    if len(bounds) < 3:
        return bounds, float(
            points.spread(bounds[:1], bounds[1:])[0]
            if zero is None
            else points.squares[-1] - points.squares[0]
        )
    places = _places(points, bounds, width, zero)
    # Neither the first cell's beginning nor the last one's end has a choice.
    begin = np.concatenate((np.zeros_like(places[:1]), places))[:, :, None]
    end = np.concatenate((places, np.full_like(places[:1], bounds[-1])))[:, None, :]
    errors = points.spread(begin, end)
    empty = begin >= end
    if zero is not None:
        errors[zero] = points.squares[end[zero]] - points.squares[begin[zero]]
        empty[zero] = begin[zero] > end[zero]
    errors[empty] = np.inf
    best, choices = errors[0, 0], []
    for error in errors[1:]:
        sums = best[:, None] + error
        choices.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    at, chosen = 0, [bounds[-1]]
    for place, choice in zip(places[::-1], choices[::-1], strict=True):
        at = choice[at]
        chosen.append(place[at])
    return np.array([0, *chosen[::-1]]), float(best[0])


def _places(points: Points, bounds: Indices, width: float, zero: int | None) -> Indices:
    """Ascending candidates for the inner bounds, ``(entries - 1, PLACES)``."""
    inner = bounds[1:-1, None]
    steps = np.linspace(0, width, PLACES // 2 + 1)
    down = inner - (inner - bounds[:-2, None]) * steps[:0:-1]
    up = inner + (bounds[2:, None] - inner) * steps
    places = np.concatenate((down, up), axis=1).astype(np.intp)
    if zero is not None:
        middle = np.searchsorted(points.x, 0.0)
        places[:zero] = np.minimum(places[:zero], middle)
        places[zero:] = np.maximum(places[zero:], middle)
    return places
