"""Training with shared weights: gradients against autograd, what holds after every step, resumed runs."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import share_worker
import torch
import torch.nn.functional as F
from share_cases import CONFIG, nearest_shared, pruned_network, shared_of, within
from torch import Tensor, nn

from modelopt_cli.artifact.codecs.codebook import Codebook
from modelopt_cli.data import Data, open_data
from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.share import dkm
from modelopt_cli.methods.share.choices import TUNINGS
from modelopt_cli.methods.share.clustered_weight import ClusteredWeight, TrainableCodebook, read_back
from modelopt_cli.methods.share.codebook_tuning import (
    CLOSED_AT,
    FIRST_PULL,
    EpochAssignment,
    FixedAssignment,
    SoftAssignment,
    fine_tune,
    read_all_back,
)
from modelopt_cli.program import Encoding, Program
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.state import read_state


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_shared(
    *shape: int, entries: int, groups: int = 1, vector: int = 1, pruned: bool = False
) -> ClusteredWeight:
    """Every index as likely as any other; the middle entry is 0 if weights are pruned."""
    rows = shape[0], int(np.prod(shape[1:])) // vector
    table = torch.randn(groups, entries, vector, generator=generator()).sort(1).values
    if pruned:
        table[:, entries // 2] = 0
    return ClusteredWeight(shape, torch.randint(entries, rows, generator=generator(1)), table, pruned)


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits?split=train").sample(320)


@pytest.fixture(scope="module")
def program(digits: Data) -> Program:
    return pruned_network(digits)


# The form.


@pytest.mark.parametrize(("groups", "vector"), [(1, 1), (3, 1), (1, 3), (4, 2)])
def test_share_form_is_that_of_the_codec(groups: int, vector: int) -> None:
    shared = random_shared(7, 2, 3, entries=5, groups=groups, vector=vector)
    params = {"entries": 5, "groups": groups, "vector": vector, "pruned": False}
    parts = {"indices": shared.indices.to(torch.uint8), "table": shared.codebooks}
    if vector == 1:
        parts = {"indices": parts["indices"].view(7, 2, 3), "table": shared.codebooks[..., 0]}
    assert torch.equal(shared.decode(), Codebook().decode(parts, params, torch.float32, (7, 2, 3)))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("groups", "vector"), [(1, 1), (3, 1), (1, 3), (4, 2)])
def test_share_form_is_read_back_from_the_weight(groups: int, vector: int, pruned: bool) -> None:
    shared = random_shared(7, 2, 3, entries=9, groups=groups, vector=vector, pruned=pruned)
    weight = shared.decode()
    found = read_back(weight, shared)
    assert torch.equal(found.decode(), weight)
    assert found.codebooks.shape[0] == groups
    assert found.codebooks.shape[1] <= 9
    if pruned:
        assert (found.codebooks == 0).all(2).any(1).all()
    if vector == 1:
        assert (found.codebooks.diff(dim=1) >= 0).all()
    if groups == 1:
        assert found.codebooks.shape[1] == len(
            torch.unique(torch.cat([weight.view(-1, vector), found.codebooks[0]]), dim=0)
        )
    params = {"entries": found.codebooks.shape[1], "groups": groups, "vector": vector}
    encoding = Encoding("codebook", {**params, "pruned": pruned and vector == 1}, {"table": found.codebooks})
    Codebook().encode(weight, encoding)


def test_share_form_refuses_more_values_than_entries() -> None:
    shared = random_shared(4, 6, entries=3)
    weight = shared.decode()
    weight[0, 0] += 1
    with pytest.raises(ModeloptError, match="4 distinct values where 3 are shared"):
        read_back(weight, shared)


# The mean of the members.


@pytest.mark.parametrize(("groups", "vector"), [(1, 1), (3, 1), (2, 3)])
def test_share_means_are_numpys_whatever_the_order(groups: int, vector: int) -> None:
    codebook = TrainableCodebook(random_shared(50, 6, entries=4, groups=groups, vector=vector))
    blocks = codebook.blocks(torch.randn(50, 6, generator=generator()) * 1e-4 + 3)
    found = codebook.means(blocks)
    for entry in range(len(codebook.centroids)):
        members = blocks[codebook.codes == entry].double().numpy()
        np.testing.assert_allclose(found[entry], members.mean(0), rtol=1e-6)
    order = torch.randperm(len(blocks), generator=generator())
    moved = copy.deepcopy(codebook)
    moved.adopt(codebook.codes[order], codebook.centroids)
    assert torch.equal(moved.means(blocks[order]), found)


def test_share_means_keep_what_is_no_number_and_leave_empty_and_pruned_entries_at_0() -> None:
    shared = random_shared(8, 8, entries=3, pruned=True)
    codebook = TrainableCodebook(
        replace(shared, codebooks=torch.cat([shared.codebooks, torch.ones(1, 1, 1)], 1))
    )
    blocks = codebook.blocks(torch.rand(8, 8) + 1)
    found = codebook.means(blocks)
    assert (found[:, 0] != 0).tolist() == [True, False, True, False]
    blocks[0] = torch.nan
    assert codebook.means(blocks).isnan().any()


# Fixed assignments.


@pytest.mark.parametrize(("groups", "vector"), [(1, 1), (3, 1), (1, 2), (3, 3)])
def test_share_fixed_is_the_gradient_of_the_table_over_the_members(groups: int, vector: int) -> None:
    """Against autograd through ``table[indices]``, and one entry by hand, in float64."""
    shared = random_shared(7, 6, entries=4, groups=groups, vector=vector)
    shared = replace(shared, codebooks=shared.codebooks.double())
    layer, images = nn.Linear(6, 7).double(), torch.randn(5, 6, generator=generator()).double()
    layer.weight.data.copy_(shared.decode())
    table = shared.codebooks.clone().requires_grad_()
    rows = torch.arange(7) // -(-7 // groups)
    weight = table[rows[:, None], shared.indices.long()].reshape(7, 6)
    F.linear(images, weight, layer.bias).pow(3).sum().backward()
    layer(images).pow(3).sum().backward()
    assert table.grad is not None
    members = torch.stack([
        torch.bincount(shared.indices[rows == g].flatten(), minlength=4) for g in range(groups)
    ])  # fmt: skip
    expected = (table - 0.1 * table.grad / members[..., None].clamp(min=1)).detach()

    assert layer.weight.grad is not None
    some = int(shared.indices[0, 0])
    of_one = layer.weight.grad.reshape(7, -1, vector)[rows == 0][shared.indices[rows == 0] == some]
    assert torch.allclose(expected[0, some], table.detach()[0, some] - 0.1 * of_one.mean(0))

    callback = FixedAssignment({"weight": shared}, {}, 1)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    callback.after_step(layer, 0, 1)
    moved = expected[rows[:, None], shared.indices.long()].reshape(7, 6)
    torch.testing.assert_close(layer.weight.detach(), moved, rtol=1e-9, atol=1e-9)


# Assignments again each epoch.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_share_reassigned_follows_latent_values(momentum: float) -> None:
    """Against the published algorithm in float64, each step with a larger pull, the last with all of it."""
    latents = torch.randn(6, 5, generator=generator()).double()
    shared = nearest_shared(latents.float(), 4)
    layer, images = nn.Linear(5, 6).double(), torch.randn(9, 5, generator=generator(1)).double()
    layer.weight.data.copy_(shared.decode())
    callback = EpochAssignment({"weight": shared}, {"weight": latents.clone()}, epochs=3)
    optimizer = torch.optim.SGD([layer.weight], lr=0.01, momentum=momentum)
    codes, table, velocity = (
        shared.indices.long(),
        shared.codebooks.double().flatten(),
        torch.zeros(6, 5).double(),
    )
    reassigned = 0
    for step in range(6):
        if step in (2, 4):
            fresh = (latents[..., None] - table).abs().argmin(-1)
            reassigned += int((fresh != codes).sum())
            codes = fresh
        weight = latents.clone().requires_grad_()
        F.linear(images, weight, layer.bias).square().sum().backward()
        assert weight.grad is not None
        velocity = momentum * velocity + weight.grad
        latents = latents - 0.01 * velocity
        table = torch.stack([latents[codes == entry].mean() for entry in range(4)])
        latents = latents - FIRST_PULL ** max(0, 1 - step / (CLOSED_AT * 6)) * (latents - table[codes])

        callback.before_step(layer, step, 6)
        optimizer.zero_grad()
        layer(images).square().sum().backward()
        optimizer.step()
        callback.after_step(layer, step, 6)
        torch.testing.assert_close(layer.weight.detach(), table[codes], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(callback.state()["latents/weight"].view(6, 5), latents)
    assert reassigned
    torch.testing.assert_close(latents, layer.weight.detach())


# Differentiable k-means.


def plain_dkm(points: Tensor, table: Tensor, tau: float, iterations: int) -> Tensor:
    """As published, with the whole attention matrix and its graph kept."""
    for i in range(iterations + 1):
        distance = (points[:, None, :] - table[None, :, :]).square().sum(-1)
        attention = torch.softmax(-distance / tau, 1)
        if i < iterations:
            mass = attention.sum(0)[:, None]
            table = torch.where(mass > 1e-6, attention.T @ points / mass.clamp(min=1e-6), table)
    return attention @ table


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize(("vector", "tau"), [(1, 0.5), (1, 0.02), (3, 0.5)])
def test_share_dkm_gradient_is_autograds(
    vector: int, tau: float, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dkm, "CHUNK_ELEMENTS", 64)
    points = torch.randn(101, vector, generator=generator()).double().requires_grad_()
    table = torch.randn(6, vector, generator=generator(1)).double()
    table[3] = 40.0  # too far to be given any attention
    expected = plain_dkm(points, table, tau, iterations)
    upstream = torch.randn(101, vector, generator=generator(2)).double()
    (gradient,) = torch.autograd.grad(expected, points, upstream)
    found = dkm.SoftClusters.of(points.detach(), table, tau, iterations)
    torch.testing.assert_close(found.values(), expected.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.gradient(upstream), gradient, rtol=1e-8, atol=1e-10)


def test_share_dkm_step_is_that_on_latent_values() -> None:
    """Through the callback: the network's own gradient, its layer's weight computed from latent values."""
    weight = torch.randn(6, 5, generator=generator()).double()
    shared = replace(nearest_shared(weight.float(), 4, groups=2), codebooks=torch.randn(2, 4, 1).double())
    layer, images = nn.Linear(5, 6).double(), torch.randn(3, 5).double()
    callback = SoftAssignment({"weight": shared}, {"weight": weight.clone()}, 1)
    latents = weight.clone().requires_grad_()
    soft = torch.cat([
        plain_dkm(part.reshape(-1, 1), table, 0.3 * dkm.spacing(table), 3)
        for part, table in zip(latents.split(3), shared.codebooks, strict=True)
    ])  # fmt: skip
    F.linear(images, soft.view(6, 5), layer.bias).pow(3).sum().backward()
    assert latents.grad is not None

    callback.before_step(layer, 0, 10)
    layer(images).pow(3).sum().backward()
    torch.testing.assert_close(layer.weight.grad, latents.grad)
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    callback.after_step(layer, 0, 10)
    moved = (latents - 1e-3 * latents.grad).detach()
    torch.testing.assert_close(callback.state()["latents/weight"].view(6, 5), moved)
    assert len(layer.weight[:3].unique()) <= 4
    layer.zero_grad()
    layer(images).sum().backward()  # the gradient is the layer's own again
    torch.testing.assert_close(layer.weight.grad, images.sum(0).expand(6, -1))


def test_share_dkm_ends_hard() -> None:
    points = torch.randn(4000, 1, generator=generator())
    table = torch.linspace(-2, 2, 8)[:, None]
    soft = dkm.SoftClusters.of(points, table, 0.003 * dkm.spacing(table), 3)
    hard = soft.codebooks[-1][dkm.nearest(points, soft.codebooks[-1])]
    away = (soft.values() - hard).square().mean() / (points - hard).square().mean()
    assert away < 0.01
    warm = dkm.SoftClusters.of(points, table, 0.3 * dkm.spacing(table), 3)
    assert (warm.values() - hard).square().mean() > 5 * away * (points - hard).square().mean()


def test_share_spacing_is_between_neighbours() -> None:
    assert dkm.spacing(torch.tensor([[0.0], [1.0], [3.0], [3.5], [3.5]])) == pytest.approx(0.25)
    assert dkm.spacing(torch.ones(1, 4)) == 1.0


# Whole trainings.


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"ema": 0.9, "momentum": 0.0}, {"optimizer": "adamw", "lr": 2e-3, "amp": True}], ids=str
)
@pytest.mark.parametrize("mode", TUNINGS)
def test_share_tuning_keeps_values_few_and_zeros_and_learns(
    mode: str, more: dict[str, Any], program: Program, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_cli.training import loop

    seen: list[nn.Module] = []

    def watched(network: nn.Module, *args: Any, **options: Any) -> float:
        seen.append(copy.deepcopy(network))
        return percent(network, *args, **options)

    percent = loop.percent
    monkeypatch.setattr(loop, "percent", watched)
    before, shared = copy.deepcopy(program.state_dict()), shared_of(program)
    rough = copy.deepcopy(program)
    for name, each in shared.items():
        rough.get_parameter(name).data.copy_(each.decode())
    network, found = fine_tune(
        program, shared, within(digits, replace(CONFIG, val_fraction=0.2, **more)), TUNINGS[mode], "tune"
    )
    for name, tensor in program.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, each in found.items():
        assert torch.equal(each.decode(), network.get_parameter(name))
        assert each.codebooks.shape[1] <= shared[name].codebooks.shape[1]
        zeros = shared[name].pruned & (shared[name].decode() == 0)
        assert torch.equal(zeros, each.decode() == 0)
        assert (each.codebooks.shape, each.indices.shape) == (
            shared[name].codebooks.shape,
            shared[name].indices.shape,
        )
    assert len(seen) == 3
    for epoch in seen:
        read_all_back(epoch, shared)  # also raises unless the weights are shared
    assert loss(network, digits) < 0.7 * loss(rough, digits)


def loss(network: nn.Module, data: Data) -> float:
    images, labels = next(iter(data.batches(320)))
    with torch.no_grad():
        return float(F.cross_entropy(network(images), labels))


@pytest.mark.slow
def test_share_tunings_differ_and_keep_the_assignments_that_they_claim(
    program: Program, digits: Data
) -> None:
    shared = shared_of(program)
    context = within(digits, replace(CONFIG, epochs=6))
    ends = {mode: fine_tune(program, shared, context, TUNINGS[mode], "tune")[0] for mode in TUNINGS}
    for name in shared:
        assert len({tuple(end.get_parameter(name).flatten().tolist()) for end in ends.values()}) == len(
            TUNINGS
        )
    kept = {
        mode: all(same_partition(each, end.get_parameter(name).detach()) for name, each in shared.items())
        for mode, end in ends.items()
    }
    assert kept == {mode: row.keeps_assignments for mode, row in TUNINGS.items()}


def same_partition(shared: ClusteredWeight, weight: Tensor) -> bool:
    """Whether blocks that had one entry still have one value."""
    values = weight.reshape(-1, shared.codebooks.shape[2])
    codes = shared.codes()
    return all(len(values[codes == code].unique(dim=0)) == 1 for code in codes.unique())


@pytest.mark.slow
def test_share_tuning_learns_from_the_network_before_sharing(program: Program, digits: Data) -> None:
    config = replace(CONFIG, teacher="self", distill_weight=1.0)
    network, _ = fine_tune(program, shared_of(program), within(digits, config), TUNINGS["fixed"], "tune")
    images, _ = next(iter(digits.batches(320)))
    rough = copy.deepcopy(program)
    for name, each in shared_of(program).items():
        rough.get_parameter(name).data.copy_(each.decode())
    with torch.no_grad():
        answers, near, far = (net(images).softmax(1) for net in (program, network, rough))
    assert (near - answers).abs().mean() < 0.5 * (far - answers).abs().mean()


class Failing:
    """Ends a training before a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        if step == self.at:
            raise KeyboardInterrupt

    def after_step(self, network: nn.Module, step: int, steps: int) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("mode", TUNINGS)
