"""Checkpoints of several files, safetensors and .pt2."""

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modelopt_cli.artifact import lazy
from modelopt_cli.checkpoint import open_model, read_state
from modelopt_cli.errors import CheckpointError

Refusal = Callable[[Path], str]
State = dict[str, torch.Tensor]


def same(one: Mapping[str, torch.Tensor], other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write_shards(folder: Path, state: State, suffix: str) -> Path:
    names = list(state)
    shards = {f"part-{i}{suffix}": names[i::2] for i in range(2)}
    for shard, members in shards.items():
        part = {name: state[name] for name in members}
        save_file(part, folder / shard) if suffix == ".safetensors" else torch.save(part, folder / shard)
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    index = {"metadata": {}, "weight_map": {n: shard for shard, members in shards.items() for n in members}}
    (folder / f"{stem}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.index.json"


def test_safetensors(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_state(tmp_path / "a.safetensors")
    assert same(found.state, state)
    assert found.source == "safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder(name: str, state: State, tmp_path: Path) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "num_classes": 10}')
    found = read_state(tmp_path)
    assert same(found.state, state)
    assert found.arch == "timm:resnet18?num_classes=10"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("by", ["folder", "index"])
def test_shards(suffix: str, by: str, state: State, tmp_path: Path) -> None:
    index = write_shards(tmp_path, state, suffix)
    found = read_state(tmp_path if by == "folder" else index)
    assert same(found.state, state)
    assert found.source == "sharded"
    files = [index, tmp_path / f"part-0{suffix}", tmp_path / f"part-1{suffix}"]
    lines = sorted((f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files)
    text = "".join(f"{digest}  {name}\n" for name, digest in lines)
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


BROKEN = {
    "outside the folder": ({"weight_map": {"w": "../x.safetensors"}}, "outside its folder"),
    "absolute": ({"weight_map": {"w": "/etc/passwd"}}, "outside its folder"),
    "missing shard": ({"weight_map": {"w": "part-9.safetensors"}}, "is missing"),
    "missing tensor": ({"weight_map": {"nope": "part-0.safetensors"}}, "shard has no 'nope'"),
    "itself": ({"weight_map": {"w": "model.safetensors.index.json"}}, "is an index"),
    "no map": ({"weights": {}}, "has no weight_map"),
    "numbers": ({"weight_map": {"w": 3}}, "has no weight_map"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_index(kind: str, state: State, tmp_path: Path) -> None:
    index = write_shards(tmp_path, state, ".safetensors")
    content, words = BROKEN[kind]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        read_state(tmp_path)


@pytest.mark.parametrize("text", ["{", "{" * 100_000, "[]", '{"weight_map": '])
def test_an_index_that_is_not_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_state(tmp_path)


def test_a_folder_with_other_files_names_them(state: State, tmp_path: Path, refusal: Refusal) -> None:
    torch.save(state, tmp_path / "last.pth")
    assert "pass one of its files: last.pth" in refusal(tmp_path)


def test_an_empty_folder(tmp_path: Path, refusal: Refusal) -> None:
    assert "is a folder without" in refusal(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    path = tmp_path_factory.mktemp("pt2") / "a.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3, 8, 8),)), path)
    return path, dict(module.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_pt2_gives_its_weights(exported: tuple[Path, State]) -> None:
    path, state = exported
    found = read_state(path)
    assert found.source == "pt2"
    assert same(found.state, state)


def test_pt2_with_pickled_weights_is_refused(
    exported: tuple[Path, State], tmp_path: Path, refusal: Refusal
) -> None:
    data = exported[0].read_bytes()
    flagged = data.replace(b'"use_pickle": false', b'"use_pickle":  true')
    assert flagged != data
    (tmp_path / "a.pt2").write_bytes(flagged)  # the CRC no longer fits either
    refusal(tmp_path / "a.pt2")


@pytest.mark.parametrize(
    ("old", "new"), [(b'"as_int": 27', b'"as_int": 00'), (b'"as_int": 4}', b'"as_int": 9}')]
)
def test_pt2_whose_sizes_lie(
    old: bytes, new: bytes, exported: tuple[Path, State], tmp_path: Path, refusal: Refusal
) -> None:
    import zipfile

    with zipfile.ZipFile(exported[0]) as source, zipfile.ZipFile(tmp_path / "a.pt2", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(old, new))
    refusal(tmp_path / "a.pt2")


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_safetensors_stay_in_their_files(
    sharded: bool, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()} | {
        "module.total_ops": torch.ones(1)
    }
    path = tmp_path / "model.safetensors"
    path = write_shards(tmp_path, wrapped, ".safetensors") if sharded else path
    if not sharded:
        save_file(wrapped, path)
    read = lazy.read_tensor
    monkeypatch.setattr(lazy, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    found = read_state(path)
    assert found.state.keys() == state.keys()
    assert {n: t.shape for n, t in lazy.described(found.state).items()} == {
        n: t.shape for n, t in state.items()
    }
    assert found.notes == ("left aside, not tensors of the network: module.total_ops",)
    monkeypatch.setattr(lazy, "read_tensor", read)
    assert same(dict(found.state), state)


def test_type_that_is_not_supported_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.uint16)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'b' is uint16, which is not supported"):
        read_state(tmp_path / "a.safetensors")


def test_opening_what_nobody_recognises_holds_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"{i}.weight": torch.ones(3, 4) for i in range(8)}, tmp_path / "a.safetensors")
    alive: list[weakref.ref[torch.Tensor]] = []
    read = lazy.read_tensor

    def counting(*arguments: Any) -> torch.Tensor:
        assert not any(reference() is not None for reference in alive)
        tensor = read(*arguments)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(lazy, "read_tensor", counting)
    opened = open_model(tmp_path / "a.safetensors")
    assert len(alive) == 8  # each was looked at for NaN
    assert opened.tensor_bytes == 8 * 48
