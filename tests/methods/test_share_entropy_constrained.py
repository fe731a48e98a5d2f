"""Entropy-constrained tables: against the definition of their cost, entry by entry and value by value."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share import entropy_constrained as module
from modelopt_cli.methods.share.entropy_constrained import assign_rated, constrain
from modelopt_cli.methods.share.kmeans import assign, cluster, error

numbers = st.integers(-500, 500).map(lambda i: i / 32)


def _costs(x: Tensor, table: Tensor, bits: Tensor, lam: float, w: Tensor | None = None) -> Tensor:
    """``(n, entries)``"""
    square = (x.double()[:, None] - table.double()[None, :]).square()
    return (square if w is None else w.double()[:, None] * square) + lam * bits.double()


def _entropy(index: Tensor) -> float:
    """Bits for each index."""
    p = torch.bincount(index.long()).double() / len(index)
    p = p[p > 0]
    return float(-(p * p.log2()).sum())


def _normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _skewed(n: int) -> Tensor:
    return 10 ** (3 * _normal(n, 7))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(numbers, min_size=1, max_size=60),
    st.lists(st.tuples(numbers, st.floats(0, 12)), min_size=1, max_size=20, unique_by=lambda e: e[0]),
    st.floats(0, 20),
    st.booleans(),
)
def test_assign_rated_finds_the_cheapest_entry(
    values: list[float], entries: list[tuple[float, float]], lam: float, weighted: bool
) -> None:
    x = torch.tensor(values)
    table, bits = torch.tensor(sorted(entries)).unbind(1)
    w = _skewed(len(x)) if weighted else None
    costs = _costs(x, table, bits, lam, w)
    chosen = costs.gather(1, assign_rated(x, table, bits, lam, w).long()[:, None])[:, 0]
    assert torch.allclose(chosen, costs.min(1).values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_assign_rated_over_several_chunks(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = _normal(5000), _skewed(5000) if weighted else None
    table, bits = torch.linspace(-3, 3, 200), 8 + _normal(200, 3)
    monkeypatch.setattr(module, "CHUNK", 512)
    index = assign_rated(x.reshape(50, 100), table, bits, 0.01, None if w is None else w.reshape(50, 100))
    assert index.dtype == torch.uint8
    assert torch.equal(index.reshape(-1).long(), _costs(x, table, bits, 0.01, w).argmin(1))


def test_without_a_price_the_nearest_entry_is_the_cheapest() -> None:
    x, table = _normal(3000), torch.linspace(-2, 2, 9)
    assert torch.equal(assign_rated(x, table, torch.rand(9) * 5, 0.0), assign(x, table))


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("n", [3000, 200_000], ids=["sorted", "binned"])
@pytest.mark.parametrize("lam", [0.001, 0.02, 0.2])
def test_the_cost_falls_and_what_comes_out_is_consistent(n: int, lam: float, weighted: bool) -> None:
    x, w = _normal(n), (_skewed(n).clamp(0.01, 30) if weighted else None)
    start = cluster(x, 32, importance=w)
    index = assign(x, start)
    plain = error(x, start, w) + lam * n * _entropy(index)
    table, bits = constrain(x, start, lam, importance=w)
    index = assign_rated(x, table, bits, lam, w)
    square = (x - table[index.long()]).double().square()
    ours = float(square.sum() if w is None else w.double() @ square) + lam * n * _entropy(index)
    assert ours < plain
    assert (table[1:] > table[:-1]).all()
    shares = torch.bincount(index.long(), minlength=len(table)) / n
    assert torch.allclose(shares, 2.0**-bits, atol=0.01)
    assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-3)


def test_it_is_a_fixed_point_of_the_three_steps() -> None:
    """What Chou, Lookabaugh and Gray iterate, written down plainly, finds nothing more to gain."""
    x, lam = _normal(4000), 0.01
    table, bits = constrain(x, cluster(x, 16), lam, iterations=1000)
    before = float(_costs(x, table, bits, lam).min(1).values.sum())
    entries, rates = table.double(), bits.double()
    for _ in range(20):
        index = _costs(x, entries, rates, lam).argmin(1)
        used = torch.bincount(index, minlength=len(entries)).double()
        entries = torch.zeros_like(entries).index_add_(0, index, x.double()) / used
        rates = -(used / len(x)).log2()
    assert float(_costs(x, entries, rates, lam).min(1).values.sum()) >= before * (1 - 1e-3)


def test_it_beats_plain_k_means_of_the_same_entropy() -> None:
    x = _normal(100_000)
    small = cluster(x, 8, init="exact")
    start, rate = cluster(x, 64, init="exact"), _entropy(assign(x, small))
    low, high = 1e-4, 1.0
    for _ in range(12):
        lam = (low * high) ** 0.5
        table, bits = constrain(x, start, lam)
        index = assign_rated(x, table, bits, lam)
        low, high = (lam, high) if _entropy(index) > rate else (low, lam)
    ours = float((x - table[index.long()]).double().square().sum())
    assert _entropy(index) == pytest.approx(rate, abs=0.01)
    assert ours < 0.86 * error(x, small)
    # No scalar quantizer with an entropy code does better at a high rate (Gish and Pierce, 1968).
    assert ours / len(x) == pytest.approx(np.pi * np.e / 6 * 4**-rate, rel=0.05)


def test_a_high_price_leaves_one_entry() -> None:
    x = _normal(1000)
    table, bits = constrain(x, cluster(x, 16), 1e6)
    assert table.tolist() == pytest.approx([float(x.mean())], abs=1e-6)
    assert bits.tolist() == [0.0]


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_fixed_zero_counts_the_zeros_and_stays(weighted: bool) -> None:
    x, w = _normal(4000), (_skewed(4000).clamp(0.01, 30) if weighted else None)
    x[:3000] = 0
    start = cluster(x, 16, importance=w, fixed_zero=True)
    table, bits = constrain(x, start, 0.01, importance=w, fixed_zero=True)
    assert (table == 0).sum() == 1
    assert 0 < float(bits[table == 0]) < 0.42  # log2(4000 / 3000) is 0.415
    alone, rates = constrain(
        x[3000:], start, 0.01, importance=None if w is None else w[3000:], fixed_zero=True
    )
    assert (alone == 0).sum() == 1
    assert rates.isfinite().all()


def test_fixed_zero_stays_where_it_has_no_value() -> None:
    table, bits = constrain(
        torch.tensor([5.0, 6.0, 7.0, 5.0]), torch.tensor([0.0, 5.0, 6.5]), 0.1, fixed_zero=True
    )
    assert table[0] == 0
    assert bits.isfinite().all()
    only, bits = constrain(torch.zeros(7), torch.tensor([0.0, 1.0]), 0.1, fixed_zero=True)
    assert only.tolist() == [0.0]
    assert bits.tolist() == [0.0]


def test_values_without_importance_take_the_cheapest_entry() -> None:
    x, w = _normal(2000), torch.ones(2000)
    w[:500] = 0
    table, bits = constrain(x, cluster(x, 8), 0.01, importance=w)
    index = assign_rated(x, table, bits, 0.01, w)
    assert (index[:500] == bits.argmin()).all()
    uniform = constrain(x, cluster(x, 8), 0.01)
    nothing = constrain(x, cluster(x, 8), 0.01, importance=torch.zeros(2000))
    assert torch.equal(uniform[0], nothing[0])


def test_a_large_tensor_with_importance_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = _normal(20_000), torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    start = cluster(x, 8, importance=w)
    whole, _ = constrain(x, start, 0.01, importance=w)
    monkeypatch.setattr(module, "SAMPLE", 10_000)
    sampled, bits = constrain(x, start, 0.01, importance=w)
    assert len(sampled) == len(whole)
    assert torch.allclose(sampled, whole, atol=0.1)
    assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_a_price_that_makes_no_sense_is_refused(lam: float) -> None:
    with pytest.raises(ModeloptError, match="price of a bit"):
        constrain(torch.ones(3), torch.ones(1), lam)


def test_a_table_without_zero_cannot_fix_it() -> None:
    with pytest.raises(ModeloptError, match="no centroid 0"):
        constrain(torch.ones(3), torch.ones(1), 1.0, fixed_zero=True)
