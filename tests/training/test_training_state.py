import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.training.state import State, read_state, write_state

# Processes forked from one that has no threads: torch waits forever for threads that a fork left behind.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["modelopt_cli.training.state"])


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def of_every_type() -> dict[str, Tensor]:
    raw = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensors = {name: raw.view(dtype) for name, dtype in DTYPES.items() if dtype is not torch.bool}
    return {
        **tensors,
        "flags": raw > 100,
        "momentum.0.weight": torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45]),
        "steps": torch.tensor(7),
        "none": torch.empty(0, 3, dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "channels last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }


def test_every_type_and_shape_survives_bit_by_bit(tmp_path: Path) -> None:
    tensors = of_every_type()
    write_state(State(tensors), tmp_path / "state")
    back = read_state(tmp_path / "state").tensors
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor), name


def test_others_can_read_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(5)}
    write_state(State(tensors, {"x": 1}), tmp_path / "state")
    theirs = safetensors.torch.load_file(tmp_path / "state")
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "about",
    [{}, {"loss": 0.1 + 0.2, "tiny": 5e-324, "big": 2**62}, {"größe": [None, True, {"10": [], "9": {}}]}],
    ids=["nothing", "numbers", "nested"],
)
def test_about_survives_exactly(tmp_path: Path, about: dict[str, object]) -> None:
    write_state(State({}, about), tmp_path / "state")
    assert read_state(tmp_path / "state").about == about


def test_a_newer_state_replaces_an_older_one(tmp_path: Path) -> None:
    for step in (1, 2):
        write_state(State(about={"step": step}), tmp_path / "state")
    assert read_state(tmp_path / "state").about == {"step": 2}
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_no_damaged_byte_goes_unnoticed(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "state"
    write_state(State({"w": torch.arange(5.0), "n": torch.tensor(3)}, {"epoch": 4}), path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match=str(path)):
            read_state(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(State({"w": torch.arange(5.0)}), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            read_state(path)


def test_what_is_no_training_state_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ArtifactError, match="is not a training state"):
        read_state(tmp_path / "weights")
    with pytest.raises(ArtifactError, match="no such file"):
        read_state(tmp_path / "missing")
    write_state(State(), tmp_path / "state")
    written = (tmp_path / "state").read_bytes()
    for version, age in ((1, "older"), (3, "newer")):
        (tmp_path / "state").write_bytes(written.replace(rb"\"format\":2", rb"\"format\":%d" % version))
        with pytest.raises(ArtifactError, match=age):
            read_state(tmp_path / "state")


@pytest.mark.parametrize(
    "state",
    [
        State({"w": torch.zeros(2).to_sparse()}),
        State({"w": torch.zeros(2, device="meta")}),
        State({"w": torch.zeros(2, dtype=torch.complex128)}),
        State(about={"loss": float("nan")}),
        State(about={"path": Path()}),
    ],
    ids=["sparse", "meta", "complex128", "nan", "path"],
)
def test_what_cannot_be_stored_is_refused_and_the_old_state_stays(tmp_path: Path, state: State) -> None:
    write_state(State(about={"step": 1}), tmp_path / "state")
    with pytest.raises(ModeloptError, match="cannot be stored"):
        write_state(state, tmp_path / "state")
    assert read_state(tmp_path / "state").about == {"step": 1}


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_state(tmp_path: Path) -> None:
    """Every state holds its own number throughout; the writer is killed at any moment, fifteen times over."""
    path = tmp_path / "state"
    draw = random.Random(0)
    seen = 0
    for _ in range(15):
        child = FRESH.Process(target=_write_on, args=(path, seen))
        child.start()
        deadline = time.monotonic() + 60
        while _number(path) == seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.03 * draw.random())
        child.kill()
        child.join()
        state = read_state(path)
        assert state.about["number"] > seen
        seen = state.about["number"]
        assert all(bool((tensor == seen).all()) for tensor in state.tensors.values())
    write_state(State(), path)
    assert os.listdir(tmp_path) == ["state"]


def _number(path: Path) -> int:
    return int(read_state(path).about["number"]) if path.exists() else 0


def _write_on(path: Path, number: int) -> None:
    while True:
        number += 1
        tensors = {name: torch.full((50_000,), number) for name in "abcd"}
        write_state(State(tensors, {"number": number}), path)
