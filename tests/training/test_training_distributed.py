import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_worker import samples, train

from modelopt_cli.data import open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.state import read_state


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **samples())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    worker = str(Path(__file__).parent / "distributed_worker.py")
    done = subprocess.run(
        [*torchrun, worker, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (tmp_path / "together").exists(), done.stderr
    together = read_state(tmp_path / "together").tensors
    alone = train(World(), f"npz:{tmp_path / 'data.npz'}").tensors
    assert together.pop("ranks").tolist() == [0, 1, 1]
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