def test_share_tuning_resumed_ends_with_the_same_bits(
    mode: str, program: Program, digits: Data, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=6, ema=0.9, save_every=5)

    def attempt(folder: str, at: int, resume: bool) -> Program:
        with Run(tmp_path / folder, identity={}, resume=resume) as run:
            context = within(digits, config, run=run)
            return fine_tune(program, shared_of(program), context, TUNINGS[mode], "tune", Failing(at))[0]

    through = attempt("through", -1, False)
    for at in (5, 40, 72, 80):  # an epoch has 20 steps
        with pytest.raises(KeyboardInterrupt):
            attempt("stopped", at, at > 5)
    resumed = attempt("stopped", -1, True)
    for name, tensor in through.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_share_trained_refuses_pruned_weights_that_came_back(program: Program) -> None:
    network, shared = copy.deepcopy(program), {"fc.weight": shared_of(program)["fc.weight"]}
    weight = shared["fc.weight"].decode()
    weight[(weight == 0).nonzero()[0].unbind()] = weight.max()
    network.get_parameter("fc.weight").data.copy_(weight)
    with pytest.raises(ModeloptError, match=r"fc\.weight: training brought pruned weights back"):
        read_all_back(network, shared)


@pytest.mark.slow
def test_share_tuning_in_two_processes_is_that_of_one(tmp_path: Path, torchrun: Callable[..., Any]) -> None:
    done = torchrun(Path(__file__).parent / "share_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (read_state(tmp_path / f"rank{rank}").tensors for rank in (0, 1))
    alone = share_worker.trained().tensors
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        # A weight at the boundary between two entries may fall to either side.
        close = (tensor - alone[name]).abs() <= 1e-3 * alone[name].abs() + 1e-4
        assert close.double().mean() > (0.999 if name.startswith("fixed") else 0.9), name
