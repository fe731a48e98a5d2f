"""Tables of vectors: against distances written out, the scalar optimum, and another library."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share import product_quantization as module
from modelopt_cli.methods.share.kmeans import cluster, error
from modelopt_cli.methods.share.product_quantization import assign_vectors, cluster_vectors


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _positive(*shape: int) -> Tensor:
    return _normal(*shape, seed=9).exp()


def _distances(x: Tensor, table: Tensor, w: Tensor | None = None) -> Tensor:
    square = (x.double()[:, None] - table.double()[None]).square()
    return (square if w is None else square * w.double().reshape(len(x), 1, -1)).sum(2)


def _error(x: Tensor, table: Tensor, w: Tensor | None = None) -> float:
    return float(_distances(x, table, w).min(1).values.sum())


WEIGHTS = {"uniform": None, "by block": _positive(3000), "by number": _positive(3000, 4)}


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("entries", [1, 7, 256, 300])
def test_assign_finds_the_nearest_entry(
    entries: int, w: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 20_000)
    x, table = _normal(3000, 4), _normal(entries, 4, seed=1)
    index = assign_vectors(x, table, w)
    assert index.dtype == (torch.uint8 if entries <= 256 else torch.uint16)
    distance = _distances(x, table, w)
    chosen = distance.gather(1, index.long()[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
def test_it_is_no_worse_than_another_librarys(w: Tensor | None) -> None:
    x = _normal(3000, 4)
    theirs = torch.from_numpy(kmeans2(x.numpy(), 32, minit="++", iter=25, rng=np.random.default_rng(0))[0])
    assert _error(x, cluster_vectors(x, 32, importance=w), w) <= 1.03 * _error(x, theirs, w)


@pytest.mark.parametrize("by", ["block", "number"])
def test_importance_pays(by: str) -> None:
    x = _normal(3000, 4)
    w = 1 + 99.0 * (x[:, 0] > 1) if by == "block" else torch.tensor([100.0, 1, 1, 0.01]).expand(3000, 4)
    assert _error(x, cluster_vectors(x, 16, importance=w), w) < 0.8 * _error(x, cluster_vectors(x, 16), w)


def test_entries_are_the_weighted_means_of_their_blocks() -> None:
    x, w = _normal(2000, 3), _positive(2000, 3)
    table = cluster_vectors(x, 8, importance=w, iterations=200)
    index = assign_vectors(x, table, w).long()
    for k in range(8):
        mean = (w * x)[index == k].double().sum(0) / w[index == k].double().sum(0)
        assert torch.allclose(table[k].double(), mean, atol=1e-5)


def test_blocks_of_one_number_come_near_the_scalar_optimum() -> None:
    x = _normal(5000, 1)
    table = cluster_vectors(x, 8, iterations=200)
    assert error(x, table[:, 0].sort().values) <= 1.05 * error(x, cluster(x, 8, init="exact"))


def test_far_groups_are_all_found() -> None:
    centres = 100 * _normal(64, 8)
    x = centres.repeat(50, 1) + 0.01 * _normal(3200, 8, seed=2)
    assert _error(x, cluster_vectors(x, 64)) < 3200 * 8 * 1.1e-4


def test_many_entries() -> None:
    x = _normal(6_000, 2)
    table = cluster_vectors(x, 1500, iterations=3)
    assert table.shape == (1500, 2)
    assert int(assign_vectors(x, table).long().max()) > 1000


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-60, 2.0**100, 2.0**125])
def test_magnitude_does_not_matter(scale: float) -> None:
    x = (_normal(500, 4) * 1024).round().clamp(-2000, 2000) / 1024
    table = cluster_vectors(x * scale, 8)
    assert table.isfinite().all()
    if scale > 1e-30:
        assert torch.equal(table, cluster_vectors(x, 8) * scale)
    assert len(assign_vectors(x * scale, table).unique()) == 8


def test_few_distinct_blocks_are_the_table() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [-1.0, 0.0]])
    table = cluster_vectors(x, 10)
    assert table.tolist() == [[-1.0, 0.0], [1.0, 2.0], [3.0, 4.0]]
    assert cluster_vectors(torch.zeros(5, 2), 4).tolist() == [[0.0, 0.0]]


def test_an_unused_entry_moves_to_the_worst_block() -> None:
    data = module._Blocks(torch.tensor([[0.0], [1.0], [8.0], [9.0], [14.0]]), None)
    table = torch.tensor([[0.5], [9.0], [100.0]]) / data.scale
    moved = module._moved(data, *data.nearest(table), table) * data.scale
    assert moved[:, 0].tolist() == pytest.approx([0.5, 31 / 3, 14.0])


def test_no_importance_at_all_means_uniform() -> None:
    x = _normal(500, 2)
    assert torch.equal(cluster_vectors(x, 8, importance=torch.zeros(500)), cluster_vectors(x, 8))


def test_rare_blocks_that_a_sample_misses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 2)
    x = torch.zeros(5000, 2)
    x[17], x[4711] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])
    assert cluster_vectors(x, 4).tolist() == [[0.0, 0.0], [0.0, 5.0], [1.0, 0.0]]


def test_the_seed_decides() -> None:
    x = _normal(2000, 4)
    assert torch.equal(cluster_vectors(x, 16, seed=3), cluster_vectors(x, 16, seed=3))
    assert not torch.equal(cluster_vectors(x, 16, seed=3), cluster_vectors(x, 16, seed=4))


BAD = {
    "one dimension": (torch.zeros(3), None, 4, "shape"),
    "empty": (torch.zeros(0, 4), None, 4, "shape"),
    "nan": (torch.tensor([[float("nan")]]), None, 4, "finite"),
    "importance of another shape": (torch.zeros(3, 2), torch.ones(2), 4, "importance"),
    "negative importance": (torch.zeros(3, 2), -torch.ones(3), 4, "negative"),
    "too many entries": (torch.zeros(3, 2), None, 70_000, "65536"),
}


@pytest.mark.parametrize(("blocks", "importance", "entries", "words"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_said(
    blocks: Tensor, importance: Tensor | None, entries: int, words: str
) -> None:
    with pytest.raises(ModeloptError, match=words):
        cluster_vectors(blocks, entries, importance=importance)
