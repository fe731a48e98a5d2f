import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_worker import samples, train
from torch import distributed as dist
from torch import nn

from modelopt_cli.data import open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.state import read_state
from modelopt_cli.training.synced import _Synced


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, torchrun: Callable[..., Any]) -> None:
    np.savez(tmp_path / "data.npz", **samples())
    done = torchrun(Path(__file__).parent / "distributed_worker.py", tmp_path)
    assert (tmp_path / "together").exists(), done.stderr
    together = read_state(tmp_path / "together").tensors
    alone = train(World(), f"npz:{tmp_path / 'data.npz'}").tensors
    assert together.pop("ranks").tolist() == [0, 1, 1]
    assert torch.equal(*together.pop("finished"))
    assert together.keys() == alone.keys()
    assert len(alone["losses"]) == 3 + 3 + 13
    for name, tensor in alone.items():
        torch.testing.assert_close(
            together[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert alone["figures"][1] == 13
    # The second process then left without a word.
    assert done.returncode != 0
    assert "another process of this run has ended" in read_state(tmp_path / "left").about["error"]


@pytest.mark.parametrize(("total", "size"), [(10, 1), (10, 3), (2, 3), (0, 2)])
def test_parts_are_disjoint_even_and_complete(total: int, size: int) -> None:
    parts = [range(total)[World(rank, size).part(total)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_cover_a_subset_once() -> None:
    data = open_data("digits").sample(5)
    shards = [World(rank, 3).shard(data) for rank in range(3)]
    assert [i for shard in shards if shard for i in shard.indices or ()] == list(data.indices or ())
    assert [World(rank, 7).shard(data) is None for rank in range(7)].count(True) == 2


def test_outside_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    here = world("cuda")
    assert here == World(0, 1, "cuda")
    assert here.main
    assert here.sum(1.5, 2) == (1.5, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun"):
        world()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


_NORMS = {
    "2d": (nn.BatchNorm2d(5), (6, 5, 4, 3)),
    "1d": (nn.BatchNorm1d(5), (7, 5)),
    "3d": (nn.BatchNorm3d(5, momentum=0.3), (2, 5, 2, 3, 2)),
    "plain": (nn.BatchNorm2d(5, affine=False, eps=0.1), (6, 5, 4, 3)),
    "average": (nn.BatchNorm2d(5, momentum=None), (6, 5, 4, 3)),
    "stateless": (nn.BatchNorm2d(5, track_running_stats=False), (6, 5, 4, 3)),
}


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", _NORMS)
def test_synced_batch_norm_is_torchs_own(kind: str, dtype: torch.dtype) -> None:
    """Outputs, gradients and running statistics, twice; bfloat16 as autocast gives it to float32 norms."""
    norm, shape = _NORMS[kind]
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).to(torch.float64 if dtype is torch.float64 else torch.float32)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    theirs = copy.deepcopy(norm)
    close = {"rtol": 1e-2, "atol": 2e-3} if dtype is torch.bfloat16 else {}
    for _ in range(2):
        x = (torch.randn(shape).double() * 3 + 50).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        upstream = torch.randn(shape).to(dtype)
        with _Synced(counts=True):
            ours = norm(x)
        expected = theirs(y)
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, **close)
        ours.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(x.grad, y.grad, **close)
    for parameter, other in zip(norm.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, **close)
    torch.testing.assert_close(dict(norm.state_dict()), dict(theirs.state_dict()), **close)


@pytest.mark.usefixtures("group_of_one")
def test_synced_batch_norm_leaves_evaluation_alone_and_needs_two_values() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    with _Synced(counts=True):
        assert torch.equal(norm.eval()(x), x / torch.tensor(1 + norm.eps).sqrt())
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm.train()(x[:1])
