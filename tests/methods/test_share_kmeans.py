"""Scalar k-means: against all partitions, against the definition, and on what tensors look like at worst."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from torch import Tensor

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share import binning
from modelopt_cli.methods.share.binning import BINS, SORTED, points_of
from modelopt_cli.methods.share.choices import INITS
from modelopt_cli.methods.share.dynamic_programming import optimal
from modelopt_cli.methods.share.kmeans import assign, cluster, error
from modelopt_cli.methods.share.points import Points

Array = np.ndarray[Any, np.dtype[np.float64]]
numbers = st.integers(-1000, 1000).map(lambda i: i / 64)
tensors = st.lists(numbers, min_size=1, max_size=60).map(torch.tensor)


def _brute(x: Array, w: Array, entries: int, fixed_zero: bool = False) -> float:
    """The least error over all divisions into intervals; with a fixed zero one interval may go to 0."""
    order = np.argsort(x)
    x, w = x[order], w[order]

    def spread(a: int, b: int) -> float:
        if a == b:
            return 0.0
        mean = np.average(x[a:b], weights=w[a:b])
        return float((w[a:b] * (x[a:b] - mean) ** 2).sum())

    least = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(x) + 1), entries - 1):
        bounds = [0, *cuts, len(x)]
        spreads = [spread(a, b) for a, b in itertools.pairwise(bounds)]
        if not fixed_zero:
            least = min(least, sum(spreads))
            continue
        for zero, (a, b) in enumerate(itertools.pairwise(bounds)):
            others = sum(spreads) - spreads[zero]
            least = min(least, others + float((w[a:b] * x[a:b] ** 2).sum()))
    return least


def _true_error(x: Array, table: Array, w: Array | float = 1.0) -> float:
    return float((w * np.abs(x[:, None] - table[None, :]).min(1) ** 2).sum())


def _tails(kind: str, n: int, seed: int = 0) -> Tensor:
    g = np.random.default_rng(seed)
    draw = {
        "normal": lambda: g.standard_normal(n),
        "laplace": lambda: g.laplace(size=n),
        "student": lambda: g.standard_t(3, n),
        "cauchy": lambda: g.standard_cauchy(n),
        "offset": lambda: 1000 + g.standard_normal(n),
        "spikes": lambda: g.choice([-1.0, 0.5, 2.0], n) + 1e-3 * g.standard_normal(n),
        "outlier": lambda: np.append(g.standard_normal(n - 1), 1e8),
    }
    return torch.from_numpy(draw[kind]().astype(np.float32))


@pytest.mark.parametrize("fixed_zero", [False, True], ids=["free", "fixed zero"])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("entries", [2, 3, 4])
def test_exact_reaches_the_least_error_over_all_partitions(
    entries: int, weighted: bool, fixed_zero: bool
) -> None:
    g = np.random.default_rng(entries)
    for _ in range(8):
        x = np.round(g.standard_normal(9) * 64 + 0.5) / 64 + 1 / 256
        w = g.random(9) ** 3 + 1e-3 if weighted else np.ones(9)
        importance = torch.from_numpy(w) if weighted else None
        table = cluster(
            torch.from_numpy(x), entries, init="exact", importance=importance, fixed_zero=fixed_zero
        )
        least = _brute(x, w, entries, fixed_zero)
        assert _true_error(x, table.double().numpy(), w) == pytest.approx(least, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("entries", [2, 5, 16])
def test_dynamic_programming_by_halves_equals_the_plain_recurrence(entries: int) -> None:
    g = np.random.default_rng(0)
    x, w = np.sort(g.standard_t(3, 200)), g.random(200)
    d = np.array([[np.inf] * 201 for _ in range(entries + 1)])
    d[0, 0] = 0
    cost = np.zeros((201, 201))
    for a, b in itertools.combinations(range(201), 2):
        cost[a, b] = (w[a:b] * (x[a:b] - np.average(x[a:b], weights=w[a:b])) ** 2).sum()
    for m in range(1, entries + 1):
        for i in range(201):
            d[m, i] = min(d[m - 1, j] + cost[j, i] for j in range(i + 1))
    assert _true_error(x, optimal(Points(x, w, w), entries), w) == pytest.approx(d[entries, 200], rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(tensors, st.integers(2, 9), st.booleans(), st.integers(0, 3))
def test_exact_is_never_worse_than_another_init(x: Tensor, entries: int, fixed_zero: bool, seed: int) -> None:
    errors = {i: error(x, cluster(x, entries, init=i, fixed_zero=fixed_zero, seed=seed)) for i in INITS}
    assert errors["exact"] == min(errors.values())


@pytest.mark.parametrize("kind", ["normal", "student", "spikes"])
def test_exact_is_never_worse_than_another_init_on_a_histogram(kind: str) -> None:
    x = _tails(kind, 100_000)
    errors = {i: error(x, cluster(x, 8, init=i)) for i in INITS}
    assert errors["exact"] == min(errors.values())


@settings(max_examples=30, deadline=None)
@given(tensors)
def test_more_entries_never_make_the_optimum_worse(x: Tensor) -> None:
    errors = [error(x, cluster(x, k, init="exact")) for k in range(1, 9)]
    scale = errors[0] + 1e-12
    assert all(b <= a + 1e-6 * scale for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("init", INITS)
def test_every_init_beats_another_librarys_lloyd(init: str) -> None:
    x = _tails("normal", 4000)
    w = x.double().numpy()
    theirs = min(
        _true_error(w, kmeans2(w[:, None], 16, minit="++", rng=np.random.default_rng(s))[0][:, 0])
        for s in range(3)
    )
    assert error(x, cluster(x, 16, init=init)) <= theirs


@pytest.mark.parametrize("init", INITS)
def test_every_init_comes_close_to_the_optimum(init: str) -> None:
    """Lloyd's algorithm alone ends several percent above it, from every start."""
    x = _tails("normal", 4096)
    w = x.double().sort().values.numpy()
    least = _true_error(w, optimal(Points(w, np.ones(4096), np.ones(4096)), 16))
    assert error(x, cluster(x, 16, init=init)) <= 1.005 * least


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(st.lists(floats, min_size=1, max_size=30), st.lists(floats, min_size=1, max_size=20))
def test_assign_finds_the_nearest_entry(values: list[float], entries: list[float]) -> None:
    table = torch.tensor(entries).unique()
    chosen = table[assign(torch.tensor(values), table).long()].tolist()
    for value, entry in zip(values, chosen, strict=True):
        nearest = min(abs(Fraction(value) - Fraction(e)) for e in entries)
        # What float64 tells apart.
        assert abs(Fraction(value) - Fraction(entry)) <= nearest * (1 + Fraction(1, 2**50))


