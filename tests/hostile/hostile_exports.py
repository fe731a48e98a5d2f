"""Archives of ``torch.export`` whose graph asks for too much, refers to nothing, or is no graph at all."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

Document = dict[str, Any]
MODEL = "models/model.json"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.fc(x).relu()
        return {"y": y.reshape(x.shape[0], 2, 2), "sum": y.sum(1) * torch.tensor([2.0])}


@cache
def good_export() -> bytes:
    """A small archive that is in order."""
    file = io.BytesIO()
    sizes = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(_Net().eval(), (torch.rand(2, 6),), dynamic_shapes=sizes), file)
    return file.getvalue()


@cache
def _good_document() -> str:
    with zipfile.ZipFile(io.BytesIO(good_export())) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith(MODEL))
        return archive.read(entry).decode()


def good_document() -> Document:
    """The graph in it."""
    document: Document = json.loads(_good_document())
    return document


def with_entries(changed: dict[str, bytes]) -> bytes:
    """The archive with other contents of entries, whose names end so; new ones are added as they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good_export())) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            ends = next((end for end in changed if entry.filename.endswith(end)), None)
            new.writestr(entry.filename, old.read(entry) if ends is None else changed[ends])
        for name in changed.keys() - {end for end in changed for e in old.namelist() if e.endswith(end)}:
            new.writestr(name, changed[name])
    return file.getvalue()


