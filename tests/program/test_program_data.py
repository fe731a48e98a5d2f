"""The data form: exact in both directions, and nothing but ArtifactError for what is not it."""

import contextlib
import copy
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import InputSpec, Preprocess, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import from_data, state_of, to_data

Data = dict[str, Any]
State = dict[str, Tensor]


class Net(nn.Module):
    """A little of everything that the data form has to carry."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
        self.head[2].weight = self.head[1].weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) * self.scale + self.shift
        y = F.pad(y, (1, 1, 1, 1), mode="constant", value=-math.inf).max(dim=-1).values[..., 1:-1, None]
        y = torch.cat([y, y.to(torch.float64).float()], dim=-1).expand(-1, -1, -1, 2)
        y = F.interpolate(y, [4, 4], mode="bilinear", align_corners=False)
        return self.head(y.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]


SPEC = InputSpec((3, 8, 8), Preprocess(9, 0.875, "bicubic", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 3))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    made = capture(Net(), SPEC, labels=["cat", "dog"], arch="builtin:net")
    made.history = ({"method": "quantize", "config": {"bits": 8, "layers": ["conv"]}},)
    return made


@pytest.fixture
def data(program: Program) -> Data:
    return json.loads(json.dumps(to_data(program), allow_nan=False))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def state(program: Program) -> State:
    return state_of(program)


def node(data: Data, name: str) -> Data:
    return next(n for n in data["nodes"] if n["name"] == name)


class TestRoundTrip:
    def test_everything_is_kept(self, program: Program, data: Data, state: State) -> None:
        again = from_data(data, state)
        assert to_data(again) == data
        assert again.code == program.code
        assert [n.name for n in again.graph.nodes] == [n.name for n in program.graph.nodes]
        assert (again.input, again.labels, again.arch) == (program.input, ("cat", "dog"), "builtin:net")
        assert again.history == program.history
        assert list(again.state_dict()) == list(program.state_dict())
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in program.named_parameters()]
        assert not any(module.training for module in again.modules())
        x = torch.randn(3, 3, 8, 8)
        assert torch.equal(again(x), program(x))

    def test_tensors_are_shared_with_the_state(self, data: Data, state: State) -> None:
        again = from_data(data, state)
        assert again.state_dict()["conv.weight"].data_ptr() == state["conv.weight"].data_ptr()
        assert again.get_submodule("head.1").weight is again.get_submodule("head.2").weight

    def test_tied_tensors_may_come_twice(self, program: Program, data: Data) -> None:
        from_data(data, program.state_dict())

    def test_deepcopy_of_a_reloaded_program(self, data: Data, state: State) -> None:
        again = copy.deepcopy(from_data(data, state))
        assert to_data(again) == data

    def test_same_program_gives_the_same_data(self, data: Data) -> None:
        torch.manual_seed(0)
        other = capture(Net(), SPEC, labels=["cat", "dog"], arch="builtin:net")
        other.history = ({"method": "quantize", "config": {"bits": 8, "layers": ["conv"]}},)
        assert json.dumps(to_data(other)) == json.dumps(data)

    def test_layer_with_an_infinite_hyperparameter(self) -> None:
        made = capture(nn.Sequential(nn.Hardtanh(0.0, math.inf)), InputSpec((2,)))
        text = json.dumps(to_data(made), allow_nan=False)
        assert from_data(json.loads(text), {}).get_submodule("0").max_val == math.inf

    def test_tensor_of_a_leaf_fetched_directly(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) @ self.fc.weight  # type: ignore[no-any-return]

        made = capture(Tied(), InputSpec((4,)))
        again = from_data(to_data(made), state_of(made))
        assert set(again.state_dict()) == {"fc.weight", "fc.bias"}
        x = torch.randn(2, 4)
        assert torch.equal(again(x), made(x))

    def test_parameter_of_whole_numbers(self) -> None:
        class Picks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.index = nn.Parameter(torch.tensor([2, 0]), requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return x[:, self.index]

        made = capture(Picks(), InputSpec((4,)))
        again = from_data(to_data(made), state_of(made))
        assert not again.get_parameter("index").requires_grad
        assert again(torch.eye(4)).shape == (4, 2)


class TestRefusedOnTheWayOut:
    def test_layer_not_on_the_list(self, program: Program) -> None:
        other = copy.deepcopy(program)
        other.set_submodule("conv", nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
        with pytest.raises(ArtifactError, match="Sequential has no form"):
            to_data(other)

    def test_function_not_on_the_list(self, program: Program) -> None:
        other = copy.deepcopy(program)
        next(n for n in other.graph.nodes if n.op == "call_function").target = torch.load
        with pytest.raises(ArtifactError, match="load"):
            to_data(other)

    @pytest.mark.parametrize("value", [1j, b"x", "; import os", {"a": 1}, torch.device("cuda"), 2**70])
    def test_argument_without_a_form(self, program: Program, value: Any) -> None:
        other = copy.deepcopy(program)
        target = next(n for n in other.graph.nodes if n.target is F.interpolate)
        target.kwargs = {**target.kwargs, "mode": value}
        with pytest.raises(ArtifactError):
            to_data(other)


Change = Any


def put(*path: Any) -> Any:
    """A change that sets data[path[0]][path[1]]... to the last item of ``path``."""

    def change(data: Data) -> None:
        *keys, last, value = path
        place: Any = data
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def in_node(which: str, /, **fields: Any) -> Any:
    return lambda data: node(data, which).update(fields)


EVIL = '__import__("os").system("touch /tmp/evil")'
X = {"node": "x"}
OTHER = {"shape": [4], "preprocess": None, "name": "y"}
HOSTILE: dict[str, Change] = {
    "node-name-is-code": in_node("conv", name=f"x={EVIL}"),
    "node-name-with-newline": in_node("conv", name="conv\n    import os"),
    "node-name-with-trailing-newline": in_node("conv", name="conv\n"),
    "node-name-is-keyword": in_node("conv", name="return"),
    "node-name-is-builtin": in_node("conv", name="getattr"),
    "node-name-is-self": in_node("conv", name="self"),
    "node-name-is-torch": in_node("conv", name="torch"),
    "node-name-is-dunder": in_node("conv", name="__class__"),
    "node-name-is-not-ascii": in_node("conv", name="cönv"),
    "node-name-is-long": in_node("conv", name="c" * 300),
    "node-name-is-taken": in_node("conv", name="x"),
    "node-name-is-a-number": in_node("conv", name=3),
    "placeholder-target-is-code": in_node("x", target=f"x={EVIL}"),
    "placeholder-with-default": in_node("x", args=[1]),
    "placeholder-starred": in_node("x", target="*x"),
    "module-target-is-code": in_node("conv", target=f'conv"){EVIL}#'),
    "module-target-with-newline": in_node("conv", target="conv\nimport os"),
    "module-target-unknown": in_node("conv", target="cnv"),
    "module-target-is-a-method-of-ours": in_node("conv", target="state_dict"),
    "module-path-is-code": lambda d: d["modules"].update({f'a", {EVIL}, "': d["modules"]["conv"]}),
    "module-path-with-dunder": lambda d: d["modules"].update({"a.__class__": d["modules"]["conv"]}),
    "module-path-is-ours": lambda d: d["modules"].update({"graph": d["modules"]["conv"]}),
    "module-path-empty": lambda d: d["modules"].update({"": d["modules"]["conv"]}),
    "module-path-with-empty-part": lambda d: d["modules"].update({"a..b": d["modules"]["conv"]}),
    "module-path-deep": lambda d: d["modules"].update({".".join("a" * 999): d["modules"]["conv"]}),
    "module-inside-a-leaf": lambda d: d["modules"].update({"conv.inner": d["modules"]["conv"]}),
    "module-not-used": lambda d: d["modules"].update(
        {"other": {"kind": "ReLU", "config": {"inplace": False}}}
    ),
    "module-missing": lambda d: d["modules"].pop("conv"),
    "kind-unknown": put("modules", "conv", "kind", "Conv9d"),
    "kind-is-a-path": put("modules", "conv", "kind", "subprocess.Popen"),
    "kind-is-a-list": put("modules", "conv", "kind", ["Conv2d"]),
    "config-extra-key": put("modules", "conv", "config", "device", "cuda"),
    "config-huge": put("modules", "conv", "config", "out_channels", 2**39),
    "config-negative": put("modules", "conv", "config", "groups", -1),
    "config-zero-groups": put("modules", "conv", "config", "groups", 0),
    "config-wrong-size": put("modules", "conv", "config", "out_channels", 8),
    "config-is-a-list": put("modules", "conv", "config", []),
    "function-unknown": in_node("mul", target="eval"),
    "function-dotted": in_node("mul", target="torch.utils.model_zoo.load_url"),
    "function-with-newline": in_node("mul", target="operator.mul\n"),
    "function-is-a-list": in_node("mul", target=["operator.mul"]),
    "operator-with-one-argument": in_node("mul", args=[X]),
    "operator-with-three-arguments": in_node("mul", args=[X, X, X]),
    "operator-with-keywords": in_node("mul", kwargs={"a": X}),
    "operator-without-nodes": in_node("mul", args=[1, 2]),
    "in-place-operator-on-a-number": in_node("mul", target="operator.iadd", args=[1, X]),
    "getattr-of-anything": in_node("mul", target="getattr", args=[X, "__class__"]),
    "getattr-of-data": in_node("mul", target="getattr", args=[X, "data"]),
    "getattr-with-default": in_node("mul", target="getattr", args=[X, "shape", 3]),
    "getattr-computed": in_node("mul", target="getattr", args=[X, X]),
    "getattr-unhashable": in_node("mul", target="getattr", args=[X, ["shape"]]),
    "method-unknown": in_node("contiguous", target="backward"),
    "method-is-code": in_node("contiguous", target=f"size(); {EVIL}; x.size"),
    "method-dunder": in_node("contiguous", target="__class__"),
    "method-of-a-number": in_node("contiguous", args=[3]),
    "method-of-a-string": in_node("contiguous", target="split", args=["a b"]),
    "method-without-object": in_node("contiguous", args=[]),
    "string-is-code": in_node("interpolate", kwargs={"mode": f"'); {EVIL}"}),
    "string-with-newline": in_node("interpolate", kwargs={"mode": "a\n"}),
    "string-long": in_node("interpolate", kwargs={"mode": "a" * 65}),
    "keyword-is-code": in_node("interpolate", kwargs={f"mode={EVIL}, x": 1}),
    "keyword-is-reserved": in_node("interpolate", kwargs={"lambda": 1}),
    "keyword-empty": in_node("interpolate", kwargs={"": 1}),
    "argument-unknown-tag": in_node("interpolate", kwargs={"mode": {"eval": EVIL}}),
    "argument-two-tags": in_node("interpolate", kwargs={"mode": {"float": "inf", "node": "x"}}),
    "argument-no-tag": in_node("interpolate", kwargs={"mode": {}}),
    "argument-unknown-dtype": in_node("to", args=[X, {"dtype": "quint8"}]),
    "argument-dtype-is-a-list": in_node("to", args=[X, {"dtype": ["float32"]}]),
    "argument-cuda": in_node("to", args=[X, {"device": "cuda"}]),
    "argument-slice-of-two": in_node("getitem", args=[X, {"slice": [1, 2]}]),
    "argument-slice-of-strings": in_node("getitem", args=[X, {"slice": ["a", "b", "c"]}]),
    "argument-tuple-of-nothing": in_node("getitem", args=[X, {"tuple": 3}]),
    "argument-huge-integer": in_node("getitem", args=[X, 2**64]),
    "argument-long": in_node("getitem", args=[X, [1] * 5000]),
    "node-later": in_node("conv", args=[{"node": "bn"}]),
    "node-itself": in_node("conv", args=[{"node": "conv"}]),
    "node-unknown": in_node("conv", args=[{"node": "y"}]),
    "node-unhashable": in_node("conv", args=[{"node": ["x"]}]),
    "op-unknown": in_node("conv", op="root"),
    "op-is-a-list": in_node("conv", op=["call_module"]),
    "nodes-empty": put("nodes", []),
    "nodes-only-input": lambda d: d.update(nodes=d["nodes"][:1]),
    "nodes-without-output": lambda d: d["nodes"].pop(),
    "nodes-without-input": lambda d: d["nodes"].pop(0),
    "nodes-two-inputs": lambda d: d["nodes"].insert(1, {**d["nodes"][0], "name": "y", "target": "y"}),
    "nodes-two-outputs": lambda d: d["nodes"].append({**d["nodes"][-1], "name": "output_1"}),
    "nodes-reversed": lambda d: d["nodes"].reverse(),
    "nodes-a-million": lambda d: d.update(nodes=d["nodes"] * 50_000),
    "node-without-kwargs": lambda d: d["nodes"][1].pop("kwargs"),
    "node-with-extra-key": lambda d: d["nodes"][1].update(type="int"),
    "node-is-a-string": lambda d: d["nodes"].insert(1, EVIL),
    "output-of-nothing": in_node("output", args=[[None]]),
    "output-empty": in_node("output", args=[{"dict": []}]),
    "output-dict-of-no-pairs": in_node("output", args=[{"dict": [["a", X, X]]}]),
    "output-dict-of-an-object": in_node("output", args=[{"dict": {"a": X}}]),
    "output-name-twice": in_node("output", args=[{"dict": [["a", X], ["a", X]]}]),
    "output-name-is-a-number": in_node("output", args=[{"dict": [[1, X]]}]),
    "output-of-two": in_node("output", args=[X, X]),
    "output-named": in_node("output", kwargs={"out": X}),
    "output-with-a-string": in_node("output", args=[[X, "a"]]),
    "output-with-a-slice": in_node("output", args=[[X, {"slice": [0, 1, 1]}]]),
    "output-key-is-code": in_node("output", args=[{"dict": [[f"'{EVIL}", X]]}]),
    "output-key-with-newline": in_node("output", args=[{"dict": [["a\n", X]]}]),
    "output-key-is-long": in_node("output", args=[{"dict": [["a" * 100, X]]}]),
    "output-dict-is-a-list": in_node("output", args=[{"dict": [X]}]),
    "output-tuple-is-a-node": in_node("output", args=[{"tuple": X}]),
    "output-too-deep": in_node("output", args=[[[[[[[[[[X]]]]]]]]]]),
    "output-too-long": in_node("output", args=[[X] * 5000]),
    "output-of-a-later-node": in_node("output", args=[{"dict": [["a", {"node": "output"}]]}]),
    "output-tag-unknown": in_node("output", args=[{"set": [X]}]),
    "output-is-a-number": in_node("output", args=[3]),
    "attribute-kind-unknown": put("attributes", "scale", "module"),
    "attribute-inside-a-leaf": lambda d: d["attributes"].update({"conv.weight": "parameter"}),
    "attribute-is-also-a-layer": lambda d: d["attributes"].update({"conv": "buffer"}),
    "attribute-fetched-with-arguments": in_node("scale", args=[1]),
    "attribute-that-does-not-exist": in_node("scale", target="conv.nothing"),
    "attribute-is-an-int-parameter": put("attributes", "bn.num_batches_tracked", "parameter"),
    "tensor-shape-wrong": put("tensors", "scale", "shape", [4, 1]),
    "tensor-shape-of-booleans": put("tensors", "scale", "shape", [4, True, True]),
    "tensor-shape-negative": put("tensors", "scale", "shape", [-4, 1, 1]),
    "tensor-type-wrong": put("tensors", "scale", "dtype", "float16"),
    "tensor-type-unknown": put("tensors", "scale", "dtype", "float33"),
    "tensor-type-unhashable": put("tensors", "scale", "dtype", ["float32"]),
    "tensor-not-there": lambda d: d["tensors"].update(extra={"dtype": "float32", "shape": [1]}),
    "tensor-not-listed": lambda d: d["tensors"].pop("scale"),
    "tied-to-nothing": put("tied", "head.2.weight", "nothing"),
    "tied-to-itself": put("tied", "head.2.weight", "head.2.weight"),
    "tied-to-another-shape": put("tied", "head.2.weight", "conv.weight"),
    "tied-to-a-list": put("tied", "head.2.weight", ["head.1.weight"]),
    "tied-missing": put("tied", {}),
    "tied-extra": put("tied", "head.3.weight", "head.1.weight"),
    "input-shape-empty": put("input", "shape", []),
    "input-shape-negative": put("input", "shape", [3, -8, 8]),
    "input-shape-float": put("input", "shape", [3.0, 8, 8]),
    "input-shape-huge": put("input", "shape", [3, 10**9, 8]),
    "input-missing": lambda d: d.pop("input"),
    "input-name-is-code": put("input", "name", f"x={EVIL}"),
    "input-name-is-self": put("input", "name", "self"),
    "input-name-is-getattr": put("input", "name", "getattr"),
    "input-name-is-a-number": put("input", "name", 3),
    "input-free-is-no-list": put("input", "free", 1),
    "input-free-outside": put("input", "free", [3]),
    "input-free-negative": put("input", "free", [-1]),
    "input-free-true": put("input", "free", [True]),
    "input-free-twice": put("input", "free", [1, 1]),
    "input-others-are-an-object": put("input", "others", {}),
    "input-that-the-graph-has-not": put("input", "others", [OTHER]),
    "input-twice": put("input", "others", [OTHER | {"name": "x"}]),
    "input-with-an-odd-key": put("input", "others", [OTHER | {"gamma": 2}]),
    "input-with-others-of-its-own": put("input", "others", [OTHER | {"others": []}]),
    "inputs-a-million": put("input", "others", [OTHER] * 1000),
    "inputs-named-otherwise": lambda d: (
        put("input", "others", [OTHER])(d),
        d["nodes"].insert(1, {**d["nodes"][0], "name": "z", "target": "z"}),
    ),
    "mean-of-two": put("input", "preprocess", "mean", [0.1, 0.2]),
    "mean-nan": put("input", "preprocess", "mean", [math.nan, 0.2, 0.3]),
    "mean-text": put("input", "preprocess", "mean", "abc"),
    "std-zero": put("input", "preprocess", "std", [0.0, 0.2, 0.3]),
    "std-negative": put("input", "preprocess", "std", [0.1, -0.2, 0.3]),
    "crop-nothing": put("input", "preprocess", "crop", 0.0),
    "crop-nan": put("input", "preprocess", "crop", math.nan),
    "resize-true": put("input", "preprocess", "resize", True),
    "resize-three": put("input", "preprocess", "resize", [1, 2, 3]),
    "interpolation-unknown": put("input", "preprocess", "interpolation", "lanczos"),
    "interpolation-unhashable": put("input", "preprocess", "interpolation", ["nearest"]),
    "channels-two": put("input", "preprocess", "channels", 2),
    "preprocess-extra": put("input", "preprocess", "gamma", 2),
    "labels-number": put("labels", [1]),
    "labels-text": put("labels", "cat"),
    "arch-number": put("arch", 3),
    "history-text": put("history", ["x"]),
    "history-nan": put("history", [{"x": math.nan}]),
    "extra-key": put("extra", 1),
    "missing-key": lambda d: d.pop("tied"),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in HOSTILE.items()])
def test_hostile_data(data: Data, state: State, change: Change) -> None:
    change(data)
    started = time.perf_counter()
    with pytest.raises(ArtifactError) as caught:
        from_data(data, state)
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 1000


HOSTILE_PATHS = [
    f'a", {EVIL}, "',
    'a"b',
    "a'b",
    "a b",
    "a\nb",
    "conv\n",
    "",
    ".",
    "a..b",
    "a.",
    "ä",
    "__class__",
    "a.__dict__",
    "graph",
    "state_dict",
    "training",
    "input.a",
    "forward.a",
    "_modules",
    "_code",
    "_graph",
    "_tracer_cls",
    "meta",
    "head.1.inner",
    "a" * 201,
    ".".join("a" * 40),
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_layer_at_a_hostile_path(data: Data, state: State, path: str) -> None:
    """Renamed everywhere, so that nothing but the path itself is wrong."""
    data["modules"] = {path if key == "conv" else key: value for key, value in data["modules"].items()}
    for part in ("weight", "bias"):
        data["tensors"][f"{path}.{part}"] = data["tensors"].pop(f"conv.{part}")
        state = {f"{path}.{part}" if key == f"conv.{part}" else key: value for key, value in state.items()}
    node(data, "conv")["target"] = path
    with pytest.raises(ArtifactError, match="layer"):
        from_data(data, state)


def test_layer_at_another_good_path(data: Data, state: State) -> None:
    text = json.dumps(data).replace('"conv', '"stem-1.0')
    text = text.replace('"name": "stem-1.0"', '"name": "conv"').replace(
        '"node": "stem-1.0"', '"node": "conv"'
    )
    again = from_data(json.loads(text), {k.replace("conv", "stem-1.0"): v for k, v in state.items()})
    assert again.get_submodule("stem-1.0").kernel_size == (3, 3)


def nested(depth: int, tag: str | None) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if tag is None else {tag: [value]}
    return value


@pytest.mark.parametrize("tag", [None, "tuple", "slice", "node", "float"])
def test_depth_bomb_in_arguments(data: Data, state: State, tag: str | None) -> None:
    node(data, "conv")["args"] = [{"node": "x"}, nested(5000, tag)]
    with pytest.raises(ArtifactError):
        from_data(data, state)


@pytest.mark.parametrize(
    "key", ["history", "labels", "modules", "tensors", "nodes", "input", "tied", "attributes"]
)
def test_depth_bomb_elsewhere(data: Data, state: State, key: str) -> None:
    bomb = nested(5000, "a")
    data[key] = [bomb] if isinstance(data[key], list) else {"a": bomb}
    with pytest.raises(ArtifactError):
        from_data(data, state)


def test_depth_bomb_in_hyperparameters(data: Data, state: State) -> None:
    data["modules"]["conv"] = {"kind": "QuantizedConv2d", "config": {"a": nested(5000, None)}}
    with pytest.raises(ArtifactError):
        from_data(data, state)


@pytest.mark.parametrize("name", ["conv.weight", "head.1.bias", "shift"])
def test_missing_extra_and_misshapen_tensors(data: Data, state: State, name: str) -> None:
    for wrong in (
        {k: v for k, v in state.items() if k != name},
        {**state, "extra": torch.zeros(1)},
        {**state, name: state[name][:1]},
        {**state, name: state[name].double()},
        {**state, name: state[name].to(torch.int8)},
    ):
        with pytest.raises(ArtifactError):
            from_data(data, wrong)


def test_tied_tensors_that_differ(data: Data, state: State) -> None:
    with pytest.raises(ArtifactError, match="tied tensors differ"):
        from_data(data, {**state, "head.2.weight": state["head.1.weight"] + 1})


def test_data_and_tensors_that_lie_together(data: Data, state: State) -> None:
    data["tensors"]["conv.weight"]["shape"] = [4, 3, 1, 1]
    with pytest.raises(ArtifactError, match="does not fit"):
        from_data(data, {**state, "conv.weight": torch.zeros(4, 3, 1, 1)})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


WORDS = ["x", "conv", "torch.cat", "operator.mul", "getattr", "shape", "Conv2d", "float32", "output"]
TAGS = ["node", "tuple", "slice", "float", "dtype", "a", "conv"]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2**31, 2**62])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=8)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TAGS), inner, max_size=2),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_mutated_data_is_refused_or_builds(program: Program, state: State, choice: st.DataObject) -> None:
    data = json.loads(json.dumps(to_data(program)))
    for _ in range(choice.draw(st.integers(1, 3))):
        *path, key = choice.draw(st.sampled_from([p for p in places(data) if p]))
        place = data
        for part in path:
            place = place[part]
        action = choice.draw(st.sampled_from(["replace", "remove", "duplicate"]))
        if action == "replace":
            place[key] = choice.draw(JUNK)
        elif action == "remove":
            del place[key]
        elif isinstance(place, list):
            place.insert(key, copy.deepcopy(place[key]))
        else:
            place[choice.draw(st.text("ab._1", min_size=1, max_size=5))] = copy.deepcopy(place[key])
    with contextlib.suppress(ArtifactError):
        json.dumps(to_data(from_data(data, state)))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JUNK)
def test_junk_is_refused(state: State, junk: Any) -> None:
    with pytest.raises(ArtifactError):
        from_data(junk, state)


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_a_program_of_whole_numbers_comes_back(dtype: Any) -> None:
    network = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    program = capture(network, InputSpec((3,), dtype=dtype))
    back = from_data(to_data(program), state_of(program))
    x = torch.tensor([[1, 2, 9]], dtype=getattr(torch, dtype))
    assert torch.equal(back(x), program(x))
