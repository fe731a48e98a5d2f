"""Writing tensor by tensor: the same bytes, one tensor in memory, and nothing left when it fails."""

import errno
import os
import weakref

import pytest
import torch

from modelopt_cli.artifact import (
    TensorStream,
    predicted_bytes,
    read_tensors,
    save,
    temporary_buffer,
    write_stream,
    write_tensors,
)
from modelopt_cli.artifact.save import fingerprint
from modelopt_cli.artifact.stream import tied_names
from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.program import Encoding

RAW = Encoding("raw")
ABOUT = {"history": ({"method": "m"},), "arch": "builtin:x", "labels": ("a",)}


def example():
    scale = torch.tensor([0.5, 0.25])
    state = {
        "a.weight": torch.tensor([[1.0, -3.0], [0.5, 31.75]]),
        "a.bias": torch.randn(2, generator=torch.Generator().manual_seed(0)),
        "n": torch.tensor(3),
    }
    return state, {"a.weight": Encoding("affine", {"bits": 8, "axis": 0, "group": None}, {"scale": scale})}


def stream_of(state, encodings, tied=None):
    return TensorStream(lambda: ((n, t.clone(), encodings.get(n, RAW)) for n, t in state.items()), tied or {})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("in_memory", [1 << 20, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("code", ["plain", "entropy"])
def test_bytes_are_those_of_the_whole_state(path, tmp_path, monkeypatch, code, in_memory):
    state, encodings = example()
    shared = torch.arange(5)
    whole = write_tensors({**state, "b": shared, "c": shared}, encodings, path, code=code, **ABOUT)
    monkeypatch.setattr(temporary_buffer, "_IN_MEMORY", in_memory)
    stream = stream_of({**state, "b": shared}, encodings, {"c": "b"})
    streamed = write_stream(stream, tmp_path / "streamed", code=code, **ABOUT)
    assert (tmp_path / "streamed").read_bytes() == path.read_bytes()
    assert streamed.sha256 == whole.sha256
    assert predicted_bytes(stream, code=code, **ABOUT) == whole.file_bytes
    assert sorted(os.listdir(tmp_path)) == ["net.safetensors", "streamed"]


def test_no_tensor_is_held_while_the_next_is_made(path):
    alive = []

    def items():
        for i in range(20):
            assert not any(reference() is not None for reference in alive)
            tensor = torch.full((64,), float(i))
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor, RAW
            del tensor

    write_stream(TensorStream(items), path)
    assert len(alive) == 20
    assert read_tensors(path).state["t7"].tolist() == [7.0] * 64


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_failure_while_a_tensor_is_made_leaves_the_old_file(path, monkeypatch, error):
    monkeypatch.setattr(temporary_buffer, "_IN_MEMORY", 0)
    path.write_bytes(b"old")

    def items():
        yield "a", torch.ones(1000), RAW
        assert os.listdir(path.parent) == [path.name]  # the buffer has no name
        raise error

    with pytest.raises(error):
        write_stream(TensorStream(items), path, force=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_full_disk_under_the_buffer_is_one_line_and_leaves_nothing(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(temporary_buffer.tempfile.SpooledTemporaryFile, "write", full)
    with pytest.raises(EnvironmentFailure, match="no space left"):
        write_stream(stream_of(*example()), path)
    assert os.listdir(path.parent) == []


def test_buffer_lies_on_the_file_system_of_the_output(path, tmp_path, monkeypatch):
    places = []
    real = temporary_buffer.tempfile.SpooledTemporaryFile

    def noting(*args, **more):
        places.append(more["dir"])
        return real(*args, **more)

    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target" / "net")
    (tmp_path / "target" / "net").write_bytes(b"")
    monkeypatch.setattr(temporary_buffer.tempfile, "SpooledTemporaryFile", noting)
    write_stream(stream_of(*example()), tmp_path / "link", force=True)
    assert places == [str(tmp_path / "target")]


def test_every_call_makes_the_same_items(path):
    stream = stream_of(*example())
    assert write_stream(stream, path).sha256 == write_stream(stream, path, force=True).sha256


SAME = {
    "zeros of both signs": (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])),
    "NaN": (torch.tensor([float("nan")]), torch.tensor([float("nan")])),
    "strided": (torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(2, 3).t().contiguous()),
    "empty": (torch.zeros(0, 3), torch.zeros(0, 3)),
    "float8": (torch.ones(3).to(torch.float8_e5m2), torch.ones(3).to(torch.float8_e5m2)),
}
OTHER = {
    "value": (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])),
    "shape": (torch.ones(2, 3), torch.ones(3, 2)),
    "type": (torch.zeros(2, dtype=torch.int32), torch.zeros(2)),
    "last of many": (torch.zeros(save._BLOCK + 1), torch.eye(1, save._BLOCK + 1).flip(1).reshape(-1)),
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME.keys())
def test_fingerprint_is_the_same_for_equal_tensors(one, other):
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER.keys())
def test_fingerprint_is_another_for_others(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_tied_are_names_of_the_same_memory():
    tensor = torch.arange(4)
    state = {"a": tensor, "b": tensor, "part": tensor[:2], "copy": tensor.clone(), "meta": tensor.to("meta")}
    assert tied_names(state, {}) == {"b": "a"}
    assert tied_names(state, {"b": RAW}) == {"a": "b"}
