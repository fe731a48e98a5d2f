"""Weights next to objects, and in whole pickled networks: read without importing or calling anything."""

import argparse
import collections
import copy
import datetime
import enum
import functools
import io
import pathlib
import pickle
import pickletools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modelopt_cli.checkpoint import read_state
from modelopt_cli.checkpoint.standins import survey
from modelopt_cli.errors import CheckpointError

State = dict[str, torch.Tensor]
FORMATS = {"zip": True, "legacy": False}


class Mapping(dict[str, object]):
    pass


class Items(list[object]):
    pass


class Colour(enum.Enum):
    RED = 1


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


OBJECTS: dict[str, object] = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, layers=[1, 2]),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(6).reshape(2, 3),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "subclass of dict": Mapping(a=1),
    "subclass of list": Items([1, 2]),
    "partial function": functools.partial(print, end=""),
    "path": pathlib.PurePosixPath("/x"),
    "date": datetime.timedelta(1),
    "enum": Colour.RED,
    "as a key": {Colour.RED: 1},
    "in a set": {Colour.RED},
    "slots": Slots(),
    "bound method": Mapping().keys,
    "class": Colour,
}


class Net(nn.Module):
    """Everything of a module that decides what is in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        self.again = self.body[0]
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_parameter("none", None)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.arange(4), persistent=False)
        self.config = argparse.Namespace(width=2)


def save(obj: object, path: Path, kind: str = "zip") -> Path:
    torch.save(obj, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def same(found: State, want: State) -> bool:
    return list(found) == list(want) and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_next_to_the_weights_does_not_stand_in_their_way(
    name: str, kind: str, state: State, tmp_path: Path
) -> None:
    with_args = read_state(save({"args": OBJECTS[name], "model": state}, tmp_path / "a.pth", kind))
    assert same(with_args.state, state)
    among = read_state(save({**state, "extra": OBJECTS[name]}, tmp_path / "b.pth", kind))
    assert same(among.state, state)
    assert among.notes == ("left aside, not tensors of the network: extra",)


def test_weights_in_a_dict_of_their_own_kind(state: State, tmp_path: Path) -> None:
    assert same(read_state(save(Mapping(model=Mapping(state)), tmp_path / "a.pth")).state, state)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: {"model": m, "ema": m, "step": 1}])
def test_a_whole_network_gives_the_weights_of_its_state_dict(
    wrap: Callable[[nn.Module], object], kind: str, tmp_path: Path
) -> None:
    network = Net()
    found = read_state(save(wrap(network), tmp_path / "a.pth", kind))
    assert same(found.state, dict(network.state_dict()))
    assert "pickled" in found.notes[0]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_network_of_torchvision_is_recognised(kind: str, tmp_path: Path) -> None:
    from torchvision import models

    from modelopt_cli.checkpoint import recognise

    network = models.mobilenet_v3_small(num_classes=7)  # holds partial functions
    found = read_state(save(network, tmp_path / "a.pth", kind))
    architecture = recognise(found.state)
    assert architecture is not None
    assert architecture.spec == "torchvision:mobilenet_v3_small?num_classes=7"


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_that_a_file_names_is_imported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lurking.py").write_text(
        f"import torch\nopen({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "class Thing:\n    def __setstate__(self, s): raise SystemExit\n"
        "    def __getstate__(self): return 1\n"
        "class Net(torch.nn.Linear):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    lurking = __import__("lurking")
    network = lurking.Net(3, 2)
    want = copy.deepcopy(dict(network.state_dict()))
    path = save({"thing": lurking.Thing(), "model": network}, tmp_path / "a.pth", kind)
    del sys.modules["lurking"]
    (tmp_path / "imported").unlink()
    assert same(read_state(path).state, want)
    assert "lurking" not in sys.modules
    assert not (tmp_path / "imported").exists()


class Calls:
    """Its pickle calls a function with arguments."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "function",
    [torch.hub.load, torch.load, nn.Module.load_state_dict, pathlib.Path.unlink, np.load],
    ids=["torch.hub.load", "torch.load", "load_state_dict", "unlink", "numpy.load"],
)
def test_nothing_that_a_file_names_is_called(
    function: object, kind: str, state: State, tmp_path: Path
) -> None:
    """Functions that no list of dangerous ones has."""
    (tmp_path / "there").write_text("")
    saved = {"model": state, "extra": Calls(function, Calls(pathlib.Path, str(tmp_path / "there")))}
    try:
        found = read_state(save(saved, tmp_path / "a.pth", kind))
    except CheckpointError:
        pass
    else:
        assert same(found.state, state)
    assert (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "function",
    [
        "builtins eval",
        "builtins exec",
        "builtins __import__",
        "__builtin__ eval",
        "os system",
        "runpy run_path",
    ],
)
def test_what_a_pickle_names_only_to_run_code_is_refused(function: str, tmp_path: Path) -> None:
    payload = b"\x80\x02}X\x01\x00\x00\x00xc" + function.replace(" ", "\n").encode() + b"\n)Rs."
    path = save({"w": torch.ones(2)}, tmp_path / "a.pth")
    import zipfile

    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "evil.pth", "w") as new:
        for entry in old.infolist():
            content = payload if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(entry.filename, content)
    with pytest.raises(CheckpointError, match=r"asks to call .* was not run"):
        read_state(tmp_path / "evil.pth")


def test_modules_that_contain_each_other_are_refused(tmp_path: Path) -> None:
    loop = nn.Sequential(nn.Linear(1, 1))
    loop._modules["self"] = loop
    wide = nn.Sequential(nn.Linear(1, 1))
    for _ in range(40):
        wide = nn.Sequential(wide, wide)
    for network in (loop, wide):
        with pytest.raises(CheckpointError, match="contain each other"):
            read_state(save(network, tmp_path / "a.pth"))


def test_too_many_names_are_refused_before_they_cost_anything(tmp_path: Path) -> None:
    saved = {"model": {"w": torch.ones(1)}, "x": [type(f"C{i}", (), {"__module__": "m"}) for i in range(300)]}
    module = type(sys)("m")
    for cls in saved["x"]:
        setattr(module, cls.__name__, cls)
    sys.modules["m"] = module
    try:
        path = save(saved, tmp_path / "a.pth")
    finally:
        del sys.modules["m"]
    with pytest.raises(CheckpointError, match=r"holds an? m\.C0"):
        read_state(path)


def test_stand_ins_are_gone_after_reading(state: State, tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    read_state(save({"model": state, "a": argparse.Namespace()}, tmp_path / "a.pth"))
    assert torch.serialization.get_safe_globals() == before


def test_the_survey_takes_time_in_proportion_to_the_file() -> None:
    def seconds(count: int) -> float:
        content = pickle.dumps({i: (i, {"a": [1, 2]}, (1, 2, 3, 4)) for i in range(count)}, protocol=2)
        start = time.process_time()
        survey(io.BytesIO(content))
        return time.process_time() - start

    seconds(1000)
    assert seconds(40_000) < 10 * max(seconds(10_000), 0.02)  # 16 times, if it went by the square


def test_the_survey_knows_every_instruction_torch_reads() -> None:
    """The survey follows instructions by pickletools' table; one that torch reads must be in it."""
    import torch._weights_only_unpickler as unpickler

    codes = {op.code for op in pickletools.opcodes}
    used = {
        value.decode("latin1")
        for name, value in vars(unpickler).items()
        if isinstance(value, bytes) and len(value) == 1 and name.isupper()
    }
    assert used <= codes
