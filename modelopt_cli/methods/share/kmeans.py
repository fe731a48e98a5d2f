"""Scalar k-means: the few values that stand for many with the least squared error.

Clusters on a line are intervals. On points that are sorted once (``points.py``) an iteration of Lloyd's
algorithm (1957, published 1982) needs no look at the data: the boundaries are the midpoints between
neighbouring centroids, and a centroid is a difference of prefix sums, in O(k log n).
"""

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share.binning import points_of
from modelopt_cli.methods.share.choices import INITS
from modelopt_cli.methods.share.dynamic_programming import optimal, rearranged
from modelopt_cli.methods.share.points import CHUNK, Array, Indices, Points, condense, flat_values

CONDENSED = 4096
"""Points that those starts look at which cost more than one pass; the search that follows looks at all."""
ROUNDS = 40
"""Largest number of rearrangements."""
GAIN = 1e-3
"""Fraction of the error below which a rearrangement's gain makes the next one look four times as closely."""
NARROWEST = 0.01
"""The window, in cells, below which Lloyd's algorithm has the last word."""


def cluster(
    values: Tensor,
    size: int,
    *,
    init: str = "linear",
    importance: Tensor | None = None,
    fixed_zero: bool = False,
    seed: int = 0,
    iterations: int = 30,
) -> Tensor:
    """A codebook of at most ``size`` centroids with a small squared error, ascending float32.

    Tensors with more than 16,384 values are searched as a histogram, at an expected loss below 1e-4 of the
    squared error; see ``binning.py``. Where there are no more than ``size`` distinct values, they are it.

    Args:
        values: floats of any shape and precision.
        size: of the codebook, with the fixed zero.
        init: a key of ``INITS``.
        importance: weight of each value's squared error, of the same shape; zero everywhere means uniform.
        fixed_zero: one centroid is exactly 0, and exact zeros among the values are left out of the search.
        seed: for starts that are drawn.
        iterations: of Lloyd's algorithm, at most.

    Raises:
        ModeloptError: an unknown init, a codebook without room, or values or importance that do not fit.
    """
    if size < 1 + fixed_zero:
        raise ModeloptError(f"a codebook of {size} centroids has no room for a value")
    if init not in INITS:
        raise ModeloptError(f"no init is called {init!r}", hint=f"one of {', '.join(INITS)}")
    points = points_of(values, size, importance, skip_zeros=fixed_zero)
    # Points without importance are no reason to search; they keep their value where there is room.
    for kept in (points, points.where(points.weight > 0)):
        if len(kept.x) <= size - fixed_zero:
            return _codebook(kept.x, fixed_zero)
    codebooks = []
    for row in INITS.values() if INITS[init].best_of_all else (INITS[init],):
        start = _with_zero(row.start(kept, size, fixed_zero, seed), fixed_zero)
        centroids = search(kept, start, size, fixed_zero=fixed_zero, iterations=iterations)
        codebooks.append(_codebook(centroids, fixed_zero))
    if len(codebooks) == 1:
        return codebooks[0]
    # Compared on the values themselves, so that no start is ever better than the best of all.
    return min(codebooks, key=lambda codebook: error(values, codebook, importance))


