"""Allocation of a precision to each layer: the least cost, in bytes or time, for an error of the outputs.

The errors that layers make alone add up, as small ones do that know nothing of each other. One price, that of
the error in the unit of the cost, decides everything: at each price the allocation of the least cost plus
price times error is found exactly, and no allocation of that error or less costs less than it (Everett,
"Generalized Lagrange multiplier method for solving problems of optimum allocation of resources", 1963).
Between two neighbouring prices an allocation may lie that no price finds; ``gap`` says how much that could
gain.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from modelopt_cli.methods.quantize.precision.minimum_cut import cheapest_side

PRICES = 48
"""Prices that are tried besides those at which a layer would change by itself."""


@dataclass(frozen=True)
class Option:
    """A precision that a layer can have.

    Attributes:
        cost: bytes or milliseconds.
        error: of the outputs, with this layer alone in the precision.
        integer: its input and output are integers, so that next to a float layer they are converted.
    """

    cost: float
    error: float
    integer: bool


@dataclass(frozen=True)
class Conversions:
    """Costs of conversions between two layers, the first of which makes what the second reads.

    Attributes:
        to_float: where the first has integers and the second floats.
        to_integer: where it is the other way round.
    """

    to_float: float
    to_integer: float


@dataclass(frozen=True)
class Allocation:
    """A precision for each layer.

    Attributes:
        chosen: number of the option of each layer.
        cost: of all, conversions included.
        error: of all.
    """

    chosen: tuple[int, ...]
    cost: float
    error: float


class AllocationProblem:
    """Layers with their options, and the conversions between them.

    Args:
        options: of each layer; one at least has floats or all have the same form.
        between: conversions, by the numbers of two layers.
    """

    def __init__(
        self,
        options: Sequence[Sequence[Option]],
        between: Mapping[tuple[int, int], Conversions] | None = None,
    ) -> None:
        self.options = options
        self.between = dict(between or {})

    def best(self, price: float) -> Allocation:
        """The allocation of the least cost plus ``price`` times error, exactly."""
        forms = [self._best_of_forms(own, price) for own in self.options]
        worst = sum(
            abs(self._total(own[i], price))
            for own, of in zip(self.options, forms, strict=True)
            for i in of.values()
        )
        worst += sum(each.to_float + each.to_integer for each in self.between.values()) + 1.0
        costs = [
            tuple(self._total(own[of[form]], price) if form in of else worst for form in (False, True))
            for own, of in zip(self.options, forms, strict=True)
        ]
        pairs: dict[tuple[int, int], float] = {}
        for (maker, reader), conversion in self.between.items():
            pairs[maker, reader] = pairs.get((maker, reader), 0.0) + conversion.to_float
            pairs[reader, maker] = pairs.get((reader, maker), 0.0) + conversion.to_integer
        integer = cheapest_side([(a, b) for a, b in costs], pairs)
        return self.allocation([of[form] for of, form in zip(forms, integer, strict=True)])

    def allocation(self, chosen: Sequence[int]) -> Allocation:
        """The allocation of these options, with its cost and error."""
        picked = [own[i] for own, i in zip(self.options, chosen, strict=True)]
        cost = sum(each.cost for each in picked)
        for (maker, reader), conversion in self.between.items():
            if picked[maker].integer and not picked[reader].integer:
                cost += conversion.to_float
            if picked[reader].integer and not picked[maker].integer:
                cost += conversion.to_integer
        return Allocation(tuple(chosen), cost, sum(each.error for each in picked))

    def frontier(self) -> list[Allocation]:
        """All allocations that a price finds, by rising error and falling cost."""
        found = {each.chosen: each for each in map(self.best, self._prices())}
        return sorted(found.values(), key=lambda each: (each.error, -each.cost))

    def _best_of_forms(self, own: Sequence[Option], price: float) -> dict[bool, int]:
        """The best option with floats and the best with integers, where there is one."""
        best: dict[bool, int] = {}
        for i, option in enumerate(own):
            kept = best.get(option.integer)
            if kept is None or self._total(option, price) < self._total(own[kept], price):
                best[option.integer] = i
        return best

    def _total(self, option: Option, price: float) -> float:
        return option.cost + price * option.error

    def _prices(self) -> list[float]:
        """Prices between all at which a layer's best option changes, and some more for what layers share."""
        changes = sorted(
            set(
                _positive(
                    (a.cost - b.cost) / (b.error - a.error)
                    for own in self.options
                    for a in own
                    for b in own
                    if a.error < b.error
                )
            )
        )
        if not changes:
            return [0.0, 1.0]
        between = [math.sqrt(a * b) for a, b in pairwise(changes)]
        low, high = changes[0] / 1e3, changes[-1] * 1e3
        grid = [low * (high / low) ** (i / (PRICES - 1)) for i in range(PRICES)] if self.between else []
        return [0.0, low, *between, *grid, high]


def _positive(numbers: Iterable[float]) -> list[float]:
    return [number for number in numbers if 0 < number < math.inf]


def gap(chosen: Allocation, refused: Allocation | None) -> float:
    """Fraction of its cost that an allocation could save at most, by the model, at an error still allowed.

    Args:
        chosen: the cheapest of the frontier that is allowed.
        refused: the next of the frontier, whose error is too large; None where there is none.
    """
    return 0.0 if refused is None or not chosen.cost else max(0.0, 1 - refused.cost / chosen.cost)
