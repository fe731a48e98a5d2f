"""Dynamic programming over the clusters of points on a line, which are intervals.

``optimal`` finds the best codebook there is (Wang and Song, "Ckmeans.1d.dp", The R Journal 2011): the least
error of the first i points in m clusters is the least, over j, of the error of the first j in m - 1 and the
rest in one. The best j grows with i, so that one more cluster takes O(n log n) by divide and conquer
(Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", 2017), here for all
midpoints of a level at once.

``rearranged`` moves all boundaries of a codebook at once, which takes it out of the local optima of Lloyd's
algorithm. That stops where no single boundary wants to move. Where one cell too many lies on one side, all
the boundaries between would have to move by a cell together: on 4,096 normally distributed values its 16
centroids end 4 to 14 % above the least error. Here each boundary gets a few places to choose from, between
its two neighbours, and the best choice of all of them together is found.
"""

from dataclasses import dataclass

import numpy as np

from modelopt_cli.methods.share.points import Array, Indices, Points

PLACES = 17
"""Places each boundary may choose from; odd, for where it is now is the middle one."""


def optimal(points: Points, size: int, *, fixed_zero: bool = False) -> Array:
    """The centroids with the least weighted squared error, ascending, at most ``size``.

    Args:
        points: a few thousand; time grows as size * n * log n, memory as size * n.
        size: of the codebook.
        fixed_zero: one centroid is 0, and no point is.
    """
    if not fixed_zero:
        start = np.full(len(points.x) + 1, np.inf)
        start[0] = 0.0
        return _ClusterCounts(points, start, size).centroids(size)
    # Points that go to 0 lie next to it on either side, and each side's clusters follow further out.
    right = points.where(points.x > 0)
    mirrored = points.where(points.x < 0)
    left = Points(-mirrored.x[::-1], mirrored.weight[::-1], mirrored.count[::-1])
    sides = [_ClusterCounts(side, side.squares, size - 1) for side in (left, right)]
    errors = [sides[0].errors[m] + sides[1].errors[size - 1 - m] for m in range(size)]
    m = int(np.argmin(errors))
    return np.concatenate((-sides[0].centroids(m)[::-1], np.zeros(1), sides[1].centroids(size - 1 - m)))


@dataclass
class _ClusterCounts:
    """The best division of points into 0, 1, 2, ... clusters.

    Attributes:
        points: what is divided.
        start: the error of the first 0 .. n points in no cluster.
        most: number of clusters up to which it is known.
        errors: least error, by number of clusters.
        begins: by number of clusters less one, where the last cluster of the first 0 .. n points begins.
    """

    points: Points
    start: Array
    most: int

    def __post_init__(self) -> None:
        self.begins: list[Indices] = []
        self.errors = [float(self.start[-1])]
        best = self.start
        for _ in range(self.most):
            best, begin = _one_cluster_more(best, self.points)
            self.begins.append(begin)
            self.errors.append(float(best[-1]))

    def centroids(self, count: int) -> Array:
        """Means of the best ``count`` clusters, ascending; empty ones are left out."""
        end, means = len(self.points.x), []
        for begins in reversed(self.begins[:count]):  # from the last cluster back
            begin = int(begins[end])
            if begin < end:
                part = slice(begin, end)
                means.append(np.average(self.points.x[part], weights=self.points.weight[part]))
            end = begin
        return np.array(means[::-1], dtype=np.float64)


def _one_cluster_more(before: Array, points: Points) -> tuple[Array, Indices]:
    """The least errors of the first 0 .. n points with one cluster more, and where that begins.

    Ends are worked through from coarse to fine, all of one stride together. The best beginning grows with the
    end, so that those of the two neighbours that are known bound it, and all searches of a stride together
    look at about n beginnings.
    """
    size = len(before)
    best, begins = before.copy(), np.zeros(size, dtype=np.intp)
    if size == 1:
        return best, begins
    stride = 1 << (size - 1).bit_length()
    while stride > 1:
        half = stride // 2
        ends = np.arange(half, size, stride)
        after = ends + half
        low = begins[ends - half]
        high = np.where(after < size, np.minimum(begins[np.minimum(after, size - 1)], ends), ends)
        best[ends], begins[ends] = _least(before, points, ends, low, np.maximum(low, high))
        stride = half
    return best, begins


def _least(
    before: Array, points: Points, ends: Indices, low: Indices, high: Indices
) -> tuple[Array, Indices]:
    """The least error for each end, over beginnings from low to high, and the first beginning that has it."""
    # All beginnings of all ends in one array, one run after another: vectors in place of a loop over ends.
    lengths = high - low + 1
    starts = np.cumsum(lengths) - lengths
    begin = np.arange(lengths.sum()) - np.repeat(starts - low, lengths)
    error = before[begin] + points.spread(begin, np.repeat(ends, lengths))
    least = np.minimum.reduceat(error, starts)
    places = np.flatnonzero(error == np.repeat(least, lengths))
    owner = np.searchsorted(starts, places, side="right") - 1
    first = np.zeros(len(ends), dtype=np.intp)
    # Of several assignments to one end the last one stays: backwards, that is the first beginning.
    first[owner[::-1]] = begin[places[::-1]]
    return least, first


def rearranged(points: Points, bounds: Indices, width: float, zero: int | None) -> tuple[Indices, float]:
    """The best bounds within a window around the given ones, and their squared error.

    Args:
        points: what is divided.
        bounds: where each cell begins, ascending, and the end of the last: ``(centroids + 1,)``.
        width: how far a boundary may move, as a fraction of the way to its neighbours.
        zero: the cell whose centroid is 0, if one is fixed; positive and negative points stay on its sides.
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
        empty[zero] = begin[zero] > end[zero]  # the fixed zero may be alone
    errors[empty] = np.inf
    # The least error up to each place of a boundary, and the place of the boundary before that gives it.
    best, choices = errors[0, 0], []
    for error in errors[1:]:
        sums = best[:, None] + error
        choices.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    # The last end is the same in every place, so the first will do; from there back.
    place, chosen = 0, [bounds[-1]]
    for options, choice in zip(places[::-1], choices[::-1], strict=True):
        place = choice[place]
        chosen.append(options[place])
    return np.array([0, *chosen[::-1]]), float(best[0])


def _places(points: Points, bounds: Indices, width: float, zero: int | None) -> Indices:
    """Ascending candidates for the inner bounds, ``(centroids - 1, PLACES)``."""
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