def assign(values: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest centroid, the lower of two equally near; uint8, of the values' shape.

    Args:
        values: floats of any shape.
        codebook: ascending, at most 256 centroids.

    Raises:
        ModeloptError: a codebook that is larger or not ascending.
    """
    if not 1 <= len(codebook) <= 256 or not (codebook[1:] > codebook[:-1]).all():
        raise ModeloptError(
            f"a codebook needs 1 to 256 ascending centroids, and this one has {len(codebook)}"
        )
    centroids = codebook.detach().cpu().double()
    return bucketed(values, (centroids[1:] + centroids[:-1]) / 2)


def error(values: Tensor, codebook: Tensor, importance: Tensor | None = None) -> float:
    """Sum of squared differences to the nearest centroid, weighted by importance; in float64."""
    flat, weight = flat_values(values, importance)
    centroids, total = codebook.detach().cpu().double(), 0.0
    for start in range(0, flat.numel(), CHUNK):
        x = flat[start : start + CHUNK]
        square = (x.double() - centroids[assign(x, codebook).long()]).square()
        total += float(square.sum() if weight is None else square @ weight[start : start + CHUNK].double())
    return total


def bucketed(values: Tensor, bounds: Tensor) -> Tensor:
    """Count of the ascending float64 bounds that each value exceeds: uint8, of the values' shape."""
    flat, index = values.detach().reshape(-1).cpu(), torch.empty(values.numel(), dtype=torch.uint8)
    if flat.dtype != torch.float64:
        # A float32 exceeds a bound if it exceeds the next float32 below it.
        near = bounds.float()
        bounds = torch.where(near.double() > bounds, near.nextafter(torch.tensor(-torch.inf)), near)
    limits = bounds.numpy()
    for start in range(0, flat.numel(), CHUNK):
        x = flat[start : start + CHUNK].to(bounds.dtype).numpy()
        part = index[start : start + CHUNK].numpy()
        if len(limits) < 128:
            # Comparing with every bound is a vector instruction each; searching branches at random.
            _count_exceeded(x, limits, part)
        else:
            part[:] = np.searchsorted(limits, x)
    return index.reshape(values.shape)


def search(points: Points, start: Array, size: int, *, fixed_zero: bool, iterations: int) -> Array:
    """Rearrangements in ever narrower windows, then Lloyd's algorithm: ascending centroids.

    There are fewer than ``size`` only where the points have no more distinct values.
    """
    # A few iterations, for centroids that nothing is near; the rearrangements come faster to the rest.
    centroids = lloyd(points, start, size, fixed_zero=fixed_zero, iterations=min(iterations, 4))
    zero = int(np.searchsorted(centroids, 0.0)) if fixed_zero else None
    least, width = np.inf, 1.0
    for _ in range(ROUNDS):
        bounds, squared_error = rearranged(points, boundaries(points, centroids), width, zero)
        centroids = points.means(bounds)
        if zero is not None:
            centroids[zero] = 0.0
        if squared_error > least * (1 - GAIN):
            width /= 4
        least = squared_error
        if width < NARROWEST:
            break
    return lloyd(points, centroids, size, fixed_zero=fixed_zero, iterations=iterations)


def lloyd(points: Points, centroids: Array, size: int, *, fixed_zero: bool, iterations: int) -> Array:
    """Lloyd's algorithm, until nothing changes; an empty centroid moves to where it helps most."""
    centroids = grown(points, centroids, size)
    previous = None
    for _ in range(iterations):
        bounds = boundaries(points, centroids)
        if previous is not None and np.array_equal(bounds, previous):
            break
        previous = bounds
        means = points.means(bounds)
        if fixed_zero:
            means[centroids == 0] = 0.0
        empty = np.isnan(means)
        centroids = grown(points, centroids[~empty], size) if empty.any() else means
    return centroids


def boundaries(points: Points, centroids: Array) -> Indices:
    """The first point of each centroid's cell, and the end of the last cell: ``(centroids + 1,)``."""
    inner = np.searchsorted(points.x, (centroids[1:] + centroids[:-1]) / 2, side="right")
    return np.concatenate(([0], inner, [len(points.x)]))


def grown(points: Points, centroids: Array, size: int) -> Array:
    """The distinct centroids, and new ones where the error is largest, up to ``size``.

    A new centroid is the mean of that half of the worst cell, as its centroid divides it, which has more
    error.
    """
    centroids = np.unique(centroids)
    while len(centroids) < size:
        bounds = boundaries(points, centroids)
        square = points.weight * (points.x - np.repeat(centroids, np.diff(bounds))) ** 2
        sums = np.concatenate((np.zeros(1), np.cumsum(square)))
        # Halves: a cell's points below its centroid, and the others.
        halves = np.sort(np.concatenate((bounds, np.searchsorted(points.x, centroids))))
        errors = np.diff(sums[halves])
        worst = int(np.argmax(errors))
        part = slice(halves[worst], halves[worst + 1])
        if errors[worst] <= 0:
            break
        more = np.unique(np.append(centroids, np.average(points.x[part], weights=points.weight[part])))
        if len(more) == len(centroids):
            break
        centroids = more
    return centroids


def linear_start(points: Points, size: int, fixed_zero: bool, seed: int) -> Array:
    """Equally spaced over the range of the values (Han et al., "Deep Compression", 2016, section 3.2)."""
    return np.linspace(points.x[0], points.x[-1], size - fixed_zero)


def density_start(points: Points, size: int, fixed_zero: bool, seed: int) -> Array:
    """Equal weight between centroids (the same section)."""
    quantiles = (np.arange(size - fixed_zero) + 0.5) / (size - fixed_zero)
    mass = np.cumsum(points.weight)
    places: Indices = np.searchsorted(mass[:-1], quantiles * mass[-1])
    return points.x[places]


def plus_plus_start(points: Points, size: int, fixed_zero: bool, seed: int) -> Array:
    """Drawn one after the other by squared distance (Arthur and Vassilvitskii, 2007)."""
    points, generator = condense(points, CONDENSED), np.random.default_rng(seed % 2**64)
    centroids: list[float] = [0.0] if fixed_zero else []
    nearest = points.x**2 if fixed_zero else np.ones(len(points.x))
    while len(centroids) < size:
        mass = np.cumsum(points.weight * nearest)
        place = np.searchsorted(mass[:-1], generator.random() * mass[-1], side="right")
        centroids.append(float(points.x[place]))
        distance = (points.x - centroids[-1]) ** 2
        nearest = distance if len(centroids) == 1 else np.minimum(nearest, distance)
    return np.array(centroids)


def exact_start(points: Points, size: int, fixed_zero: bool, seed: int) -> Array:
    """The optimum for points condensed to a few thousand."""
    return optimal(condense(points, CONDENSED), size, fixed_zero=fixed_zero)


def _with_zero(centroids: Array, fixed_zero: bool) -> Array:
    return np.append(centroids, 0.0) if fixed_zero else centroids


def _codebook(centroids: Array, fixed_zero: bool) -> Tensor:
    """Distinct float32 values, ascending."""
    return torch.from_numpy(np.unique(_with_zero(centroids, fixed_zero).astype(np.float32)))


def _count_exceeded(x: Array, limits: Array, index: Array) -> None:
    index[:] = 0
    exceeds = np.empty(len(x), dtype=bool)
    for limit in limits:
        np.greater(x, limit, out=exceeds)
        np.add(index, exceeds.view(np.uint8), out=index)