def exporting(document: Document | bytes) -> bytes:
    """The archive with this graph."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return with_entries({MODEL: text})


def _graph(document: Document) -> Document:
    graph: Document = document["graph_module"]["graph"]
    return graph


def _node(target: str, output: str, **arguments: Any) -> Document:
    inputs = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]
    outputs = [{"as_tensor": {"name": output}}]
    return {"target": target, "inputs": inputs, "outputs": outputs, "metadata": {}, "name": output}


def _added(*nodes: Document) -> Callable[[Document], None]:
    """More nodes at the end, the last of which is returned."""

    def change(document: Document) -> None:
        _graph(document)["nodes"] += nodes
        _graph(document)["outputs"][0] = {"as_tensor": {"name": nodes[-1]["name"]}}

    return change


def _set(*path: Any) -> Callable[[Document], None]:
    """A value at a path; the last of the arguments is the value."""
    *above, key, value = path

    def change(document: Document) -> None:
        inner: Any = document["graph_module"]
        for part in above:
            inner = inner[part]
        inner[key] = value

    return change


def _meta(**fields: Any) -> Callable[[Document], None]:
    return lambda document: _graph(document)["tensor_values"]["x"].update(fields)


def _first(**fields: Any) -> Callable[[Document], None]:
    return lambda document: _graph(document)["nodes"][0].update(fields)


X = {"as_tensor": {"name": "x"}}
ATEN = "torch.ops.aten."
_FULL = _node(f"{ATEN}full.default", "big", size={"as_ints": [2**20, 2**20]}, fill_value={"as_float": 1.0})
_TREE = {"type": None, "context": None, "children_spec": []}

BAD: dict[str, Callable[[Document], None]] = {
    "4 TB": _added(_FULL),
    "4 TB that follow the batch": _added(
        _node(f"{ATEN}repeat.default", "big", self=X, repeats={"as_ints": [1 << 16, 1 << 20]})
    ),
    "a doubling chain": _added(
        *(
            _node(
                f"{ATEN}cat.default",
                f"c{i}",
                tensors={"as_tensors": [{"name": f"c{i - 1}" if i else "x"}] * 2},
            )
            for i in range(40)
        )
    ),
    "2**62 rows": _meta(sizes=[{"as_int": 1 << 62}, {"as_int": 6}]),
    "sizes below zero": _meta(sizes=[{"as_int": 2}, {"as_int": -6}]),
    "sizes of another kind": _meta(sizes=[{"as_int": 2}, {"as_float": 6.0}]),
    "a hundred sizes": _meta(sizes=[{"as_int": 1}] * 100),
    "sizes that are no list": _meta(sizes={"as_int": 1}),
    "a hint that is code": _meta(
        sizes=[{"as_expr": {"expr_str": "__import__('os').system('false')", "hint": None}}, {"as_int": 6}]
    ),
    "a value of later": _first(inputs=[{"name": "self", "arg": {"as_tensor": {"name": "sum_1"}}, "kind": 1}]),
    "a value that is not there": _added(
        _node(f"{ATEN}relu.default", "r", self={"as_tensor": {"name": "nowhere"}})
    ),
    "a value defined twice": _added(_node(f"{ATEN}relu.default", "x", self=X)),
    "two kinds of one argument": _added(_node(f"{ATEN}relu.default", "r", self={**X, "as_none": True})),
    "an argument that it does not take": _added(
        _node(f"{ATEN}relu.default", "r", self=X, more={"as_int": 1})
    ),
    "an argument of another type": _added(_node(f"{ATEN}relu.default", "r", self={"as_string": "x"})),
    "a number that is text": _added(_node(f"{ATEN}sum.dim_IntList", "r", self=X, dim={"as_ints": ["0"]})),
    "an integer of 80 bits": _added(_node(f"{ATEN}add.Scalar", "r", self=X, other={"as_int": 2**80})),
    "an element type of nothing": _added(
        _node(f"{ATEN}_to_copy.default", "r", self=X, dtype={"as_scalar_type": "float32"})
    ),
    "a target that is no text": _first(target=["torch.ops.aten.relu.default"]),
    "a node that is none": lambda document: _graph(document)["nodes"].insert(0, 7),
    "no inputs of a node": lambda document: _graph(document)["nodes"][0].pop("inputs"),
    "a shape that does not fit": _added(
        _node(f"{ATEN}reshape.default", "r", self=X, shape={"as_ints": [7, 7]}),
    ),
    "21,000 nodes": lambda document: _graph(document).update(
        nodes=[_node(f"{ATEN}relu.default", f"r{i}", self=X) for i in range(21_000)]
    ),
    "a weight that is not there": lambda document: document["graph_module"]["signature"]["input_specs"][0][
        "parameter"
    ].update(parameter_name="../../etc/passwd"),
    "outputs that are not as many": _set(
        "module_call_graph", 0, "signature", "out_spec", json.dumps([1, _TREE])
    ),
    "outputs a million deep": _set("module_call_graph", 0, "signature", "out_spec", "[1," + "[" * 10**6),
    "outputs described by nothing": _set("module_call_graph", 0, "signature", "out_spec", None),
    "no modules": _set("module_call_graph", []),
    "no signature": lambda document: document["graph_module"].pop("signature"),
    "no version": lambda document: document.pop("schema_version"),
    "a block in a block in a block": lambda document: _nest(_graph(document), 12),
}
"""Name of what is wrong with a graph, to the change that makes it so."""


def _nest(graph: Document, depth: int) -> None:
    inner = deepcopy(graph)
    for _ in range(depth):
        inputs = [{"name": "", "arg": {"as_bool": False}, "kind": 1}]
        inputs.append({"name": "", "arg": {"as_graph": {"name": "g", "graph": inner}}, "kind": 1})
        target = "torch.ops.higher_order.wrap_with_set_grad_enabled"
        outer = {"target": target, "inputs": inputs, "outputs": [], "metadata": {}, "name": None}
        inner = {**graph, "inputs": [], "outputs": [], "nodes": [outer]}
    graph["nodes"] = inner["nodes"]


def bad_exports(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Every bad graph; one that is no JSON; entries that lead out of the archive, and pickles in it."""
    for name, change in BAD.items():
        document = good_document()
        change(document)
        yield name, exporting(document)
    yield "no JSON", exporting(b"{" * 10)
    yield "a million brackets", exporting(b'{"a":' + b"[" * 10**6)
    yield "a number of a million digits", exporting(b'{"a":' + b"9" * 10**6 + b"}")
    yield "a key twice", exporting(_good_document().replace('"nodes"', '"nodes": [], "nodes"', 1).encode())
    with zipfile.ZipFile(io.BytesIO(good_export())) as archive:
        (table,) = (name for name in archive.namelist() if name.endswith("model_weights_config.json"))
        config = json.loads(archive.read(table))
        (other,) = (name for name in archive.namelist() if name.endswith("model_constants_config.json"))
        constants = json.loads(archive.read(other))
    for path in ("../../../../etc/passwd", str(canary), "weight_99"):
        changed = deepcopy(config)
        next(iter(changed["config"].values()))["path_name"] = path
        yield f"a weight at {path}", with_entries({table: json.dumps(changed).encode()})
    pickled = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    for entry in constants["config"].values():
        entry["use_pickle"] = True
    places = {entry["path_name"]: pickled for entry in constants["config"].values()}
    yield "a pickled constant", with_entries({other: json.dumps(constants).encode(), **places})


def changed_exports(
    choose: Callable[[Any], tuple[Any, Any]], value: Callable[[], Any], count: int
) -> Iterator[tuple[str, bytes]]:
    """Archives with one value of their graph another one: some are still in order."""
    for number in range(count):
        document = good_document()
        target, key = choose(document)
        target[key] = value()
        yield f"change {number} of {key}", exporting(document)
