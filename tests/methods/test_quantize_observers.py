"""Observers against ranges worked out by numpy from all values at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelopt_cli.methods.quantize.histogram import BINS, COUNTED, Histogram
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.program.quantization import quantize

Array = NDArray[np.float64]


def watched(name: str, *batches: torch.Tensor) -> tuple[float, float]:
    observer = Histogram(OBSERVERS[name].choose, OBSERVERS[name].needs_counts)
    for batch in batches:
        observer.update(batch)
    return observer.range()


def values(seed: int = 0, n: int = 20_000) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g) * 1.5 + 0.3


def fake_quantized(x: Array, low: float, high: float) -> Array:
    scale = (high - low) / 255
    zero = np.clip(np.round(-low / scale), 0, 255)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


def mse(x: Array, low: float, high: float) -> float:
    return float(np.square(fake_quantized(x, low, high) - x).mean())


def divergence(x: Array, low: float, high: float) -> float:
    """KL divergence between the 4096-bin histogram, clipped, and its projection onto 256 levels."""
    edge = np.abs(x).max()
    counts, edges = np.histogram(x[x != 0], BINS, (-edge, edge))
    centres = (edges[1:] + edges[:-1]) / 2
    p = np.zeros(BINS)
    np.add.at(p, np.searchsorted(centres, np.clip(centres, *_inner(centres, low, high))), counts)
    q = np.zeros(BINS)
    inside = (centres >= low) & (centres <= high)
    level = np.round((centres - low) / (high - low) * 255).astype(int)
    for i in range(256):
        group = inside & (level == i) & (counts > 0)
        if group.any():
            q[group] = counts[group].mean()
    p, q = p / p.sum(), q / q.sum()
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())


def _inner(centres: Array, low: float, high: float) -> tuple[float, float]:
    kept = centres[(centres >= low) & (centres <= high)]
    return float(kept[0]), float(kept[-1])


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_range_contains_zero_and_stays_within_what_was_seen(name: str) -> None:
    for x in (values().abs() + 0.5, -values().abs() - 0.5, values()):
        low, high = watched(name, x)
        assert min(float(x.min()), 0) <= low <= 0 <= high <= max(float(x.max()), 0)
        assert high > low


def test_minmax() -> None:
    a, b = values(1), values(2) * 2
    both = torch.cat([a, b]).numpy()
    assert watched("minmax", a, b) == (both.min(), both.max())
    assert watched("minmax", b, a) == watched("minmax", a, b)


def test_percentile() -> None:
    x = values(n=1_000_000)
    low, high = watched("percentile", *x.split(100_000))
    width = 4 * float(x.abs().max()) / BINS  # the range may have doubled
    # 10 of a million on either side, give or take what shares their bin.
    for inner, outer in (((x < low), (x < low + width)), ((x > high), (x > high - width))):
        assert int(inner.sum()) <= 10 <= int(outer.sum())
    assert low > float(x.min())
    assert high < float(x.max())


@pytest.mark.parametrize("tail", [1.0, 30.0], ids=["normal", "outlier"])
def test_mse_is_nearly_the_best_of_a_grid(tail: float) -> None:
    x = values()
    x[0] = tail * x.max()
    low, high = watched("mse", x)
    array = x.double().numpy()
    grid = [
        mse(array, a * array.min(), b * array.max())
        for a in np.linspace(0.2, 1, 41)
        for b in np.linspace(0.2, 1, 41)
    ]
    assert mse(array, low, high) <= min(grid) * 1.03


@pytest.mark.parametrize("shape", ["normal", "outlier", "relu"])
def test_entropy_is_the_best_of_its_grid(shape: str) -> None:
    x = values(3)
    if shape == "outlier":
        x[:10] = 12.0
    if shape == "relu":
        x = x.relu()
    low, high = watched("entropy", x)
    array = x.double().numpy()
    fractions = np.linspace(0.2, 1, 81)
    best = min(divergence(array, f * min(array.min(), 0), f * array.max()) for f in fractions)
    assert divergence(array, low, high) == pytest.approx(best, rel=0.02, abs=1e-5)


def test_clipping_observers_ignore_a_lone_outlier() -> None:
    x = values(n=500_000)
    x[0] = 1000.0
    assert watched("minmax", x)[1] == 1000.0
    assert watched("percentile", x)[1] < 20


@pytest.mark.parametrize("name", ["minmax", "mse", "entropy"])
def test_zeros_of_a_relu_change_nothing_but_percentiles(name: str) -> None:
    x = values().relu()
    without = watched(name, x[x != 0])
    assert watched(name, x) == without
    assert without[0] == 0.0


@pytest.mark.parametrize("name", list(OBSERVERS))
@pytest.mark.parametrize(
    "x", [torch.zeros(5), torch.empty(0), torch.zeros(2, 3)], ids=["zeros", "empty", "2-d"]
)
def test_nothing_but_zeros(name: str, x: torch.Tensor) -> None:
    observer = Histogram(OBSERVERS[name].choose, OBSERVERS[name].needs_counts)
    observer.update(x)
    assert observer.range() == (0.0, 0.0)
    q = observer.qparams()
    assert torch.equal(quantize(torch.zeros(3), q), torch.full((3,), q.zero_point, dtype=torch.uint8))


@pytest.mark.parametrize("name", list(OBSERVERS))
@pytest.mark.parametrize("value", [1e-30, 3e-42, 7.0, -1e30], ids=str)
def test_a_constant(name: str, value: float) -> None:
    low, high = watched(name, torch.full((100,), value))
    assert low <= 0 <= high
    assert Histogram(OBSERVERS[name].choose, OBSERVERS[name].needs_counts).qparams().scale > 0


@pytest.mark.parametrize("name", list(OBSERVERS))
@pytest.mark.parametrize(
    ("low", "high", "steps_to_one"),
    [(0, 1, 255), (0, 12, 21), (-3, 40, 5), (-7, 0, 36), (0, 210, 1), (0, 255, 1)],
    ids=str,
)
def test_whole_numbers_are_exact(name: str, low: int, high: int, steps_to_one: int) -> None:
    observer = Histogram(OBSERVERS[name].choose, OBSERVERS[name].needs_counts)
    counts = torch.arange(low, high + 1).float()
    observer.update(torch.cat([counts, counts[1].expand(1_000_000)]))  # the extremes are rare
    q = observer.qparams()
    assert q.scale == pytest.approx(1 / steps_to_one, rel=1e-6)
    back = (quantize(counts, q).double() - q.zero_point) * q.scale
    np.testing.assert_allclose(back, counts, rtol=1e-6)


@pytest.mark.parametrize("name", list(OBSERVERS))
@pytest.mark.parametrize("x", [torch.tensor([0.0, 256.0, 3.0]), torch.tensor([0.0, 12.0, 0.5])], ids=str)
def test_other_numbers_have_the_observers_range(name: str, x: torch.Tensor) -> None:
    observer = Histogram(OBSERVERS[name].choose, OBSERVERS[name].needs_counts)
    for batch in (torch.tensor([5.0]), x):
        observer.update(batch)
    low, high = observer.range()
    assert observer.qparams().scale == pytest.approx((high - low) / 255, rel=1e-6)


def test_doubling_keeps_every_count() -> None:
    observer: Histogram = Histogram(OBSERVERS["mse"].choose)
    total = 0
    for i in range(12):
        x = values(i, 1000) * 3.0**i
        observer.update(x)
        total += len(x)
        assert float(observer.counts.sum()) + observer.zeros == total
    # And in the right place: doubled bins are unions of the bins of a fresh histogram.
    everything = torch.cat([values(i, 1000) * 3.0**i for i in range(12)])
    expected, _ = np.histogram(everything.numpy(), BINS, (-observer.limit, observer.limit))
    moved = np.abs(np.cumsum(expected) - np.cumsum(observer.counts.numpy())).max()
    assert moved <= 3  # a value on an edge may fall to either side


def test_a_sample_of_a_large_batch_stands_for_all_of_it() -> None:
    channels = torch.arange(1, 65).float()
    x = channels.view(1, -1, 1, 1).expand(32, -1, 32, 32).contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2 * COUNTED
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = -500.0, 900.0
    observer: Histogram = Histogram(OBSERVERS["mse"].choose)
    observer.update(x)
    assert (observer.low, observer.high) == (-500.0, 900.0)
    of_channels = observer.counts[observer.counts > x.numel() / 640]
    np.testing.assert_allclose(of_channels, np.full(64, x.numel() / 64), rtol=1e-2)


@pytest.mark.parametrize("name", [n for n, row in OBSERVERS.items() if row.needs_counts])
def test_memory_does_not_grow(name: str) -> None:
    observer = Histogram(OBSERVERS[name].choose, OBSERVERS[name].needs_counts)
    for i in range(1000):
        observer.update(values(i, 50) * 1.05**i)
    assert observer.counts.shape == (BINS,)
    held = [v for v in vars(observer).values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() for t in held) == BINS
    assert all(callable(v) or isinstance(v, torch.Tensor | float | int) for v in vars(observer).values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.sampled_from(list(OBSERVERS)))
def test_any_values(numbers: list[float], name: str) -> None:
    x = torch.tensor(numbers)
    low, high = watched(name, x)
    assert min(float(x.min()), 0.0) <= low <= 0.0 <= high <= max(float(x.max()), 0.0)