@settings(max_examples=30, deadline=None)
@given(tensors, st.lists(numbers, min_size=1, max_size=200))
def test_assign_takes_the_lower_of_two_equally_near(x: Tensor, entries: list[float]) -> None:
    table = torch.tensor(entries).unique()
    # argmin gives the first of equal ones, and these numbers have no rounding.
    assert torch.equal(assign(x, table).long(), (x[:, None] - table[None, :]).abs().argmin(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [1, 16, 256])
def test_assign_over_several_chunks(dtype: torch.dtype, entries: int) -> None:
    x = _tails("normal", 150_000).to(dtype).reshape(300, 500)
    table = torch.linspace(-3, 3, entries)
    nearest = torch.cat([(r.double()[:, None] - table.double()).abs().argmin(1) for r in x])
    index = assign(x, table)
    assert index.dtype == torch.uint8
    assert torch.equal(index.long(), nearest.reshape(300, 500))


def test_error_is_the_weighted_sum_of_squares() -> None:
    x, table = _tails("normal", 90_000).double(), torch.tensor([-1.0, 0.25, 2.0])
    w = torch.rand(90_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = _true_error(x.numpy(), table.double().numpy(), w.numpy())
    assert error(x, table, w) == pytest.approx(expected, rel=1e-12)
    assert error(x.reshape(300, 300), table) == pytest.approx(_true_error(x.numpy(), table.double().numpy()))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["normal", "spikes", "outlier"])
def test_fixed_zero_stays_and_nothing_else_is_zero(init: str, kind: str) -> None:
    x = _tails(kind, 50_000)
    x[torch.rand(50_000, generator=torch.Generator().manual_seed(1)) < 0.9] = 0
    whole = cluster(x, 16, init=init, fixed_zero=True)
    assert len(whole) == 16
    assert (whole == 0).sum() == 1
    assert (x == 0).sum() == (assign(x, whole)[x == 0].long() == int((whole == 0).nonzero())).sum()
    alone = cluster(x[x != 0], 16, init=init, fixed_zero=True)
    assert error(x, alone) == pytest.approx(error(x, whole), rel=1e-2)


def test_fixed_zero_costs_little_of_a_free_entry() -> None:
    x = _tails("normal", 20_000)
    ours = error(x, cluster(x, 16, init="exact", fixed_zero=True))
    free = error(x, cluster(x, 15, init="exact"))
    assert error(x, cluster(x, 16, init="exact")) <= ours <= free


def test_only_zeros_are_a_table_of_zero() -> None:
    assert cluster(torch.zeros(5), 4, fixed_zero=True).tolist() == [0.0]
    x = torch.cat([torch.zeros(5), torch.arange(1.0, 9.0)])
    assert cluster(x, 4, fixed_zero=True, importance=(x == 0).float()).tolist() == [0.0]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("n", [20, SORTED + 1, 3 * BINS], ids=["few", "sorted", "large"])
def test_fewer_values_than_entries_are_the_table(init: str, n: int) -> None:
    distinct = torch.tensor([-3.0, -1e-3, 1e-3, 0.1, 0.1000001, 7.0])
    x = distinct[torch.arange(n) % 6]
    table = cluster(x, 8, init=init)
    assert torch.equal(table, distinct)
    assert error(x, table) == 0.0


@pytest.mark.parametrize("n", [1, 7, 100_000])
@pytest.mark.parametrize("value", [0.0, -2.5, 1e30, 1e-30])
def test_a_constant_tensor_has_one_value(n: int, value: float) -> None:
    x = torch.full((n,), value)
    assert torch.equal(cluster(x, 16), x[:1])


@settings(max_examples=30, deadline=None)
@given(tensors, st.integers(-90, 90), st.sampled_from(list(INITS)))
def test_powers_of_two_scale_the_table(x: Tensor, exponent: int, init: str) -> None:
    assert torch.equal(cluster(x * 2.0**exponent, 4, init=init), cluster(x, 4, init=init) * 2.0**exponent)


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("kind", ["normal", "student", "spikes"])
def test_powers_of_two_scale_the_table_of_a_large_tensor(kind: str, exponent: int) -> None:
    x = _tails(kind, 80_000)
    assert torch.equal(cluster(x * 2.0**exponent, 16), cluster(x, 16) * 2.0**exponent)


@pytest.mark.parametrize("entries", [16, 256])
@pytest.mark.parametrize("kind", ["normal", "laplace", "student", "cauchy", "offset", "spikes", "outlier"])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_bins_cost_less_than_a_ten_thousandth_of_the_error(kind: str, entries: int, weighted: bool) -> None:
    """Lloyd's algorithm on all values gains next to nothing over a table from bins."""
    x = _tails(kind, 300_000)
    importance = torch.rand(300_000, generator=torch.Generator().manual_seed(0)) ** 4 if weighted else None
    if kind == "offset":
        x = x.double()
    values = x.double().sort()
    w = np.ones(len(x)) if importance is None else importance.double()[values.indices].numpy()
    v = values.values.numpy()
    table = cluster(x, entries, importance=importance, iterations=300).double().numpy()
    binned = refined = _true_error_sorted(v, table, w)
    for _ in range(10):
        bounds = np.searchsorted(v, (table[1:] + table[:-1]) / 2)
        starts = np.concatenate(([0], bounds))
        assert (np.diff(np.append(starts, len(v))) > 0).all()
        table = np.add.reduceat(w * v, starts) / np.add.reduceat(w, starts)
        refined = min(refined, _true_error_sorted(v, table, w))
    assert binned <= (1 + 1e-4) * refined


def _true_error_sorted(v: Array, table: Array, w: Array) -> float:
    index = np.searchsorted((table[1:] + table[:-1]) / 2, v)
    return float((w * (v - table[index]) ** 2).sum())


@pytest.mark.parametrize("kind", ["normal", "spikes"])
def test_chunks_give_what_one_piece_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _tails(kind, 70_000)
    w = torch.rand(70_000, generator=torch.Generator().manual_seed(0))
    whole = points_of(x, 16, w)
    monkeypatch.setattr(binning, "CHUNK", 4096)
    monkeypatch.setattr(binning, "SORTED_CHUNK", 4096)
    parts = points_of(x, 16, w)
    for name in ("x", "weight", "count"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "cauchy", "spikes"])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_bins_keep_weight_count_and_mean(kind: str, weighted: bool) -> None:
    x = _tails(kind, 200_000)
    w = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) if weighted else torch.ones(200_000)
    points = points_of(x, 16, w if weighted else None)
    assert points.count.sum() == 200_000
    assert points.weight.sum() == pytest.approx(float(w.double().sum()))
    assert float(points.weight @ points.x) == pytest.approx(float(w.double() @ x.double()), rel=1e-6)
    assert (np.diff(points.x) > 0).all()


