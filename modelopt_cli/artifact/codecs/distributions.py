"""Distributions of the symbols of each context, learned from those that came before.

Reader and writer learn alike, so that no distribution is stored. A context without experience takes its
distribution half from what its expectation means and from all contexts together. Everything is computed with
integers.
"""

from math import isqrt

import numpy as np

from modelopt_cli.artifact.codecs.contexts import EXPECTED, LIMITS, Integers, sizes_of
from modelopt_cli.artifact.codecs.rans import SCALE_BITS

ZERO_PRIOR = 4
"""Symbols that a context is taken to have seen already when it tells how many are zero."""
ONE = 1 << 20
"""Unit of probabilities and counts before they are cut to slots."""
GROWTH = 16
"""Distributions are learned again when the symbols have grown by one in so many."""


class Distributions:
    """Slots for every symbol of every context; a place is an index of them all, one context after the other.

    Attributes:
        alphabet: number of symbols of a context: ``-reach`` to ``reach``, in this order.
        symbols: those of all places.
        sizes: of the same, in units of ``1 / SIZE``.
        frequencies: how many slots they have, ``2**SCALE_BITS`` in each context.
        ends: the slots behind theirs, those of all contexts counted through.
        starts: the first of their slots, counted alike.
        wait: after how many more symbols the distributions will be learned again.
    """

    frequencies: Integers
    ends: Integers
    starts: Integers
    wait: int

    def __init__(self, reach: int, mirror: int) -> None:
        self.alphabet = 2 * reach + 1
        self.symbols = np.tile(np.arange(-reach, reach + 1), len(LIMITS) + 1)
        self.sizes = sizes_of(self.symbols, mirror)
        shapes = _shapes(reach)
        self._zero_shapes = shapes[:, reach].copy()
        shapes[:, reach] = 0
        self._shapes = _shares(shapes)
        self._counts = np.zeros_like(shapes)
        self._fresh: list[Integers] = []
        self._learn()

    def see(self, places: Integers) -> None:
        """Take note of symbols by their places, at most one step beyond ``wait``."""
        self._fresh.append(places)
        self.wait -= places.size
        if self.wait <= 0:
            self._learn()

    def _learn(self) -> None:
        """Make the distributions from all symbols so far."""
        counts, zero = self._counts, self.alphabet // 2
        fresh = np.concatenate([np.zeros(0, np.int64), *self._fresh])
        counts += np.bincount(fresh, minlength=counts.size).reshape(counts.shape)
        self._fresh = []
        totals = counts.sum(0)
        seen = int(totals.sum())
        self.wait = max(seen // GROWTH, 1)
        room = (1 << SCALE_BITS) - self.alphabet
        # Zeros first: in a pruned matrix their number says nothing of that of the next larger symbols.
        common = ((2 * int(totals[zero]) + 1) * ONE // 2) // (seen + 1)
        prior = (self._zero_shapes + 3 * common) >> 2
        zeros = room * (counts[:, zero] * ONE + ZERO_PRIOR * prior) // ((counts.sum(1) + ZERO_PRIOR) * ONE)
        # As many symbols as the alphabet has are taken to have been seen already.
        mass = counts * ONE + self.alphabet * ((self._shapes + 3 * _common(totals)) >> 2)
        mass[:, zero] = 0
        frequencies = 1 + mass * (room - zeros)[:, None] // np.maximum(mass.sum(1, keepdims=True), 1)
        frequencies[:, zero] += zeros
        contexts = np.arange(len(frequencies))
        frequencies[contexts, frequencies.argmax(1)] += (1 << SCALE_BITS) - frequencies.sum(1)
        self.frequencies = frequencies.reshape(-1)
        self.ends = np.cumsum(self.frequencies)
        self.starts = self.ends - self.frequencies


def _shapes(reach: int) -> Integers:
    """Prior distributions of the symbols of each context, ``(contexts, alphabet)``.

    A geometric distribution on both sides of zero, whose mean size is in the midst of the context.
    """
    shapes = []
    for low in (LIMITS[0] * 2 // 3, *LIMITS):
        mean = low * 5 // 4
        ratio = (isqrt((EXPECTED**2 + mean**2) << 32) - (EXPECTED << 16)) // mean
        side = [1 << 30]
        for _ in range(reach):
            side.append(side[-1] * ratio >> 16)
        shapes.append(side[:0:-1] + side)
    return _shares(np.array(shapes, np.int64))


def _common(totals: Integers) -> Integers:
    """Probability of each symbol among those that are not zero, in all contexts together.

    Neighbouring symbols are about equally frequent, the more of them there are.
    """
    zero, reach = len(totals) // 2, len(totals) // 32
    totals[zero] = 0
    sums = np.zeros(len(totals) + 2 * reach + 1, np.int64)
    np.cumsum(totals, out=sums[reach + 1 : len(sums) - reach])
    sums[len(sums) - reach :] = sums[-reach - 1]
    near = sums[2 * reach + 1 :] - sums[: len(totals)]
    smooth = 2 * near + 4 * totals * (reach > 0) + 1
    smooth[zero] = 0
    return _shares(smooth)


def _shares(masses: Integers) -> Integers:
    """Masses along the last dimension as probabilities, in units of ``1 / ONE``."""
    shares: Integers = masses * ONE // np.maximum(masses.sum(-1, keepdims=True), 1)
    return shares
