"""Removal order of coupled channels: one group and a few of its units at a time.

An allocation says for every fraction removed overall what fraction each group loses. Followed from 0 to 1
and rounded to the numbers of channels that may be kept, it becomes one path along which a search can go.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

GRID = 256
"""Number of overall ratios at which the allocation is asked."""

Allocate = Callable[[float], Mapping[str, float]]
"""From the fraction removed overall to that of every group."""


@dataclass(frozen=True)
class GroupUnits:
    """Units of a group of channels, and the numbers of them that may be kept.

    Attributes:
        units: their number.
        width: channels in a unit; more than one for an attention head.
        step: the network itself works only with multiples of so many units.
        scores: of the units, larger is more important.
    """

    units: int
    width: int
    step: int
    scores: Tensor

    def granule(self, round_to: int) -> int:
        """The fewest units by which the number of channels stays a multiple of ``round_to``."""
        return math.lcm(self.step, round_to // math.gcd(round_to, self.width))

    def counts(self, round_to: int) -> tuple[int, ...]:
        """All numbers that may be kept, falling: all units, then multiples down to one granule."""
        granule = self.granule(round_to)
        first = (self.units - 1) // granule * granule
        return (self.units, *range(first, 0, -granule))

    def best(self, count: int) -> tuple[int, ...]:
        """The ``count`` most important units in their order; of equals those that come first."""
        order = self.scores.argsort(descending=True, stable=True)[:count]
        return tuple(sorted(order.tolist()))


@dataclass(frozen=True)
class RemovalStep:
    """One step of the path: ``group`` now keeps ``kept`` units instead of ``before``."""

    group: str
    before: int
    kept: int


def removal_path(groups: Mapping[str, GroupUnits], allocate: Allocate, round_to: int) -> list[RemovalStep]:
    """All steps from everything kept to the fewest units in every group, in the allocation's order.

    Steps that the allocation wants at the same ratio go by the mean score of the units they remove.

    Args:
        groups: by name.
        allocate: the allocation.
        round_to: numbers of channels are multiples of this, where the group's own number is not kept.
    """
    kept_units = _follow(groups, allocate)
    steps: list[tuple[int, float, int, RemovalStep]] = []
    for place, (name, group) in enumerate(groups.items()):
        ascending = group.scores.double().sort().values
        ratio, score = 0, -math.inf
        for before, kept in itertools.pairwise(group.counts(round_to)):
            # A step is due where the allocation has come halfway from one allowed number to the next.
            ratio = max(ratio, _first_below(kept_units[name], (before + kept) / 2))
            # Never below its predecessor's, so that a group's own steps keep their order.
            score = max(score, float(ascending[group.units - before : group.units - kept].mean()))
            steps.append((ratio, score, place, RemovalStep(name, before, kept)))
    steps.sort(key=lambda step: (step[:3], -step[3].kept))
    return [step for *_, step in steps]


def _follow(groups: Mapping[str, GroupUnits], allocate: Allocate) -> dict[str, list[float]]:
    """Units of every group that the allocation keeps at every ratio of the grid, never rising."""
    kept: dict[str, list[float]] = {name: [] for name in groups}
    for i in range(1, GRID):
        fractions = allocate(i / GRID)
        for name, numbers in kept.items():
            units = groups[name].units * (1 - fractions[name])
            numbers.append(min(units, numbers[-1]) if numbers else units)
    return kept


def _first_below(falling: list[float], threshold: float) -> int:
    """The first place where ``falling`` is at most ``threshold``."""
    return bisect_left(falling, -threshold, key=lambda value: -value)


def counts_after(groups: Mapping[str, GroupUnits], steps: Iterable[RemovalStep]) -> dict[str, int]:
    """The number of units that every group keeps after these steps."""
    counts = {name: group.units for name, group in groups.items()}
    for step in steps:
        counts[step.group] = step.kept
    return counts


def finer_roundings(round_to: int) -> list[int]:
    """Multiples to try when those of ``round_to`` are too coarse, falling, down to 1."""
    return [multiple for multiple in (4, 2, 1) if multiple < round_to]