@pytest.mark.parametrize("step", [2**-4, 2**-8])
def test_a_few_thousand_distinct_values_are_never_binned(step: float) -> None:
    x = (_tails("normal", 200_000) / step).round() * step
    assert np.array_equal(points_of(x, 16).x, x.double().unique().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_gives_the_table_of_its_float32_values(dtype: torch.dtype) -> None:
    x = _tails("normal", 40_000).to(dtype)
    assert torch.equal(cluster(x, 16), cluster(x.float(), 16))


@pytest.mark.parametrize("n", [1000, 100_000])
def test_importance_moves_the_table_and_none_means_uniform(n: int) -> None:
    x = _tails("normal", n)
    uniform = cluster(x, 8)
    assert torch.equal(cluster(x, 8, importance=torch.zeros(n)), uniform)
    weight = (x > 0).float()
    positive = cluster(x, 8, importance=weight)
    assert (positive > 0).all()
    assert error(x, positive, weight) < error(x, uniform, weight)


@pytest.mark.parametrize("init", INITS)
def test_the_seed_decides(init: str) -> None:
    x = _tails("student", 70_000)
    assert torch.equal(cluster(x, 16, init=init, seed=5), cluster(x.clone(), 16, init=init, seed=5))


@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 3e38, 1e-44])
def test_extreme_magnitudes_neither_overflow_nor_vanish(magnitude: float) -> None:
    x = torch.arange(-50, 51).float() / 50 * magnitude
    table = cluster(x, 4)
    assert len(table) == 4
    assert table.isfinite().all()
    assert error(x, table) < 0.1 * error(x, torch.zeros(1)) or magnitude < 1e-40


