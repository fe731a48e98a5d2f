"""Speedup: its interval against scipy's binomial distribution, and how often it holds the truth."""

import math
import statistics
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from modelopt_cli.measure.speedup import (
    Speedup,
    interval_rank,
    least_rounds,
    paired_speedup,
    rounds_needed,
)

Rounds = npt.NDArray[np.float64]


@pytest.mark.parametrize("count", [*range(1, 60), 100, 1000, 5000])
def test_rank_is_the_largest_that_leaves_five_percent(count: int) -> None:
    rank = interval_rank(count)
    below = stats.binom.cdf(np.array([rank - 1, rank]), count, 0.5)
    assert 2 * below[0] <= 0.05 < 2 * below[1]


def test_six_rounds_are_the_least() -> None:
    # Without an assumption on the distribution all values stay on one side with probability 2 / 2^n.
    assert least_rounds() == 6
    assert 2 / 2**6 <= 0.05 < 2 / 2**5


def test_interval_agrees_with_scipy() -> None:
    ratios = np.random.default_rng(0).lognormal(0.4, 0.3, 37)
    found = paired_speedup(list(3.0 * ratios), [3.0] * 37)
    expected = stats.quantile_test(ratios, q=statistics.median(ratios), p=0.5).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.ratio == pytest.approx(float(np.median(ratios)))


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Rounds:
    return rng.normal(1, 0.02, shape)


def heavy_tail(rng: np.random.Generator, shape: tuple[int, ...]) -> Rounds:
    """Times as they are on a busy machine: a floor, and now and then many times as long."""
    return 1 + rng.pareto(1.2, shape)


@pytest.mark.parametrize("noise", [normal, heavy_tail])
@pytest.mark.parametrize("rounds", [12, 30])
def test_interval_holds_the_truth_as_often_as_it_says(
    noise: Callable[[np.random.Generator, tuple[int, ...]], Rounds], rounds: int
) -> None:
    rng, draws = np.random.default_rng(1), 2000
    drift = 1 + rng.random((draws, rounds)).cumsum(1)  # slows both models of a round alike
    base, other = 1.5 * noise(rng, (draws, rounds)) * drift, noise(rng, (draws, rounds)) * drift
    # Both noises are alike, so the median of the ratio of the two is 1 and the true speedup 1.5.
    found = [paired_speedup(list(first), list(second)) for first, second in zip(base, other, strict=True)]
    held = sum(each.low <= 1.5 <= each.high for each in found) / draws
    exact = 1 - 2 * stats.binom.cdf(interval_rank(rounds) - 1, rounds, 0.5)
    assert exact >= 0.95
    assert held == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / draws))


def test_no_difference_is_found_only_now_and_then() -> None:
    rng = np.random.default_rng(2)
    base, other = heavy_tail(rng, (2000, 30)), heavy_tail(rng, (2000, 30))
    found = [paired_speedup(list(first), list(second)) for first, second in zip(base, other, strict=True)]
    assert sum(each.distinguishable for each in found) / 2000 < 0.06


def test_pairs_leave_out_what_slows_a_round() -> None:
    slow = [1.0, 9.0, 1.0, 50.0, 1.0, 3.0, 1.0, 700.0]
    found = paired_speedup([2 * time for time in slow], slow)
    assert found == Speedup(2.0, 2.0, 2.0, 8)
    assert found.distinguishable


def test_too_few_rounds_tell_nothing() -> None:
    found = paired_speedup([2.0] * 5, [1.0] * 5)
    assert found == Speedup(2.0, 0.0, math.inf, 5)
    assert not found.distinguishable


def test_rounds_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_speedup([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="median"):
        paired_speedup([], [])


def test_rounds_needed_narrow_the_interval_to_the_limit() -> None:
    """Simulated: with so many rounds the lower end is about at the limit."""
    rng = np.random.default_rng(3)
    first = Speedup(1.5, *_mean_ends(rng, 30), 30)
    needed = rounds_needed(first, 1.4)
    assert needed is not None
    assert needed > 30
    assert _mean_ends(rng, needed)[0] == pytest.approx(1.4, abs=0.02)
    assert rounds_needed(first, 1.5) is None
    assert rounds_needed(first, first.low) is None


def _mean_ends(rng: np.random.Generator, rounds: int) -> tuple[float, float]:
    """Ends of the interval in the mean over 200 simulated measurements of a model 1.5 times faster."""
    ratios = 1.5 * rng.lognormal(0, 0.5, (200, rounds))
    found = [paired_speedup(list(each), [1.0] * rounds) for each in ratios]
    return float(np.mean([each.low for each in found])), float(np.mean([each.high for each in found]))
