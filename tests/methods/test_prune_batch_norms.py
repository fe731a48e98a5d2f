"""Batch-norm statistics against numpy in float64, over batches of different sizes."""

import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import DataError
from modelopt_cli.methods.prune.batch_norms import recalibrate
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.conv2 = nn.Conv2d(4, 3, 3)
        self.bn2 = nn.BatchNorm2d(3, affine=False)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3, 5)
        self.bn3 = nn.BatchNorm1d(5)
        nn.init.uniform_(self.bn1.weight, 0.5, 2)
        nn.init.normal_(self.bn1.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.fc(self.drop(x.mean((2, 3)))))


SHAPE = (2, 7, 7)


def images(count: int = 21) -> Tensor:
    return 3 + 2 * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5))


def captured(model: nn.Module | None = None) -> Program:
    return capture((model or Net()).eval(), InputSpec(SHAPE))


def normalise(x: np.ndarray, norm: nn.Module) -> np.ndarray:
    """By a batch's own mean and biased variance (Ioffe and Szegedy 2015, algorithm 1)."""
    dims = tuple(d for d in range(x.ndim) if d != 1)
    y = (x - x.mean(dims, keepdims=True)) / np.sqrt(x.var(dims, keepdims=True) + norm.eps)
    if norm.weight is None:
        return y
    weight, bias = (
        p.detach().double().numpy().reshape(1, -1, *[1] * (x.ndim - 2)) for p in norm.parameters()
    )
    return y * weight + bias


def inputs_by_hand(model: Net, batches: list[Tensor]) -> dict[str, list[np.ndarray]]:
    """What each norm sees in training, batch by batch, in float64."""
    model = model.double()
    seen: dict[str, list[np.ndarray]] = {"bn1": [], "bn2": [], "bn3": []}
    with torch.no_grad():
        for batch in batches:
            x = model.conv1(batch.double()).numpy()
            seen["bn1"].append(x)
            x = model.conv2(torch.from_numpy(normalise(x, model.bn1)).relu()).numpy()
            seen["bn2"].append(x)
            x = model.fc(torch.from_numpy(normalise(x, model.bn2)).relu().mean((2, 3))).numpy()
            seen["bn3"].append(x)
    return seen


@pytest.mark.parametrize("size", [21, 8, 5])
def test_statistics_are_those_of_all_values_seen(size: int) -> None:
    batches = list(images().split(size))
    if len(batches[-1]) == 1:
        batches.pop()
    found = recalibrate(captured(), images().split(size))
    for name, seen in inputs_by_hand(Net(), batches).items():
        values = np.concatenate([x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in seen], 1)
        norm = found.get_submodule(name)
        np.testing.assert_allclose(norm.running_mean.numpy(), values.mean(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.running_var.numpy(), values.var(1, ddof=1), rtol=1e-5)


def test_one_batch_gives_what_torch_gives_without_momentum() -> None:
    reference = Net().eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = None
            module.train()
    with torch.no_grad():
        reference(images())
    found = recalibrate(captured(), [images()])
    for name, buffer in reference.named_buffers():
        if "running" in name:
            torch.testing.assert_close(found.state_dict()[name], buffer, rtol=1e-5, atol=1e-6)


def test_nothing_else_changes() -> None:
    program = captured()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    found = recalibrate(program, images().split(8))
    for name, tensor in program.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(found.state_dict()[name], tensor) == ("running" not in name)
    assert found.get_submodule("bn1").momentum == 0.3
    assert not found.training
    assert not any(module.training for module in found.modules())
    assert recalibrate(program.train(), images().split(8)).training


def test_it_is_deterministic_and_tells_how_far_it_is() -> None:
    seen: list[tuple[int, int | None]] = []
    torch.manual_seed(1)
    one = recalibrate(captured(), images().split(8), lambda *args: seen.append(args), 21)
    torch.manual_seed(2)
    two = recalibrate(captured(), images().split(8))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
    assert seen == [(8, 21), (16, 21), (21, 21)]


def test_one_batch_at_a_time_is_held() -> None:
    made: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[Tensor]:
        for start in range(0, 21, 7):
            assert not [ref for ref in made[:-1] if ref() is not None]
            batch = images()[start : start + 7].clone()
            made.append(weakref.ref(batch))
            yield batch

    recalibrate(captured(), batches())
    assert len(made) == 3


def test_a_network_without_batch_norm_is_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(100, 3)
    )
    untracked = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    for net in (model, untracked):
        program = captured(net)

        def unread() -> Iterator[Tensor]:
            raise AssertionError("data were read")
            yield

        assert recalibrate(program, unread()) is program


def test_a_shared_norm_sees_all_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn(x) * 2 + 1)

    found = recalibrate(captured(Twice()), [images()])
    x = images().double()
    y = F.batch_norm(x, None, None, training=True) * 2 + 1
    both = torch.cat([x, y]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.bn.running_var.double(), both.var(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        pytest.param(list, "no samples to compute batch-norm statistics from", id="no samples"),
        pytest.param(lambda: [images(1)], "in a batch of 1 a batch norm sees one value", id="one sample"),
        pytest.param(lambda: [images(4) * float("inf")], "layer bn1: the network gives NaN", id="infinite"),
    ],
)
def test_refusals(batches: Callable[[], list[Tensor]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recalibrate(captured(), batches())
