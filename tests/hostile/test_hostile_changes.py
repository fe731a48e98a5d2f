"""Files that are changed or replaced while they are read: one state of them, or an error."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from modelopt_cli import artifact
from modelopt_cli.checkpoint import open_model
from modelopt_cli.checkpoint.state_file import read_state
from modelopt_cli.errors import ArtifactError, CheckpointError

OLD, NEW = ({f"w{i}": torch.full((4,), value) for i in range(3)} for value in (1.0, 2.0))


def safetensors(state, folder):
    save_file(state, folder / "m.safetensors")
    return folder / "m.safetensors"


def sharded(state, folder):
    for name, tensor in state.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_only(state, folder):
    artifact.write_tensors(state, {}, folder / "a.safetensors", force=True)
    return folder / "a.safetensors"


LAZY = {"safetensors": safetensors, "sharded": sharded, "artifact": tensors_only}


def rewrite(path, data):
    """In place, with another time of change even where the clock is coarse."""
    time.sleep(0.01)
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
def test_file_written_into_is_refused_at_the_next_look(tmp_path, make):
    opened = open_model(make(OLD, tmp_path))
    assert torch.equal(opened.state["w0"], OLD["w0"])
    for file in tmp_path.glob("*.safetensors"):
        rewrite(file, file.read_bytes())
    with pytest.raises((CheckpointError, ArtifactError), match="was changed while it was read"):
        _ = opened.state["w1"]


@pytest.mark.parametrize("make", [safetensors, tensors_only])
def test_file_replaced_as_a_whole_is_read_as_it_was(tmp_path, make):
    """Whoever writes whole files takes care; what was opened stays what it was, and the digest says which."""
    (tmp_path / "new").mkdir()
    path, new = make(OLD, tmp_path), make(NEW, tmp_path / "new")
    opened = open_model(path)
    before = opened.source_sha256
    os.replace(new, path)
    assert all(torch.equal(opened.state[name], OLD[name]) for name in OLD)
    assert open_model(path).source_sha256 != before


def test_folder_written_anew_never_gives_old_and_new_tensors(tmp_path):
    (tmp_path / "new").mkdir()
    state = open_model(sharded(OLD, tmp_path)).state
    assert torch.equal(state["w0"], OLD["w0"])
    os.replace(sharded(NEW, tmp_path / "new") / "w2.safetensors", tmp_path / "w2.safetensors")
    with pytest.raises(CheckpointError, match=r"w2.safetensors: was changed while it was read"):
        _ = state["w1"]


def test_shard_replaced_between_two_is_seen(tmp_path, monkeypatch):
    """The first shard is read, the writer replaces all, the second shard is read."""
    from modelopt_cli.checkpoint import state_file

    folder, original, seen = sharded(OLD, tmp_path), state_file._read_file, []

    def interrupted(path):
        if len(seen) == 2:
            (tmp_path / "new").mkdir()
            for file in sharded(NEW, tmp_path / "new").iterdir():
                os.replace(file, folder / file.name)
        seen.append(path)
        return original(path)

    monkeypatch.setattr(state_file, "_read_file", interrupted)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        read_state(folder)


@pytest.mark.parametrize("legacy", [True, False])
def test_pickle_written_into_while_torch_reads_it_is_refused(tmp_path, monkeypatch, legacy):
    from modelopt_cli.checkpoint import state_file

    path, original = tmp_path / "m.pth", state_file.load_object
    torch.save(OLD, path, _use_new_zipfile_serialization=not legacy)

    def interrupted(handle, *rest):
        found = original(handle, *rest)
        rewrite(path, path.read_bytes())
        return found

    monkeypatch.setattr(state_file, "load_object", interrupted)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        read_state(path)


def test_digest_is_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    from modelopt_cli.checkpoint import state_file

    path, other = tmp_path / "m.pth", tmp_path / "other"
    torch.save(OLD, path)
    torch.save(NEW, other)
    before = read_state(path).sha256
    original = state_file.load_object

    def replaced(handle, *rest):
        found = original(handle, *rest)
        os.replace(other, path)
        return found

    monkeypatch.setattr(state_file, "load_object", replaced)
    found = read_state(path)
    assert torch.equal(found.state["w0"], OLD["w0"])
    assert found.sha256 == before
