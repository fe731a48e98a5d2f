"""Scalar k-means: the few values that stand for many with the least squared error.

Clusters on a line are intervals. On points that are sorted once (``points.py``) an iteration of Lloyd's
algorithm (1957, published 1982) needs no look at the data: the boundaries are the midpoints between
neighbouring entries, and a centroid is a difference of prefix sums, in O(k log n).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share.dynamic_programming import optimal, rearranged
from modelopt_cli.methods.share.points import CHUNK, Array, Indices, Points, checked, condense, summarise

CONDENSED = 4096
"""Points that the inits look at which cost more than one pass; what follows looks at all."""
ROUNDS = 40
"""Rearrangements, at most."""
GAIN = 1e-3
"""Part of the error below which a rearrangement's gain makes the next one look four times as closely."""
NARROWEST = 0.01
"""The window, in cells, below which Lloyd's algorithm has the last word."""


def cluster(
    values: Tensor,
    entries: int,
    *,
    init: str = "linear",
    importance: Tensor | None = None,
    fixed_zero: bool = False,
    seed: int = 0,
    iterations: int = 30,
) -> Tensor:
    """A table of at most ``entries`` values with a small squared error, sorted float32.

    Tensors with more than 16,384 values are searched as a histogram, at an expected loss below 1e-4 of the
    squared error; see ``points.py``. Where no more distinct values than entries exist, they are the table.

    Args:
        values: floats of any shape and precision.
        entries: size of the table, with the fixed zero.
        init: one of ``INITS``.
        importance: weight of each value's squared error, of the same shape; zero everywhere means uniform.
        fixed_zero: one entry is exactly 0, and exact zeros among the values are left out of the search.
        seed: of ``kmeans++``.
        iterations: of Lloyd's algorithm, at most.

    Raises:
        ModeloptError: an unknown init, a table without room, or values or importance that do not fit.
    """
    if entries < 1 + fixed_zero:
        raise ModeloptError(f"a table of {entries} entries has no room for a value")
    if init not in INITS:
        raise ModeloptError(f"no init is called {init!r}", hint=f"one of {', '.join(INITS)}")
    points = summarise(values, entries, importance, skip_zeros=fixed_zero)
    for kept in (points, points.where(points.weight > 0)):
        if len(kept.x) <= entries - fixed_zero:
            return _rounded(kept.x, fixed_zero)
    tables = []
    for name in INITS if init == "exact" else (init,):
        start = _with_zero(INITS[name](kept, entries, fixed_zero, seed), fixed_zero)
        table = search(kept, start, entries, fixed_zero=fixed_zero, iterations=iterations)
        tables.append(_rounded(table, fixed_zero))
    # Compared on the values themselves, so that no init is ever better than `exact`.
    return min(tables, key=lambda t: error(values, t, importance)) if len(tables) > 1 else tables[0]


