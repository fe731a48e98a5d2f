"""Tables of a given size: what a weight becomes, by every scope, against brute force over the entries."""

import pytest
import torch
from torch import Tensor

from modelopt_cli.methods.share.clustered_weight import ClusteredWeight
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.one_size import Weight, cluster_all, cluster_weight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pruned(*shape: int, seed: int = 0) -> Tensor:
    weight = normal(*shape, seed=seed)
    return weight.masked_fill(weight.abs() < 0.8, 0)


def entropy(values: Tensor) -> float:
    counts = values.unique(return_counts=True)[1].double()
    return float((counts / counts.sum() * (counts.sum() / counts).log2()).sum())


def error(weight: Tensor, shared: ClusteredWeight) -> float:
    return float((weight.double() - shared.decode().double()).square().sum())


@pytest.mark.parametrize("init", ["linear", "density", "kmeans++", "exact"])
def test_every_weight_takes_the_nearest_of_few(init: str) -> None:
    weight = normal(12, 6, 3, 3)
    shared = cluster_weight(Weight(weight), ShareConfig(centroids=11, init=init), 0)
    entries = shared.decode().unique()
    assert shared.codebooks.shape == (1, 11, 1)
    assert len(entries) == 11
    nearest = (weight.unsqueeze(-1) - entries).abs().amin(-1)
    assert torch.equal((weight - shared.decode()).abs(), nearest)
    for entry in entries:  # each is the mean of its weights, up to what the search stops at
        assert float(weight[shared.decode() == entry].mean()) == pytest.approx(float(entry), abs=0.02)


@pytest.mark.parametrize("group", [1, 3, 5, 12, 40])
def test_groups_of_channels_have_tables_of_their_own(group: int) -> None:
    weight = normal(12, 5, 3) * torch.linspace(0.1, 4, 12).view(-1, 1, 1)
    config = ShareConfig(bits=2, scope="channels", group=group)
    shared = cluster_weight(Weight(weight), config, 0)
    assert shared.shape == tuple(weight.shape)
    assert len(shared.codebooks) == -(-12 // group)
    assert shared.group_rows <= group
    parts = (tensor.split(shared.group_rows) for tensor in (weight, shared.decode()))
    for part, values in zip(*parts, strict=True):
        entries = values.unique()
        assert len(entries) == 4
        assert torch.equal((part - values).abs(), (part.unsqueeze(-1) - entries).abs().amin(-1))
    if group < 12:
        assert error(weight, shared) < error(weight, cluster_weight(Weight(weight), ShareConfig(bits=2), 0))


def test_the_whole_network_has_one_table() -> None:
    weights = {
        "a": Weight(normal(8, 9)),
        "b": Weight(pruned(4, 5, 3), True),
        "c": Weight(3 * normal(6, 6, seed=2)),
    }
    found = cluster_all(weights, ShareConfig(bits=3, scope="network"), 0)
    entries = torch.cat([shared.decode().flatten() for shared in found.values()]).unique()
    assert len(entries) == 8
    assert 0 in entries
    for name, weight in weights.items():
        away = (weight.values - found[name].decode()).abs()
        torch.testing.assert_close(away, (weight.values.unsqueeze(-1) - entries).abs().amin(-1))
    assert torch.equal(found["b"].decode() == 0, weights["b"].values == 0) or bool(
        (found["b"].decode()[weights["b"].values == 0] == 0).all()
    )


@pytest.mark.parametrize("options", [{}, {"scope": "channels", "group": 3}, {"rate": 0.05}], ids=str)
def test_pruned_zeros_stay_zeros(options: dict[str, object]) -> None:
    weight = pruned(9, 20)
    shared = cluster_weight(Weight(weight, pruned=True), ShareConfig(bits=2, **options), 0)  # type: ignore[arg-type]
    assert shared.pruned
    assert (shared.decode()[weight == 0] == 0).all()
    assert (shared.codebooks == 0).any(1).all()
    assert len(shared.decode().unique()) <= 4 * len(shared.codebooks)


def test_importance_draws_the_entries_to_what_counts() -> None:
    weight = normal(40, 40)
    importance = 1 + 99 * (weight > 1).float()
    plain, weighted = (
        cluster_weight(Weight(weight, importance=i), ShareConfig(bits=2), 0).decode()
        for i in (None, importance)
    )
    costs = [float((importance * (weight - found).square()).sum()) for found in (plain, weighted)]
    assert costs[1] < 0.5 * costs[0]


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "weighted"])
def test_a_rate_trades_error_for_bits(importance: bool) -> None:
    weight = normal(60, 50)
    scale = normal(60, 50, seed=1).square() + 0.1 if importance else None
    found = [
        cluster_weight(Weight(weight, importance=scale), ShareConfig(bits=4, rate=rate), 0)
        for rate in (0, 0.02, 0.2)
    ]
    bits = [entropy(shared.decode()) for shared in found]
    errors = [error(weight, shared) for shared in found]
    assert bits[0] > bits[1] + 0.1 > bits[2] + 0.5
    assert errors[0] < errors[1] < errors[2]
    # At the same entropy it beats a smaller codebook.
    smaller = cluster_weight(Weight(weight), ShareConfig(centroids=round(2 ** bits[1]) or 2), 0)
    if not importance and entropy(smaller.decode()) >= bits[1]:
        assert errors[1] < error(weight, smaller)


@pytest.mark.parametrize("options", [{}, {"scope": "channels", "group": 4}], ids=["tensor", "channels"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_vectors_take_the_nearest_of_few(options: dict[str, object], weighted: bool) -> None:
    weight = normal(8, 6, 2)
    importance = normal(8, 6, 2, seed=1).square() + 0.1 if weighted else None
    config = ShareConfig(bits=3, vector=3, **options)  # type: ignore[arg-type]
    shared = cluster_weight(Weight(weight, importance=importance), config, 0)
    assert shared.shape == (8, 6, 2)
    scale = torch.ones_like(weight) if importance is None else importance
    for part, values, costs in zip(
        *(t.flatten(1).split(shared.group_rows) for t in (weight, shared.decode(), scale)), strict=True
    ):
        blocks, taken, cost = (t.reshape(-1, 1, 3) for t in (part, values, costs))
        entries = taken.squeeze(1).unique(dim=0)
        assert len(entries) <= 8
        distances = (cost * (blocks - entries).square()).sum(-1)
        torch.testing.assert_close((cost * (blocks - taken).square()).sum(-1)[:, 0], distances.amin(1))
    norms = shared.codebooks.square().sum(2)
    assert (norms.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("entries", [4, 256])
def test_a_constant_weight_and_one_smaller_than_its_table_are_exact(entries: int) -> None:
    for weight in (torch.full((3, 4), 0.7), torch.zeros(3, 4), normal(1, 2)):
        for options in ({}, {"vector": 2}, {"scope": "channels"}, {"rate": 0.1}):
            config = ShareConfig(centroids=entries, **options)  # type: ignore[arg-type]
            made = cluster_weight(Weight(weight), config, 0).decode()
            torch.testing.assert_close(made, weight, atol=0.5 if options == {"rate": 0.1} else 0, rtol=0)


def test_the_seed_decides() -> None:
    weight = normal(30, 40)
    first, again = (cluster_weight(Weight(weight), ShareConfig(bits=4), 0).decode() for _ in range(2))
    assert torch.equal(first, again)


def test_half_precision_is_shared_as_the_same_numbers() -> None:
    weight = normal(10, 20).half()
    wide, narrow = (
        cluster_weight(Weight(w), ShareConfig(bits=3), 0).decode() for w in (weight.float(), weight)
    )
    assert torch.equal(wide, narrow)
