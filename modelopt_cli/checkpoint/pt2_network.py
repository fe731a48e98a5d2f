"""The network in a ``.pt2`` file: its graph, weights, inputs and outputs, read as data."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.artifact import strictjson
from modelopt_cli.checkpoint.pt2 import Archive
from modelopt_cli.checkpoint.pt2_arguments import DTYPES, argument, integer, name_in, pairs, single
from modelopt_cli.checkpoint.pt2_graph import ReadGraph
from modelopt_cli.checkpoint.pt2_outputs import output_structure
from modelopt_cli.checkpoint.tensor_checks import check_finite, check_range
from modelopt_cli.errors import ArtifactError, CaptureError, CheckpointError, ModeloptError
from modelopt_cli.program.aten_batch import free_batch
from modelopt_cli.program.aten_network import AtenNetwork, GivenSize
from modelopt_cli.program.bounds import BATCHES, check_bounds
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.metadata import MAX_INPUTS, MAX_RANK, MAX_SIDE, listed, mapped
from modelopt_cli.program.program import Program
from modelopt_cli.program.safe_names import is_input_name, shown
from modelopt_cli.program.samples import DTYPES as INPUT_TYPES
from modelopt_cli.settings import option
from modelopt_cli.text import first_line, short

_MAJOR = 8
"""Version of the schema, torch/_export/serde/schema.py; of others, a name may mean something else."""
_ENDLESS = 1 << 62
_LISTED = 100_000
_TYPES = {dtype: name for name, dtype in INPUT_TYPES.items()}
_IGNORED = ("buffer_mutation", "user_input_mutation", "token")
"""Outputs that carry state over to the next call."""


@dataclass(frozen=True)
class _Input:
    """One input: the name it has, its sizes with the batch, and which of them the graph was made for."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    given: tuple[GivenSize, ...]

    @property
    def batch(self) -> int | None:
        """The number of samples that the graph was made for; None where it is free."""
        return self.sizes[0] if any(size.place == 0 for size in self.given) else None

    def described(self) -> InputSpec:
        return InputSpec(self.sizes[1:], dtype=_TYPES[self.dtype], name=self.name)  # type: ignore[arg-type]


def read_program(archive: Archive, where: str) -> tuple[Program, list[str]]:
    """The network of an archive as a Program, and one line for each thing that was done to it.

    Raises:
        CheckpointError: the graph is malformed, or asks for too much.
        CaptureError: a Program cannot hold it; the message says which of its operators is the reason.
    """
    with _told(where):
        document = _document(archive, where)
        network, inputs, notes = _network(document, archive, where)
        input_spec, batch = _described(inputs)
        tensors = network.aten_tensors()
        check_bounds(network.aten_graph, {}, tensors, input_spec, (batch,) if batch else BATCHES)
        if batch is not None:
            free_batch(network, input_spec, batch)
            check_bounds(network.aten_graph, {}, tensors, input_spec)
            notes.append(f"its batch size was {batch}, and is free now")
        return capture(network, input_spec), notes


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """The reading of a graph, whose failures say what is wrong with the file."""
    damaged = "it is damaged or forged; export it again"
    try:
        yield
    except ArtifactError as error:
        hint = f"name its architecture, and its weights alone are read: {option('arch', 'FILE.py:CALLABLE')}"
        raise CheckpointError(f"its graph {error}", where=where, hint=hint) from error
    except ModeloptError:
        raise
    except KeyError as error:
        problem = f"its graph is malformed: there is no field {first_line(error)}"
        raise CheckpointError(problem, where=where, hint=damaged) from error
    except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        problem = f"its graph is malformed: {first_line(error)}"
        raise CheckpointError(problem, where=where, hint=damaged) from error


def read_input(archive: Archive, where: str) -> InputSpec:
    """The inputs of the network of an archive, of which nothing else is read.

    Raises:
        CheckpointError: the graph is malformed.
        CaptureError: there is none, or a Program cannot take such inputs.
    """
    with _told(where):
        document = _document(archive, where)
        module = mapped(document["graph_module"], "graph_module")
        specs = listed(mapped(module["signature"], "a signature")["input_specs"], "inputs", _LISTED)
        return _described(_inputs(ReadGraph(), mapped(module["graph"], "a graph"), specs, document))[0]