def assign(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry, the lower of two equally near; uint8, of the values' shape.

    Args:
        values: floats of any shape.
        table: ascending, at most 256 entries.

    Raises:
        ModeloptError: a table that is larger or not ascending.
    """
    if not 1 <= len(table) <= 256 or not (table[1:] > table[:-1]).all():
        raise ModeloptError(f"a table needs 1 to 256 ascending values, and this one has {len(table)}")
    entry = table.detach().cpu().double()
    bounds = (entry[1:] + entry[:-1]) / 2
    return bucketed(values, bounds)


def error(values: Tensor, table: Tensor, importance: Tensor | None = None) -> float:
    """Sum of squared differences to the nearest entry, weighted by importance; in float64."""
    flat, weight = checked(values, importance)
    entry, total = table.detach().cpu().double(), 0.0
    for start in range(0, flat.numel(), CHUNK):
        x = flat[start : start + CHUNK]
        square = (x.double() - entry[assign(x, table).long()]).square()
        total += float(square.sum() if weight is None else square @ weight[start : start + CHUNK].double())
    return total


def bucketed(values: Tensor, bounds: Tensor) -> Tensor:
    """How many of the ascending float64 bounds each value exceeds: uint8, of the values' shape."""
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


def search(points: Points, table: Array, entries: int, *, fixed_zero: bool, iterations: int) -> Array:
    """Rearrangements from ever closer, then Lloyd's algorithm: an ascending table.

    It has fewer than ``entries`` values only where the points have no more.
    """
    # A few iterations, for entries that nothing is near; the rearrangements come faster to the rest.
    table = lloyd(points, table, entries, fixed_zero=fixed_zero, iterations=min(iterations, 4))
    zero = int(np.searchsorted(table, 0.0)) if fixed_zero else None
    least, width = np.inf, 1.0
    for _ in range(ROUNDS):
        bounds, error = rearranged(points, boundaries(points, table), width, zero)
        table = points.means(bounds)
        if zero is not None:
            table[zero] = 0.0
        if error > least * (1 - GAIN):
            width /= 4
        least = error
        if width < NARROWEST:
            break
    return lloyd(points, table, entries, fixed_zero=fixed_zero, iterations=iterations)


def lloyd(points: Points, table: Array, entries: int, *, fixed_zero: bool, iterations: int) -> Array:
    """Lloyd's algorithm, until nothing changes; an empty entry moves to where it helps most."""
    table = grown(points, table, entries, fixed_zero)
    previous = None
    for _ in range(iterations):
        bounds = boundaries(points, table)
        if previous is not None and np.array_equal(bounds, previous):
            break
        previous = bounds
        means = points.means(bounds)
        if fixed_zero:
            means[table == 0] = 0.0
        empty = np.isnan(means)
        table = grown(points, table[~empty], entries, fixed_zero) if empty.any() else means
    return table


def boundaries(points: Points, table: Array) -> Indices:
    """Where each entry's points begin, and the end of the last one's: ``(entries + 1,)``."""
    inner = np.searchsorted(points.x, (table[1:] + table[:-1]) / 2, side="right")
    return np.concatenate(([0], inner, [len(points.x)]))


def grown(points: Points, table: Array, entries: int, fixed_zero: bool) -> Array:
    """The distinct values of a table, and new ones where the error is largest, up to ``entries``.

    A new value is the mean of that half of the worst cell, as its entry divides it, which has more error.
    """
    table = np.unique(table)
    while len(table) < entries:
        bounds = boundaries(points, table)
        square = points.weight * (points.x - np.repeat(table, np.diff(bounds))) ** 2
        sums = np.concatenate((np.zeros(1), np.cumsum(square)))
        # Halves: a cell's points below its entry, and the others.
        halves = np.sort(np.concatenate((bounds, np.searchsorted(points.x, table))))
        errors = np.diff(sums[halves])
        worst = int(np.argmax(errors))
        part = slice(halves[worst], halves[worst + 1])
        if errors[worst] <= 0:
            break
        more = np.unique(np.append(table, np.average(points.x[part], weights=points.weight[part])))
        if len(more) == len(table):
            break
        table = more
    return table


def _linear(points: Points, entries: int, fixed_zero: bool, seed: int) -> Array:
    """Equally spaced over the range of the values (Han et al., "Deep Compression", 2016, section 3.2)."""
    return np.linspace(points.x[0], points.x[-1], entries - fixed_zero)


def _density(points: Points, entries: int, fixed_zero: bool, seed: int) -> Array:
    """Equal weight between entries (the same section)."""
    share = (np.arange(entries - fixed_zero) + 0.5) / (entries - fixed_zero)
    mass = np.cumsum(points.weight)
    at: Indices = np.searchsorted(mass[:-1], share * mass[-1])
    return points.x[at]


def _plus_plus(points: Points, entries: int, fixed_zero: bool, seed: int) -> Array:
    """Drawn one after the other by squared distance (Arthur and Vassilvitskii, 2007)."""
    points, generator = condense(points, CONDENSED), np.random.default_rng(seed % 2**64)
    table: list[float] = [0.0] if fixed_zero else []
    nearest = points.x**2 if fixed_zero else np.ones(len(points.x))
    while len(table) < entries:
        mass = np.cumsum(points.weight * nearest)
        table.append(float(points.x[np.searchsorted(mass[:-1], generator.random() * mass[-1], side="right")]))
        distance = (points.x - table[-1]) ** 2
        nearest = distance if len(table) == 1 else np.minimum(nearest, distance)
    return np.array(table)


def _exact(points: Points, entries: int, fixed_zero: bool, seed: int) -> Array:
    """The optimum for points condensed to a few thousand."""
    return optimal(condense(points, CONDENSED), entries, fixed_zero=fixed_zero)


INITS: dict[str, Callable[[Points, int, bool, int], Array]] = {
    "linear": _linear,
    "density": _density,
    "kmeans++": _plus_plus,
    "exact": _exact,
}
"""Where a search starts. ``exact`` is the best result of all, with the optimum of ``exact.py`` among them."""


def _with_zero(table: Array, fixed_zero: bool) -> Array:
    return np.append(table, 0.0) if fixed_zero else table


def _rounded(table: Array, fixed_zero: bool) -> Tensor:
    """Distinct float32 values, ascending."""
    return torch.from_numpy(np.unique(_with_zero(table, fixed_zero).astype(np.float32)))


def _count_exceeded(x: Array, limits: Array, index: Array) -> None:
    index[:] = 0
    exceeds = np.empty(len(x), dtype=bool)
    for limit in limits:
        np.greater(x, limit, out=exceeds)
        np.add(index, exceeds.view(np.uint8), out=index)