def test_a_distant_pair_leaves_the_rest_its_entries() -> None:
    x = torch.cat([_tails("normal", 5000), torch.tensor([1e20, -1e20])])
    table = cluster(x, 18, init="exact")
    assert table[0] == -1e20
    assert table[-1] == 1e20
    assert error(x[:5000], table) < 2 * error(x[:5000], cluster(x[:5000], 16, init="exact"))


BAD: dict[str, tuple[Any, str]] = {
    "nan": (lambda: cluster(torch.tensor([1.0, float("nan")]), 4), "finite"),
    "infinite": (lambda: cluster(torch.tensor([1.0, float("inf")]), 4), "finite"),
    "beyond float32": (lambda: cluster(torch.tensor([1e300], dtype=torch.float64), 4), "finite"),
    "empty": (lambda: cluster(torch.zeros(0), 4), "values"),
    "integers": (lambda: cluster(torch.arange(4), 4), "floating-point"),
    "no entries": (lambda: cluster(torch.ones(3), 0), "room"),
    "only room for zero": (lambda: cluster(torch.ones(3), 1, fixed_zero=True), "room"),
    "unknown init": (lambda: cluster(torch.ones(3), 4, init="magic"), "linear, density"),
    "negative importance": (
        lambda: cluster(torch.ones(2), 4, importance=torch.tensor([1.0, -1.0])),
        "negative",
    ),
    "nan importance": (
        lambda: cluster(torch.ones(2), 4, importance=torch.tensor([1.0, float("nan")])),
        "finite",
    ),
    "importance of another shape": (lambda: cluster(torch.ones(2), 4, importance=torch.ones(3)), "shape"),
    "unsorted table": (lambda: assign(torch.ones(3), torch.tensor([1.0, 0.0])), "ascending"),
    "large table": (lambda: assign(torch.ones(3), torch.arange(300.0)), "256"),
}


@pytest.mark.parametrize(("call", "words"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_said(call: Any, words: str) -> None:
    with pytest.raises(ModeloptError, match=words):
        call()