def _document(archive: Archive, where: str) -> Mapping[str, Any]:
    if archive.model is None:
        raise CaptureError("the file holds none, or several")
    document = mapped(strictjson.parse(archive.model, CheckpointError, where), "its JSON")
    version = mapped(document["schema_version"], "schema_version").get("major")
    if version != _MAJOR:
        raise CaptureError(f"its graph has version {short(version)}, and {_MAJOR} can be read")
    return document


def _network(
    document: Mapping[str, Any], archive: Archive, where: str
) -> tuple[AtenNetwork, list[_Input], list[str]]:
    module = mapped(document["graph_module"], "graph_module")
    data, signature = mapped(module["graph"], "a graph"), mapped(module["signature"], "a signature")
    read = ReadGraph()
    inputs = _inputs(read, data, listed(signature["input_specs"], "inputs", _LISTED), document)
    weights, constants = _fetched(read, listed(signature["input_specs"], "inputs", _LISTED), archive)
    read.call_all(data)
    _name_by_owner(read.graph, weights, archive.weights)
    _make_plain(read.graph, weights)
    outputs = listed(data["outputs"], "outputs", _LISTED)
    values = _returned(read, outputs, listed(signature["output_specs"], "outputs", _LISTED))
    first = mapped(listed(module["module_call_graph"], "modules", _LISTED)[0], "a module")
    called = mapped(first["signature"], "the network's signature")
    fields = mapped(module.get("treespec_namedtuple_fields") or {}, "named tuples")
    read.graph.output((output_structure(called["out_spec"], fields, values),))
    check_finite(weights, where, masks=True)
    check_range(weights, where)
    sizes = {each.name: each.given for each in inputs}
    notes = ["exported in training mode: dropout and batch norm are as in eval()"] if read.training else []
    return AtenNetwork(read.graph, weights, constants, sizes).eval(), inputs, notes


def _inputs(
    read: ReadGraph, data: Mapping[str, Any], specs: Sequence[Any], document: Mapping[str, Any]
) -> list[_Input]:
    """Add the network's inputs to the graph."""
    metas = mapped(data["tensor_values"], "tensor_values")
    ranges = mapped(document["range_constraints"], "range_constraints")
    inputs = []
    for spec in specs:
        kind, value = single(spec, "an input")
        if kind != "user_input":
            continue
        kind, value = single(mapped(value, "an input")["arg"], "an input")
        if kind != "as_tensor":
            if kind in ("as_sym_int", "as_sym_float"):
                raise CaptureError("takes a number as an input")
            continue
        name = name_in(value)
        if not is_input_name(name):
            raise CaptureError(f"no input can be called {shown(name)}")
        read.define(name, read.graph.placeholder(name))
        inputs.append(_one_input(name, mapped(metas[name], "a tensor"), ranges))
    if not 0 < len(inputs) <= MAX_INPUTS:
        raise CaptureError(f"has {len(inputs)} inputs")
    return inputs


def _one_input(name: str, meta: Mapping[str, Any], ranges: Mapping[str, Any]) -> _Input:
    dtype = DTYPES.get(meta["dtype"])
    if dtype not in _TYPES:
        kind = str(dtype).removeprefix("torch.")
        raise CaptureError(f"its input {name} is {kind}; a Program takes {', '.join(INPUT_TYPES)}")
    sizes, given = [], []
    for place, size in enumerate(listed(meta["sizes"], "sizes", MAX_RANK + 1)):
        kind, value = single(size, "a size")
        least = most = 0
        if kind == "as_int":
            least = most = number = integer(value)
        else:
            expression = mapped(value, "a size")
            number = integer(mapped(expression["hint"], "a size")["as_int"])
            bounds = mapped(ranges.get(_symbol(expression["expr_str"]), {}), "a range")
            least, most = bounds.get("min_val") or 0, bounds.get("max_val") or _ENDLESS
        if not 0 < number <= MAX_SIDE:
            raise ArtifactError(f"has an input of size {number}")
        sizes.append(number)
        if least == most or place:
            given.append(GivenSize(place, integer(least), integer(most)))
    if not sizes:
        raise CaptureError(f"its input {name} is a single number, and has no samples")
    return _Input(name, dtype, tuple(sizes), tuple(given))


