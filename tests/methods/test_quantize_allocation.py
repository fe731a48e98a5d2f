"""Allocations against all there are, and cuts against trying every division."""

import itertools
import random

import pytest

from modelopt_cli.methods.quantize.precision.minimum_cut import cheapest_side
from modelopt_cli.methods.quantize.precision.precision_allocation import (
    Allocation,
    AllocationProblem,
    Conversions,
    Option,
    gap,
)


def problem(seed: int, layers: int, *, conversions: bool) -> AllocationProblem:
    draw = random.Random(seed)
    options = [
        [
            Option(draw.uniform(1, 10), 0.0, False),
            Option(draw.uniform(1, 6), draw.uniform(0, 0.1), True),
            Option(draw.uniform(0.5, 3), draw.uniform(0.1, 2), True),
        ]
        for _ in range(layers)
    ]
    pairs = [(a, b) for a, b in itertools.combinations(range(layers), 2) if draw.random() < 0.5]
    between = {pair: Conversions(draw.uniform(0, 3), draw.uniform(0, 3)) for pair in pairs}
    return AllocationProblem(options, between if conversions else None)


def everything(given: AllocationProblem) -> list[Allocation]:
    return [
        given.allocation(chosen) for chosen in itertools.product(*(range(len(own)) for own in given.options))
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("conversions", [False, True], ids=["apart", "with conversions"])
@pytest.mark.parametrize("price", [0.0, 0.7, 5.0, 100.0])
def test_the_best_at_a_price_is_the_best_of_all(seed: int, conversions: bool, price: float) -> None:
    given = problem(seed, 6, conversions=conversions)
    best = min(each.cost + price * each.error for each in everything(given))
    found = given.best(price)
    assert found.cost + price * found.error == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("conversions", [False, True], ids=["apart", "with conversions"])
def test_nothing_of_less_error_costs_less_and_the_gap_holds(seed: int, conversions: bool) -> None:
    given = problem(seed, 6, conversions=conversions)
    frontier, everyone = given.frontier(), everything(given)
    assert frontier == sorted(frontier, key=lambda each: each.error)
    for i, each in enumerate(frontier):
        assert each.cost <= min(other.cost for other in everyone if other.error <= each.error) + 1e-9
        refused = frontier[i + 1] if i + 1 < len(frontier) else None
        if refused is not None:
            allowed = [other.cost for other in everyone if other.error < refused.error - 1e-12]
            assert min(allowed) >= each.cost * (1 - gap(each, refused)) - 1e-9


def test_the_frontier_goes_from_no_error_to_the_least_cost() -> None:
    given = problem(0, 5, conversions=True)
    frontier, everyone = given.frontier(), everything(given)
    assert frontier[0].error == 0
    assert frontier[-1].cost == pytest.approx(min(each.cost for each in everyone))


def test_conversions_keep_a_layer_with_its_neighbours() -> None:
    layer = [Option(2.0, 0.0, False), Option(1.0, 0.0, True)]
    slow = [Option(1.0, 0.0, False), Option(1.5, 0.0, True)]
    apart = AllocationProblem([layer, slow, layer])
    assert apart.best(0).chosen == (1, 0, 1)
    costly = Conversions(0.4, 0.4)
    assert AllocationProblem([layer, slow, layer], {(0, 1): costly, (1, 2): costly}).best(0).chosen == (
        1,
        1,
        1,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_is_the_cheapest_division(seed: int) -> None:
    draw = random.Random(seed)
    costs = [(draw.uniform(-3, 3), draw.uniform(-3, 3)) for _ in range(7)]
    pairs = {
        (a, b): draw.uniform(0, 2) for a, b in itertools.permutations(range(7), 2) if draw.random() < 0.3
    }

    def cost(sides: tuple[bool, ...]) -> float:
        own = sum(pair[side] for pair, side in zip(costs, sides, strict=True))
        return own + sum(paid for (a, b), paid in pairs.items() if sides[a] and not sides[b])

    best = min(map(cost, itertools.product((False, True), repeat=7)))
    assert cost(tuple(cheapest_side(costs, pairs))) == pytest.approx(best)
