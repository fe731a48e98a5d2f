"""The bootstrapped interval: draws, quantiles, and how often it holds the true difference, by simulation."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from modelopt_cli.measure.bootstrap import (
    RESAMPLES,
    Spread,
    bootstrap,
    draws,
    expanded_tail,
    once,
    t_quantile,
)
from modelopt_cli.measure.differences import difference
from modelopt_cli.measure.metrics import METRICS
from modelopt_cli.measure.tally import measured
from modelopt_cli.tasks.draws import mean


def test_draws_are_samples_with_replacement_and_always_the_same() -> None:
    counts = np.concatenate(list(draws(40)))
    assert counts.shape == (RESAMPLES, 40)
    assert (counts.sum(1) == 40).all()
    assert counts.mean(0) == pytest.approx(np.ones(40), abs=0.15)
    assert counts.var() == pytest.approx(1 - 1 / 40, abs=0.02)
    assert np.array_equal(counts, np.concatenate(list(draws(40))))


def test_memory_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draws(30, 50)))
    monkeypatch.setattr("modelopt_cli.measure.bootstrap.AT_ONCE", 100)
    parts = list(draws(30, 50))
    assert max(part.size for part in parts) <= 100
    assert np.concatenate(parts).shape == whole.shape


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 7, 12, 30, 1000])
def test_quantiles_of_students_t(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-4)


def test_the_interval_of_a_mean_is_that_of_students_t() -> None:
    values = np.random.default_rng(0).normal(size=25)
    found = bootstrap(mean, values, np.zeros(25), 25)
    half = stats.t.ppf(0.975, 24) * values.std(ddof=1) / 5
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert expanded_tail(10**6) == pytest.approx(0.025, rel=1e-3)


def test_one_sample_has_an_endless_interval() -> None:
    found = bootstrap(mean, np.ones(1), np.zeros(1), 1)
    assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_nothing_has_no_value_and_no_interval(name: str) -> None:
    nothing = {"units": lambda kept: 0}
    row = replace(METRICS[name], **nothing)
    for other in (np.zeros(0), np.ones(0, np.int64)):
        assert math.isnan(difference(row, np.zeros(0), other).drop)
    assert measured(row, np.zeros(0)) is None
    assert bootstrap(row.value, np.zeros(0), np.zeros(0), 0) == Spread(-math.inf, math.inf)


def test_both_models_are_drawn_alike() -> None:
    values = np.random.default_rng(0).normal(size=50) * 100
    found = bootstrap(mean, values + 1, values, 50)
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))


def test_draws_without_a_number_do_not_count() -> None:
    def only_first(kept: Any, counts: Any) -> Any:
        return np.where(counts[:, 0] > 0, counts @ kept / counts.sum(1), np.nan)

    found = bootstrap(only_first, np.arange(8.0), np.zeros(8), 8)
    assert 0 < found.low < found.high < 8


def test_models_that_differ_on_no_sample_may_still_differ_on_others() -> None:
    row = METRICS["miou"]
    kept = np.ones((20, 3, 4), np.float32)
    found = difference(row, kept, kept.copy())
    # As many as z^2 / (n + z^2) of all samples, each by all there is: 16 points of 20 samples.
    assert (found.drop, found.p_value) == (0, None)
    assert found.high == -found.low == pytest.approx(100 * 1.96**2 / (20 + 1.96**2), abs=0.01)
    endless = METRICS["psnr"]
    assert difference(endless, np.ones(20), np.ones(20)).high == 0


def test_what_is_better_when_lower_is_lost_when_it_rises() -> None:
    values = np.random.default_rng(0).random(40)
    found = difference(METRICS["mae"], values, values + 0.25 + 0.01 * values)
    assert found.drop == pytest.approx(0.25 + 0.01 * values.mean())
    assert found.low < found.drop < found.high


Pair = tuple[Any, Any]


def normal(generator: np.random.Generator, count: int) -> Pair:
    """PSNR: differences with a long tail."""
    base = generator.normal(30, 4, count)
    return base, base - generator.exponential(0.3, count)


def overlap(generator: np.random.Generator, count: int) -> Pair:
    """mIoU of three classes, of which the last is rare; the second model misses a few more pixels."""
    actual = generator.multinomial(64, [0.6, 0.3, 0.1], count).astype(float)
    kept = []
    for miss in (0.1, 0.14):
        right = generator.binomial(actual.astype(int), 1 - miss)
        wrong = generator.poisson(3, actual.shape)
        kept.append(np.stack([right, right + wrong, actual], 1))
    return kept[0], kept[1]


def explained(generator: np.random.Generator, count: int) -> Pair:
    """R2 of two outputs."""
    actual = generator.normal(5, 1, (count, 2))
    noise = generator.normal(0, 0.5, (count, 2))
    return tuple(  # type: ignore[return-value]
        METRICS["r2"].score(torch.from_numpy(actual + size * noise), torch.from_numpy(actual)).numpy()
        for size in (1.0, 1.2)
    )


def labels(generator: np.random.Generator, count: int) -> Pair:
    """F1 of three classes."""
    rows = (generator.random((count, 3)) < 0.4).astype(np.float32)
    signal = generator.normal(size=(count, 3)) + 2 * rows - 1
    both = (signal, signal + generator.normal(0, 0.5, (count, 3)))
    return tuple(  # type: ignore[return-value]
        METRICS["f1"].score(torch.from_numpy(logits), torch.from_numpy(rows)).numpy() for logits in both
    )


def ranked(generator: np.random.Generator, count: int) -> Pair:
    """Average precision of two classes."""
    rows = (generator.random((count, 2)) < 0.4).astype(np.float32)
    signal = generator.normal(size=(count, 2)) + 1.5 * rows
    both = (signal, signal + generator.normal(0, 0.6, (count, 2)))
    return tuple(np.stack([logits, rows], 1).astype(np.float32) for logits in both)  # type: ignore[return-value]


def nats(generator: np.random.Generator, count: int) -> Pair:
    """Perplexity of texts of different lengths."""
    lengths = generator.integers(5, 40, count).astype(float)
    total = lengths * generator.gamma(9, 0.3, count)
    return np.stack([total, lengths], 1), np.stack([total * 1.02 + generator.normal(0, 1, count), lengths], 1)


def characters(generator: np.random.Generator, count: int) -> Pair:
    """Errors in lines of different lengths."""
    lengths = generator.integers(5, 40, count)
    wrong = generator.binomial(lengths, 0.05)
    more = wrong + generator.binomial(lengths, 0.02)
    return tuple(np.stack([each, lengths], 1).astype(float) for each in (wrong, more))  # type: ignore[return-value]


SIMULATED: dict[str, Callable[[np.random.Generator, int], Pair]] = {
    "psnr": normal,
    "miou": overlap,
    "r2": explained,
    "f1": labels,
    "map": ranked,
    "perplexity": nats,
    "cer": characters,
}


def truth(name: str, simulate: Callable[[np.random.Generator, int], Pair]) -> float:
    """The difference on more samples than chance shows on."""
    row, (base, other) = METRICS[name], simulate(np.random.default_rng(1), 40_000)
    factor = row.scale if row.higher_is_better else -row.scale
    one, two = (row.value(kept, once(40_000))[0] for kept in (base, other))
    return float(factor * (one - two))


def held(name: str, trials: int, samples: int) -> float:
    """Share of the trials whose interval holds the true difference."""
    simulate, generator = SIMULATED[name], np.random.default_rng(2)
    wanted, holds = truth(name, simulate), 0
    for _ in range(trials):
        found = difference(METRICS[name], *simulate(generator, samples))
        holds += found.low <= wanted <= found.high
    return holds / trials


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMULATED)
def test_nineteen_of_twenty_intervals_hold_the_true_difference(name: str) -> None:
    # Three standard deviations are 4 points of 300 trials; skewed numbers cost a few more.
    assert 0.89 <= held(name, 300, 40) <= 0.99


def test_intervals_hold_the_true_difference() -> None:
    assert 0.88 <= held("miou", 60, 30) <= 1


def test_an_interval_that_is_too_narrow_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelopt_cli.measure.bootstrap.expanded_tail", lambda samples: 0.15)
    assert held("miou", 60, 30) < 0.85
