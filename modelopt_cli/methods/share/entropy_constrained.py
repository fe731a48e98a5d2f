"""Entropy-constrained scalar quantization: tables for values whose indices are entropy coded afterwards.

Chou, Lookabaugh and Gray ("Entropy-constrained vector quantization", IEEE Trans. ASSP 1989) minimise the
squared error plus lam times the bits, where an index k costs ``-log2 p_k``, by three steps in turn: every
value takes the entry that costs it least, entries move to the means of their values, and the p become
the shares of the values. On a line an entry's values still are an interval. Its cost is a parabola, and all
have one curvature, so the cheapest entries are the lower envelope of as many lines; an entry that is nowhere
on it is not used.

The curvature is the importance. Values of different importance have different envelopes, so the search
puts values of like importance into one class.
"""

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share.kmeans import bucketed
from modelopt_cli.methods.share.points import (
    CHUNK,
    Array,
    Indices,
    Points,
    checked,
    layout,
    running,
    summarise,
)

CLASSES = 16
SAMPLE = 2**24
"""Values that a search with importance looks at, at most."""
GAIN = 1e-6
"""Part of the cost below which an iteration's gain ends the search."""


def constrain(
    values: Tensor,
    table: Tensor,
    lam: float,
    *,
    importance: Tensor | None = None,
    fixed_zero: bool = False,
    iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """The table, and the bits of its entries, with a small ``squared error + lam * bits``.

    Args:
        values: floats of any shape.
        table: where to start, ascending.
        lam: squared error that a bit is worth, weighted as ``importance`` weights it.
        importance: weight of each value's squared error, of the same shape; zero everywhere means uniform.
        fixed_zero: the table's entry 0 stays, and exact zeros among the values count for it.
        iterations: at most.

    Returns:
        The entries that are still used, ascending float32, and ``-log2`` of their shares, float32.

    Raises:
        ModeloptError: a negative lam, no entry 0 to be fixed, or values or importance that do not fit.
    """
    entries = torch.unique(table.detach().cpu().double()).numpy()
    if not 0 <= lam < float("inf"):
        raise ModeloptError(f"lam must be finite and not negative, not {lam}")
    if fixed_zero and 0.0 not in entries:
        raise ModeloptError("the table has no entry 0 that could be fixed")
    source = _Source(values, len(entries), importance, fixed_zero)
    bits, least = np.full(len(entries), np.log2(len(entries))), float("inf")
    for _ in range(iterations):
        entries, bits, cost = source.iterate(entries, bits, lam)
        if cost >= least * (1 - GAIN):
            break
        least = cost
    return torch.from_numpy(entries.astype(np.float32)), torch.from_numpy(bits.astype(np.float32))


def assign_rated(
    values: Tensor, table: Tensor, bits: Tensor, lam: float, importance: Tensor | None = None
) -> Tensor:
    """The index with the least ``importance * (value - entry)^2 + lam * bits``; uint8, of the values' shape.

    Of two that cost the same it is the lower one. Time with importance grows with the entries.

    Args:
        values: floats of any shape.
        table: ascending, at most 256 entries.
        bits: of each entry.
        lam: squared error that a bit is worth.
        importance: weight of each value's squared error; zero everywhere means uniform.

    Raises:
        ModeloptError: values or importance that do not fit.
    """
    flat, weight = checked(values, importance)
    entries, rates = table.detach().cpu().double(), lam * bits.detach().cpu().double()
    if weight is None:
        used, limits = envelope(entries.numpy(), rates.numpy())
        index = torch.from_numpy(used.astype(np.uint8))
        return index[bucketed(flat, torch.from_numpy(limits)).long()].reshape(values.shape)
    chosen = torch.empty(len(flat), dtype=torch.uint8)
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        x, w, index = flat[part].double(), weight[part].double(), chosen[part]
        least = torch.full_like(x, torch.inf)
        for k in range(len(entries)):
            cost = (x - entries[k]).square_().mul_(w).add_(rates[k])
            index[cost < least] = k
            torch.minimum(least, cost, out=least)
    return chosen.reshape(values.shape)


def envelope(entries: Array, rates: Array) -> tuple[Indices, Array]:
    """Entries cheapest somewhere by ``(x - entry)^2 + rate``, and the ascending limits between them."""
    used = np.arange(len(entries))
    while True:
        c, rate = entries[used], rates[used]
        limits = (c[1:] + c[:-1]) / 2 + (rate[1:] - rate[:-1]) / (2 * (c[1:] - c[:-1]))
        # An entry between limits that have met is nowhere cheaper than both of its neighbours.
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
        self.sums = np.stack([running(p, middle) for p in sums])
        self.square = float(points.weight @ points.x**2)

    def iterate(self, entries: Array, rates: Array) -> Array:
        """Count, weight and weight * x of what each entry gets: ``(3, entries)``."""
        used, limits = envelope(entries, rates / self.importance)
        inner = np.searchsorted(self.x, limits, side="right")
        bounds = np.concatenate(([0], inner, [len(self.x)]))
        sums = np.zeros((3, len(entries)))
        sums[:, used] = np.diff(self.sums[:, bounds])
        return sums


class _Source:
    """All values: the classes, and how many values are zeros that stay, or of no importance."""

    def __init__(self, values: Tensor, entries: int, importance: Tensor | None, fixed_zero: bool) -> None:
        flat, weight = checked(values, importance)
        self.fixed_zero, self.free = fixed_zero, 0
        if weight is None:
            self.zeros = len(flat) - int(flat.count_nonzero()) if fixed_zero else 0
            rest = self.zeros < len(flat)
            self.classes = [_Class(summarise(flat, entries, skip_zeros=fixed_zero))] if rest else []
            return
        if len(flat) > SAMPLE:
            places = torch.randint(len(flat), (SAMPLE,), generator=torch.Generator().manual_seed(0))
            flat, weight = flat[places], weight[places]
        kept = flat != 0 if fixed_zero else torch.ones_like(flat, dtype=torch.bool)
        self.zeros = len(flat) - int(kept.sum())
        self.free = int((kept & (weight == 0)).sum())
        kept &= weight > 0
        self.classes = _classes(flat[kept], weight[kept], entries)

    def iterate(self, entries: Array, bits: Array, lam: float) -> tuple[Array, Array, float]:
        """Entries and bits after one round, ascending, and what the values cost with them."""
        count, weight, first = np.zeros((3, len(entries)))
        for part in self.classes:
            sums = part.iterate(entries, lam * bits)
            count, weight, first = count + sums[0], weight + sums[1], first + sums[2]
        count[np.argmin(bits)] += self.free
        zero = (entries == 0) & self.fixed_zero
        # Without any value of its own it costs what a single one would.
        count[zero] = np.maximum(count[zero] + self.zeros, 1)
        moved = np.divide(first, weight, out=entries.copy(), where=(weight > 0) & ~zero)
        distortion = sum(part.square for part in self.classes) + float(
            (moved * (moved * weight - 2 * first)).sum()
        )
        entries, owner = np.unique(moved[count > 0], return_inverse=True)
        count = np.bincount(owner, count[count > 0]).astype(np.float64)
        bits = np.log2(count.sum() / count)
        return entries, bits, distortion + lam * float(count @ bits)


def _classes(flat: Tensor, weight: Tensor, entries: int) -> list[_Class]:
    """Values divided by the logarithm of their importance, which may span many magnitudes."""
    if not len(flat):
        return []
    log = weight.double().log2()
    ordered = np.sort(log[:: len(log) // 2**16 + 1].numpy())
    edges = torch.from_numpy(layout(ordered, np.ones(len(ordered)), CLASSES))
    index = torch.bucketize(log, edges, right=True)
    parts = [index == k for k in range(CLASSES)]
    return [_Class(summarise(flat[p], entries, weight[p])) for p in parts if p.any()]