def _symbol(expression: Any) -> str:
    """The symbol that an expression begins with, if it is one: ``Symbol('s77', ...)``."""
    text = expression if isinstance(expression, str) else ""
    return text.removeprefix("Symbol('").partition("'")[0]


def _fetched(
    read: ReadGraph, specs: Sequence[Any], archive: Archive
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Add parameters, buffers and constants to the graph; returns the network's tensors and the others."""
    weights: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for spec in specs:
        kind, value = single(spec, "an input")
        entry = mapped(value, "an input")
        if kind in ("user_input", "constant_input"):
            continue
        if kind not in ("parameter", "buffer", "tensor_constant"):
            raise CaptureError(f"has an input of the kind {short(kind)}")
        path = name_in(entry, f"{kind}_name")
        tensor = archive.weights.get(path, archive.constants.get(path))
        if tensor is None:
            raise ArtifactError(f"fetches {shown(path)}, which the file does not hold")
        target = constants if kind == "tensor_constant" else weights
        target[path] = made.setdefault(id(tensor), _owned(tensor, kind))
        read.define(name_in(entry["arg"]), read.graph.create_node("get_attr", path))
    if weights.keys() & constants.keys():
        raise ArtifactError("has a weight and a constant of one name")
    return weights, constants


def _name_by_owner(graph: fx.Graph, weights: dict[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Let a layer fetch a tied weight by its own name for it: the graph has one name for all."""
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        for fetched in node.all_input_nodes if stack else ():
            path = str(fetched.target)
            own = f"{stack[-1][0]}.{path.rpartition('.')[2]}"
            if fetched.op == "get_attr" and own != path and stored.get(own) is stored.get(path, graph):
                weights[own] = weights[path]
                with graph.inserting_before(node):
                    node.replace_input_with(fetched, graph.create_node("get_attr", own))


def _make_plain(graph: fx.Graph, weights: dict[str, Tensor]) -> None:
    """Let a layer have the weight that weight_norm computes at each call, as capture does it."""
    for node in list(graph.nodes):
        reader = next(iter(node.users), node)
        stack = list(reader.meta.get("nn_module_stack", {}).values())
        path = f"{stack[-1][0]}.weight" if stack else ""
        made_of = [weights.get(str(fetched.target)) for fetched in node.all_input_nodes]
        if node.target is not torch.ops.aten._weight_norm.default or len(made_of) != 2 or path in weights:
            continue
        direction, length = made_of
        if direction is None or length is None:
            continue
        if torch.broadcast_shapes(direction.shape, length.shape) == direction.shape:  # it makes no more
            with torch.no_grad(), graph.inserting_before(node):
                weights[path] = nn.Parameter(node.target(direction, length, *node.args[2:], **node.kwargs))
                node.replace_all_uses_with(graph.create_node("get_attr", path))
            graph.erase_node(node)


def _owned(tensor: Tensor, kind: str) -> Tensor:
    """A tensor as the network has it, in float32 where it holds numbers with a fraction."""
    if kind == "tensor_constant":
        return tensor
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return nn.Parameter(tensor, tensor.is_floating_point()) if kind == "parameter" else tensor


def _returned(read: ReadGraph, outputs: Sequence[Any], specs: Sequence[Any]) -> list[Any]:
    """The values that the network returns, without those that it keeps."""
    values: list[Any] = []
    for output, spec in pairs(outputs, specs, "outputs and output_specs"):
        kind, _ = single(spec, "an output")
        if kind == "user_output":
            values.append(argument(output, read.values))
        elif kind not in _IGNORED:
            raise CaptureError(f"returns values of the kind {short(kind)}")
    return values


def _described(inputs: Sequence[_Input]) -> tuple[InputSpec, int | None]:
    """The inputs as a Program has them, and the number of samples where that is not free."""
    batches = {each.batch for each in inputs}
    if len(batches) > 1:
        raise CaptureError("its inputs have different numbers of samples")
    first, *others = (each.described() for each in inputs)
    return replace(first, others=tuple(others)), batches.pop()
