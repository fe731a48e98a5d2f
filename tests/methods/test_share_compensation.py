"""Choosing entries column by column, against least squares for what is left."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from modelopt_cli.methods.layer_pass import inverse_factor
from modelopt_cli.methods.share import compensation
from modelopt_cli.methods.share.compensation import Curvature, Levels, compensated, shrink_correlations

Array = npt.NDArray[np.float64]
TABLE = torch.tensor([-1.1, -0.4, 0.0, 0.3, 0.9], dtype=torch.float64)
ZERO = 2
FREE = torch.zeros(1, dtype=torch.float64)


def inputs(samples: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs whose means are not zero."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return (mixed + torch.randn(columns, generator=g)).double()


def weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.5 * torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def curvature(x: Tensor, *spans: tuple[int, int]) -> Curvature:
    """Of inputs whose second moments are believed as they are."""
    cut = spans or ((0, x.shape[1]),)
    moments = [(x[:, start:stop].T @ x[:, start:stop]).unsqueeze(0) for start, stop in cut]
    return Curvature(tuple(map(inverse_factor, moments)), cut)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def least(x: Array, target: Array, fixed: dict[int, float]) -> tuple[float, Array]:
    """The squared error to ``target`` with some columns fixed and all others free, and the free values."""
    free = [j for j in range(x.shape[1]) if j not in fixed]
    rest = target - sum(x[:, j] * value for j, value in fixed.items())
    values = np.linalg.lstsq(x[:, free], rest, rcond=None)[0] if free else np.zeros(0)
    return float(((rest - x[:, free] @ values) ** 2).sum()), values


def brute(
    x: Array, row: Array, weights: int, rates: Array, held: tuple[int, ...] = ()
) -> tuple[list[int], float, Array]:
    """Every column takes the level that is cheapest if what follows, the bias too, makes up for it."""
    table = TABLE.numpy()
    fixed: dict[int, float] = {}
    chosen = []
    for j in range(weights):
        costs = [least(x, x @ row, {**fixed, j: level})[0] + r for level, r in zip(table, rates, strict=True)]
        chosen.append(ZERO if j in held else int(np.argmin(costs)))
        fixed[j] = float(table[chosen[-1]])
    return chosen, *least(x, x @ row, fixed)


RATES = {"free": np.zeros(5), "dear": np.array([9.0, 3.0, 0.0, 2.0, 8.0])}


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("block", [2, 128])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_each_step_takes_what_is_best_for_the_outputs(
    rates: str, block: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensation, "BLOCK", block)
    x, w = inputs(40, 5), weight(6, 5)
    shift = torch.randn(1, 6, generator=torch.Generator().manual_seed(2)).double() if bias else None
    seen = with_ones(x) if bias else x
    levels = Levels(TABLE, torch.from_numpy(RATES[rates]))
    index, after = compensated(w, shift, curvature(seen), levels)
    assert (after is None) == (not bias)
    for row in range(6):
        whole = w[0, row] if shift is None else torch.cat([w[0, row], shift[0, row, None]])
        chosen, error, free = brute(seen.numpy(), whole.numpy(), 5, RATES[rates])
        assert index[0, row].tolist() == chosen
        if after is not None:
            assert float(after[0, row]) == pytest.approx(free[0])
            made = torch.cat([TABLE[index[0, row]], after[0, row, None]])
            assert float((seen @ (made - whole)).square().sum()) == pytest.approx(error)


def test_errors_made_up_for_are_smaller_than_errors_left() -> None:
    x, w = with_ones(inputs(200, 12)), weight(8, 12)
    shift = torch.zeros(1, 8).double()
    index, after = compensated(w, shift, curvature(x), Levels(TABLE, FREE))
    assert after is not None
    plain = TABLE[(w.unsqueeze(-1) - TABLE).abs().argmin(-1)]
    outputs = [
        m[0] @ x[:, :-1].T + b[0, :, None] for m, b in ((w, shift), (TABLE[index], after), (plain, shift))
    ]
    made_up, left = ((each - outputs[0]).square().sum() for each in outputs[1:])
    assert made_up < 0.7 * left


def test_uncorrelated_inputs_are_plain_rounding() -> None:
    w = weight(7, 9)
    index, _ = compensated(w, None, curvature(torch.eye(9).double()), Levels(TABLE, FREE))
    assert torch.equal(index, (w.unsqueeze(-1) - TABLE).abs().argmin(-1))


def test_spans_do_not_know_each_other() -> None:
    x, w = inputs(40, 6), weight(3, 6)
    index, _ = compensated(w, None, curvature(x, (0, 4), (4, 6)), Levels(TABLE, FREE))
    for start, stop in ((0, 4), (4, 6)):
        part, _ = compensated(w[..., start:stop], None, curvature(x[:, start:stop]), Levels(TABLE, FREE))
        assert torch.equal(index[..., start:stop], part)


def test_the_bias_may_be_a_span_of_its_own() -> None:
    x, w = inputs(40, 4), weight(3, 4)
    moments = curvature(with_ones(x), (0, 4), (4, 5))
    index, after = compensated(w, torch.ones(1, 3).double(), moments, Levels(TABLE, FREE))
    assert torch.equal(index, compensated(w, None, curvature(x), Levels(TABLE, FREE))[0])
    assert after is not None
    assert torch.equal(after, torch.ones(1, 3).double())


def test_pruned_weights_take_the_zero_and_the_others_make_up_for_it() -> None:
    x, w = inputs(40, 5), weight(4, 5)
    free = torch.ones(1, 4, 5, dtype=torch.bool)
    free[0, 1, 0] = free[0, 2, 3] = False
    index, _ = compensated(w, None, curvature(x), Levels(TABLE, FREE, ZERO), free)
    held = {1: (0,), 2: (3,)}
    for row in range(4):
        expected, _, _ = brute(x.numpy(), w[0, row].numpy(), 5, RATES["free"], held.get(row, ()))
        assert index[0, row].tolist() == expected


def test_rows_may_have_tables_of_their_own() -> None:
    x, w = inputs(40, 5), weight(4, 5)
    tables = torch.stack([TABLE * (1 + row) for row in range(4)]).unsqueeze(0)
    index, _ = compensated(w, None, curvature(x), Levels(tables, FREE))
    for row in range(4):
        alone, _ = compensated(w[:, row : row + 1], None, curvature(x), Levels(tables[0, row], FREE))
        assert torch.equal(index[:, row : row + 1], alone)


def test_groups_have_inputs_of_their_own() -> None:
    parts = [inputs(40, 4, seed) for seed in range(3)]
    w = torch.cat([weight(2, 4, seed) for seed in range(3)])
    factor = inverse_factor(torch.stack([part.T @ part for part in parts]))
    index, _ = compensated(w, None, Curvature((factor,), ((0, 4),)), Levels(TABLE, FREE))
    for group, part in enumerate(parts):
        alone, _ = compensated(w[group : group + 1], None, curvature(part), Levels(TABLE, FREE))
        assert torch.equal(index[group : group + 1], alone)


@pytest.mark.parametrize("see", [lambda x: x, with_ones], ids=["no bias", "bias"])
def test_importance_is_the_error_left_once_the_later_columns_made_up_for_it(
    see: Callable[[Tensor], Tensor],
) -> None:
    x = see(inputs(40, 5))
    found = curvature(x).importance(5)
    assert found.shape == (1, 5)
    for j in range(5):
        error, _ = least(x[:, j:].numpy(), np.zeros(len(x)), {0: 1.0})
        assert float(found[0, j]) == pytest.approx(error)


@pytest.mark.parametrize("constant", [False, True], ids=["plain", "with the bias"])
def test_dead_inputs_and_one_sample_are_harmless(constant: bool) -> None:
    x = inputs(40, 4)
    x[:, 2] = 0
    seen = with_ones(x) if constant else x
    shift = torch.zeros(1, 3).double() if constant else None
    for samples in (1, 2, 40):
        moments = (seen.T @ seen).unsqueeze(0)
        found = Curvature.of([moments], [(0, seen.shape[1])], samples, constant=constant)
        assert (found.importance(4) > 0).all()
        index, after = compensated(weight(3, 4), shift, found, Levels(TABLE, FREE))
        assert index.shape == (1, 3, 4)
        assert after is None or torch.isfinite(after).all()


def shrinkage(correlation: Array, samples: int) -> float:
    """Equation 23 of Chen et al. (2010), for a matrix whose trace is its size."""
    p, square = len(correlation), float(np.trace(correlation @ correlation))
    return ((1 - 2 / p) * square + p**2) / ((samples + 1 - 2 / p) * (square - p))


@pytest.mark.parametrize("samples", [3, 30, 3000])
def test_correlations_shrink_as_published_and_variances_stay(samples: int) -> None:
    x = inputs(samples, 6).numpy()
    moments = x.T @ x
    scale = np.sqrt(np.diag(moments))
    correlation = moments / np.outer(scale, scale)
    part = min(shrinkage(correlation, samples), 1.0)
    expected = np.outer(scale, scale) * ((1 - part) * correlation + part * np.eye(6))
    found = shrink_correlations(torch.from_numpy(moments).unsqueeze(0), samples)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found.diagonal(), np.diag(moments))


def test_means_are_believed_whatever_the_samples() -> None:
    x = inputs(5, 3)
    seen = with_ones(x)
    found = shrink_correlations((seen.T @ seen).unsqueeze(0), 5, constant=True)[0]
    torch.testing.assert_close(found[-1], torch.cat([x.sum(0), torch.tensor([5.0]).double()]))
    centred = x - x.mean(0)
    inner = shrink_correlations((centred.T @ centred).unsqueeze(0), 5)[0]
    torch.testing.assert_close(found[:3, :3], inner + 5 * torch.outer(x.mean(0), x.mean(0)))
