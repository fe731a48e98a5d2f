"""How much each layer gives: totals to one unit, published formulas, and brute force."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.prune.allocation import ALLOCATIONS, allocate, lamp_scores

SHAPES: dict[str, tuple[int, ...]] = {
    "first": (16, 3, 3, 3),
    "wide": (64, 16, 3, 3),
    "dw": (64, 1, 3, 3),
    "fc": (10, 64),
}


def _scores(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=g).square() / math.prod(shape[1:])
        for name, shape in SHAPES.items()
    }


CURVES = {name: [(s, (i + 1) * s**2) for s in (0.25, 0.5, 0.75, 1.0)] for i, name in enumerate(SHAPES)}


def _counts(sparsities: dict[str, float], sizes: dict[str, int]) -> dict[str, int]:
    counts = {name: sparsity * sizes[name] for name, sparsity in sparsities.items()}
    assert all(abs(count - round(count)) < 1e-6 for count in counts.values())
    return {name: round(count) for name, count in counts.items()}


SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1234, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocation_hits_the_overall_sparsity_to_one_weight(name: str, sparsity: float) -> None:
    sparsities = allocate(name, _scores(), SHAPES, sparsity, curves=CURVES)
    counts = _counts(sparsities, SIZES)
    assert abs(sum(counts.values()) - sparsity * sum(SIZES.values())) <= 0.5
    assert all(0 <= counts[layer] < SIZES[layer] for layer in SHAPES)


def test_allocation_uniform_is_the_same_everywhere() -> None:
    counts = _counts(allocate("uniform", _scores(), SHAPES, 0.7), SIZES)
    assert all(abs(counts[layer] - 0.7 * size) <= 1 for layer, size in SIZES.items())


def test_allocation_global_is_one_threshold() -> None:
    scores = _scores()
    everything = np.sort(np.concatenate([s.numpy().ravel() for s in scores.values()]))
    threshold = everything[round(0.8 * everything.size)]
    sparsities = allocate("global", scores, SHAPES, 0.8)
    for layer, score in scores.items():
        assert round(sparsities[layer] * score.numel()) == int((score.numpy() < threshold).sum())


def test_allocation_global_normalises_what_cannot_be_compared() -> None:
    scores = _scores()
    scaled = {name: score * 10**i for i, (name, score) in enumerate(scores.items())}
    plain = allocate("global", scores, SHAPES, 0.6, comparable=False)
    assert plain == allocate("global", scaled, SHAPES, 0.6, comparable=False)
    assert plain != allocate("global", scores, SHAPES, 0.6)
    by_mean = {name: score / score.double().mean() for name, score in scores.items()}
    assert plain == allocate("global", by_mean, SHAPES, 0.6)


def test_allocation_ties_are_settled_to_one_weight() -> None:
    scores = {"a": torch.ones(10, 10), "b": torch.ones(7, 9)}
    sparsities = allocate("global", scores, {"a": (10, 10), "b": (7, 9)}, 0.5)
    assert sum(_counts(sparsities, {"a": 100, "b": 63}).values()) in (81, 82)


def _erk_density(sparsity: float) -> dict[str, float]:
    """Evci et al. 2020, section 3: raise whole layers to density 1 until the rest fits below it."""
    dense: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(SIZES.values()) - sum(SIZES[n] for n in dense)
        raw = {n: sum(shape) / math.prod(shape) for n, shape in SHAPES.items() if n not in dense}
        scale = budget / sum(raw[n] * SIZES[n] for n in raw)
        over = {n for n in raw if scale * raw[n] > 1}
        if not over:
            return {n: 1.0 if n in dense else scale * raw[n] for n in SHAPES}
        dense |= over


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_allocation_erk_follows_the_formula(sparsity: float) -> None:
    density = _erk_density(sparsity)
    counts = _counts(allocate("erk", _scores(), SHAPES, sparsity), SIZES)
    for layer, size in SIZES.items():
        assert abs(size - counts[layer] - density[layer] * size) <= 1


def test_allocation_lamp_score_is_the_papers() -> None:
    """Lee et al. 2021, eq. 5, for every index by itself."""
    weights = np.random.default_rng(0).normal(size=40)
    squares = weights**2
    expected = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(lamp_scores(torch.from_numpy(squares)).numpy(), expected, rtol=1e-12)


def test_allocation_lamp_takes_the_lowest_scores_of_all_layers() -> None:
    scores = _scores()
    lamp = {}
    for layer, score in scores.items():
        squares = score.double().numpy().ravel()
        lamp[layer] = np.array([s / squares[squares >= s].sum() for s in squares])
    everything = np.sort(np.concatenate(list(lamp.values())))
    threshold = everything[round(0.9 * everything.size)]
    sparsities = allocate("lamp", scores, SHAPES, 0.9)
    for layer, values in lamp.items():
        assert abs(sparsities[layer] * values.size - (values < threshold).sum()) <= 1
    # No normalisation of scores can change it.
    assert sparsities == allocate("lamp", scores, SHAPES, 0.9, comparable=False)


def _curve_error(curve: list[tuple[float, float]], sparsity: float) -> float:
    xs, ys = zip((0.0, 0.0), *curve, strict=True)
    return float(np.interp(sparsity, xs, ys))


def test_allocation_sensitivity_beats_every_other_sharing() -> None:
    """Brute force over a grid, on convex curves: nothing has a lower total error."""
    sizes = {"a": 40, "b": 80, "c": 20}
    scores = {name: torch.rand(size, 1) for name, size in sizes.items()}
    curves = {
        "a": [(0.25, 0.1), (0.5, 0.5), (0.75, 2.0), (1.0, 6.0)],
        "b": [(0.25, 0.2), (0.5, 1.2), (0.75, 3.5), (1.0, 9.0)],
        "c": [(0.25, 0.0), (0.5, 0.05), (0.75, 0.1), (1.0, 0.5)],
    }
    shapes = {name: (size, 1) for name, size in sizes.items()}
    found = allocate("sensitivity", scores, shapes, 0.5, curves=curves, least_kept=0)
    error = sum(_curve_error(curves[name], s) for name, s in found.items())
    grid = [[k / size for k in range(size + 1)] for size in sizes.values()]
    best = min(
        sum(_curve_error(curves[name], s) for name, s in zip(sizes, choice, strict=True))
        for choice in itertools.product(*grid)
        if sum(s * size for s, size in zip(choice, sizes.values(), strict=True)) == 70
    )
    assert error == pytest.approx(best, abs=1e-9)


def test_allocation_sensitivity_looks_through_dents_of_a_curve() -> None:
    """A step that pays only later is taken for what it gives in all: the convex hull."""
    scores = {name: torch.rand(100, 1) for name in "ab"}
    curves = {"a": [(0.1, 0.5), (0.8, 0.6)], "b": [(0.1, 0.3), (0.8, 2.4)]}
    found = allocate("sensitivity", scores, dict.fromkeys("ab", (100, 1)), 0.4, curves=curves)
    assert found == {"a": pytest.approx(0.8), "b": 0.0}


def test_allocation_counts_costs_of_units() -> None:
    g = torch.Generator().manual_seed(3)
    scores = {
        "a": torch.rand(64, generator=g),
        "b": torch.rand(32, generator=g),
        "c": torch.rand(16, generator=g),
    }
    costs = {"a": 9.0, "b": 50.0, "c": 7.0}
    shapes = {name: (len(score), 8, 3, 3) for name, score in scores.items()}
    total = sum(costs[name] * len(score) for name, score in scores.items())
    for name in ("uniform", "global", "erk", "lamp"):
        found = allocate(name, scores, shapes, 0.37, costs=costs)
        removed = sum(costs[n] * round(s * len(scores[n])) for n, s in found.items())
        assert abs(removed - 0.37 * total) <= 25


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocation_goes_on_from_what_is_gone(name: str) -> None:
    scores = _scores()
    scores["wide"].view(-1)[:9000] = -math.inf
    counts = _counts(allocate(name, scores, SHAPES, 0.9, curves=CURVES), SIZES)
    assert counts["wide"] >= 9000
    assert abs(sum(counts.values()) - 0.9 * sum(SIZES.values())) <= 0.5
    with pytest.raises(UsageError, match="already removed"):
        allocate(name, scores, SHAPES, 0.5, curves=CURVES)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocation_leaves_every_layer_something(name: str) -> None:
    scores = _scores()
    scores["fc"] *= 1e-9
    counts = _counts(allocate(name, scores, SHAPES, 0.97, curves=CURVES, least_kept=5), SIZES)
    assert all(counts[layer] <= size - 5 for layer, size in SIZES.items())
    with pytest.raises(UsageError, match="cannot be reached"):
        allocate(name, scores, SHAPES, 1.0, curves=CURVES, least_kept=5)


def test_allocation_sensitivity_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match="first: the allocation needs a measured curve"):
        allocate("sensitivity", _scores(), SHAPES, 0.5)
    short: Any = {name: [(0.5, 1.0)] for name in SHAPES}
    with pytest.raises(UsageError, match="curves end before"):
        allocate("sensitivity", _scores(), SHAPES, 0.8, curves=short)
