"""State dicts that stay in their files."""

import pytest
import safetensors.torch
import torch

from modelopt_cli.artifact import lazy, open_tensors, read_tensors, write_tensors
from modelopt_cli.artifact.lazy import LazyState, described, gather, open_safetensors
from modelopt_cli.errors import ArtifactError, CheckpointError
from modelopt_cli.program import Encoding

STATE = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4).bfloat16(), "n": torch.tensor(7)}


@pytest.fixture
def path(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_holds_what_the_file_holds(path):
    state = open_safetensors(path)
    assert state.keys() == STATE.keys()
    assert len(state) == 3
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    assert "c" not in state
    with pytest.raises(KeyError):
        state["c"]


def test_types_and_shapes_are_known_without_reading(path, monkeypatch):
    monkeypatch.setattr(lazy, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    for name, tensor in described(open_safetensors(path)).items():
        assert tensor.is_meta
        assert (tensor.dtype, tensor.shape) == (STATE[name].dtype, STATE[name].shape)
    assert described(STATE) is STATE


def test_every_look_up_gives_memory_of_its_own(path):
    state = open_safetensors(path)
    state["b"].zero_()
    assert torch.equal(state["b"], STATE["b"])


def test_renamed_tensors_are_found_under_their_new_names_only(path):
    state = open_safetensors(path).renamed({"x": "b", "n": "n"})
    assert list(state) == ["x", "n"]
    assert torch.equal(state["x"], STATE["b"])
    assert state.described()["x"].shape == (2, 3)
    assert "b" not in state


def test_gathered_states_are_lazy_if_all_are(path):
    first = open_safetensors(path)
    both = gather({"b": "1", "c": "2"}, {"1": first, "2": first.renamed({"c": "n"})})
    assert isinstance(both, LazyState)
    assert list(both) == ["b", "c"]
    assert both["c"] == 7
    mixed = gather({"b": "1", "c": "2"}, {"1": first, "2": {"c": torch.tensor(8)}})
    assert isinstance(mixed, dict)
    assert mixed["c"] == 8


def test_file_that_became_shorter_is_an_error(path):
    state = open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"was changed while it was read|became shorter"):
        [state[name] for name in state]


@pytest.mark.parametrize("code", ["plain", "entropy"])
def test_opened_artifact_holds_what_is_read_whole(tmp_path, code):
    scale, shared = torch.tensor([0.5, 2.0]), torch.arange(3)
    weight = torch.tensor([[0.5, -3.0], [4.0, 0.0]])
    encoding = Encoding("affine", {"bits": 8, "axis": 0, "group": None}, {"scale": scale})
    state = {"l.weight": weight, "first": shared, "second": shared}
    path = write_tensors(
        state, {"l.weight": encoding}, tmp_path / "net", history=[{"method": "m"}], arch="x", code=code
    ).path
    whole, opened = read_tensors(path), open_tensors(path)
    assert isinstance(opened.state, LazyState)
    assert list(opened.state) == list(whole.state) == ["l.weight", "first", "second"]
    assert all(torch.equal(opened.state[name], tensor) for name, tensor in whole.state.items())
    assert opened.encodings.keys() == whole.encodings.keys() == {"l.weight"}
    found = opened.encodings["l.weight"]
    assert (found.codec, found.params) == ("affine", encoding.params)
    assert torch.equal(found.parts["scale"], scale)
    assert (opened.history, opened.arch) == (whole.history, whole.arch)


def test_damaged_artifact_is_refused_when_it_is_opened(tmp_path):
    path = write_tensors(STATE, {}, tmp_path / "net").path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="digest"):
        open_tensors(path)


def test_artifact_whose_header_was_written_again_is_no_checkpoint(tmp_path):
    """Other tools keep the metadata but not its place, so that no digest guards the file any more."""
    write_tensors({"w": torch.ones(4)}, {}, tmp_path / "mine")
    with safetensors.safe_open(tmp_path / "mine", "pt") as file:
        metadata = {"format": "pt", **file.metadata()}
    safetensors.torch.save_file({"w": torch.zeros(4)}, tmp_path / "theirs", metadata)
    with pytest.raises(CheckpointError, match="written again"):
        open_safetensors(tmp_path / "theirs")
