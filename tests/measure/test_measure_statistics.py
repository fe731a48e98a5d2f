"""Paired difference: published examples, brute force, and an independent bootstrap."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from modelopt_cli.measure.statistics import (
    Z_95,
    _constrained_gained,
    mcnemar_exact,
    paired_difference,
    paired_difference_from_counts,
    samples_needed,
    tango_interval,
)

# Printed by other people's programs: (only first, only second, pairs), normal quantile, interval.
PUBLISHED = [
    # Cavo et al. 2012, in Fagerland, Lydersen and Laake, "Statistical Analysis of Contingency Tables"
    # (2017), chapter 8; the authors' R package `contingencytables`.
    pytest.param((6, 16, 161), Z_95, (-0.1240, -0.0054), id="complete-response"),
    # R package PropCIs, scoreci.mp(25, 28, 618, conf.level = 0.90), whose difference is (c - b) / n.
    pytest.param((28, 25, 618), 1.6448536269514722, (-0.0148, 0.0247), id="ninety-percent"),
]


@pytest.mark.parametrize(("table", "z", "expected"), PUBLISHED)
def test_interval_agrees_with_published_examples(
    table: tuple[int, int, int], z: float, expected: tuple[float, float]
) -> None:
    assert tango_interval(*table, z=z) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("n", [1, 20, 1000, 50000])
def test_no_disagreement_still_leaves_doubt(n: int) -> None:
    low, high = tango_interval(0, 0, n)
    assert high == pytest.approx(Z_95**2 / (n + Z_95**2), rel=1e-9)
    assert low == -high


def test_extreme_tables_stay_within_one() -> None:
    assert tango_interval(20, 0, 20)[1] == 1.0
    assert tango_interval(0, 20, 20)[0] == -1.0
    assert tango_interval(20, 0, 20)[0] < 1.0


counts = st.integers(1, 300).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


@given(counts)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_interval_holds_the_estimate_and_mirrors(table: tuple[int, int, int]) -> None:
    lost, gained, n = table
    low, high = tango_interval(lost, gained, n)
    assert -1 <= low <= (lost - gained) / n <= high <= 1
    assert low < high
    assert tango_interval(gained, lost, n) == (-high, -low)


@given(counts, st.floats(-0.95, 0.95))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_constrained_estimate_maximises_the_likelihood(
    table: tuple[int, int, int], difference: float
) -> None:
    lost, gained, n = table

    def loss(q: float) -> float:
        cells = np.array([q + difference, q, 1 - 2 * q - difference])
        seen = np.array([lost, gained, n - lost - gained])
        return -float(np.sum(seen * np.log(np.maximum(cells, 1e-300))))

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    best = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    ours = _constrained_gained(lost, gained, n, difference)
    assert bounds[0] - 1e-9 <= ours <= bounds[1] + 1e-9
    assert loss(min(max(ours, bounds[0]), bounds[1])) <= best.fun + 1e-6 * max(1.0, abs(best.fun))


@given(st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_mcnemar_is_the_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_exact(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_survives_an_imagenet_sized_table() -> None:
    assert mcnemar_exact(12_000, 12_300) == pytest.approx(stats.binomtest(12_000, 24_300).pvalue, rel=1e-7)


def test_bootstrap_agrees_where_it_works() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(2000) < 0.7
    other = np.where(rng.random(2000) < 0.06, ~base, base)
    ours = paired_difference(base, other)
    boot = stats.bootstrap(
        (base, other),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((100 * boot.low, 100 * boot.high), abs=0.2)


def test_interval_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    """Exact coverage, summed over every table of 30 pairs."""
    n, lost_p, gained_p = 30, 0.08, 0.03
    covered = 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            low, high = tango_interval(lost, gained, n)
            if low <= lost_p - gained_p <= high:
                cells = [lost, gained, n - lost - gained]
                covered += stats.multinomial.pmf(cells, n, [lost_p, gained_p, 1 - lost_p - gained_p])
    assert 0.94 <= covered <= 0.985


def test_sign_and_counts() -> None:
    base = np.array([True, True, True, False, False])
    other = np.array([True, False, False, True, False])
    found = paired_difference(base, other)
    assert (found.lost, found.gained, found.samples) == (2, 1, 5)
    assert found.drop_pp == pytest.approx(20.0)
    assert found == paired_difference_from_counts(2, 1, 5)


@pytest.mark.parametrize(
    ("base", "other"),
    [
        pytest.param([True], [True, False], id="other-length"),
        pytest.param([], [], id="empty"),
        pytest.param([[True]], [[True]], id="not-a-list"),
    ],
)
def test_unpaired_answers_are_refused(base: list[bool], other: list[bool]) -> None:
    with pytest.raises(ValueError, match="same, non-empty"):
        paired_difference(np.array(base, dtype=bool), np.array(other, dtype=bool))


@pytest.mark.parametrize("table", [(1, 1, 1), (-1, 0, 5), (0, 0, 0)], ids=str)
def test_impossible_tables_are_refused(table: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="set of pairs"):
        tango_interval(*table)


@pytest.mark.parametrize("margin", [0.1, 1.0, 10.0])
def test_samples_needed_without_a_disagreement(margin: float) -> None:
    # The upper limit is then z^2 / (n + z^2).
    expected = stats.norm.ppf(0.975) ** 2 * (100 / margin - 1)
    found = samples_needed(paired_difference_from_counts(0, 0, 20), margin)
    assert found == math.ceil(expected)


@pytest.mark.parametrize(("lost", "gained"), [(60, 40), (500, 500), (900, 100)])
def test_samples_needed_approach_the_normal_distribution(lost: int, gained: int) -> None:
    share, drop = (lost + gained) / 10_000, (lost - gained) / 10_000
    expected = stats.norm.ppf(0.975) ** 2 * (share - drop**2) / 0.0005**2
    found = samples_needed(paired_difference_from_counts(lost, gained, 10_000), 0.05)
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("margin", [1e-9, 1e-30, 5e-324])
def test_samples_needed_end_somewhere(margin: float) -> None:
    assert 10**9 < samples_needed(paired_difference_from_counts(1, 0, 20), margin) < 10**19


def test_samples_needed_are_the_fewest() -> None:
    measured = paired_difference_from_counts(3, 1, 100)
    needed = samples_needed(measured, 1.5)
    for samples, enough in ((100 * (needed // 100), False), (100 * (needed // 100 + 1), True)):
        scaled = paired_difference_from_counts(3 * samples // 100, samples // 100, samples)
        assert (scaled.high - scaled.drop_pp <= 1.5) is enough
