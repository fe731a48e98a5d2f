"""Making a new Program out of another one: the graph copied, the layers fresh, the tensors shared."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from operator import attrgetter
from typing import Any

from torch import fx, nn

from modelopt_cli.program.layer_kinds import build, config_of, kind_of, share
from modelopt_cli.program.parted import graph_input
from modelopt_cli.program.program import Program
from modelopt_cli.program.safe_names import is_node_name


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and without the marks of how the graph was traced."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copy = copies[node] = copied.node_copy(node, copies.__getitem__)
        copy.meta.clear()
        copy.type = None
        if not is_node_name(copy.name):  # a layer called "self", say
            copy.name = copied._graph_namespace.create_name(f"n_{copy.name.strip('_')[:150]}", None)
    return copied


def rebuild(program: Program, graph: fx.Graph, new_layers: Mapping[str, nn.Module] | None = None) -> Program:
    """``program`` with another graph: layers out of ``new_layers``, or else fresh ones with shared tensors.

    Encodings of the replaced layers' tensors are dropped, all else is kept.
    """
    new_layers = new_layers or {}
    encodings = {
        name: encoding
        for name, encoding in program.encodings.items()
        if name.rpartition(".")[0] not in new_layers
    }
    rebuilt = program.with_graph(
        parts_of(
            program,
            graph,
            lambda path: new_layers[path] if path in new_layers else share(program.get_submodule(path)),
        ),
        graph,
    )
    kept = rebuilt.state_dict().keys()
    rebuilt.encodings = {name: encoding for name, encoding in encodings.items() if name in kept}
    return rebuilt.train(program.training)


def meta_copy(program: Program) -> Program:
    """The graph of a Program on the meta device, for asking about shapes without computing anything."""

    def empty(path: str) -> nn.Module:
        leaf = program.get_submodule(path)
        kind = kind_of(leaf)
        return _emptied(leaf) if kind is None else build(kind, config_of(leaf))

    parts = parts_of(program, program.graph, empty)
    for path, part in parts.items():
        if not isinstance(part, nn.Module):
            # A parameter has to stay one: its layer may be called elsewhere, and has it already.
            empty_part = part.to("meta")
            is_parameter = isinstance(part, nn.Parameter)
            parts[path] = nn.Parameter(empty_part, part.requires_grad) if is_parameter else empty_part
    return Program(parts, copy_graph(program.graph), input_spec=graph_input(program)).eval()


def _emptied(leaf: nn.Module) -> nn.Module:
    """A copy on the meta device of a layer that has no form in a file, as some have in training."""
    empty: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in leaf.buffers()}
    for parameter in leaf.parameters():
        empty[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return deepcopy(leaf, empty)


def read_elsewhere(program: Program) -> dict[str, str]:
    """Layers of which the graph fetches a tensor: the tensor's own name, by the layer's path.

    The graph may know a tied one by another name. What takes such a layer's place has to have them all.
    """
    fetched = {id(attrgetter(str(node.target))(program)) for node in program.graph.find_nodes(op="get_attr")}
    readers: dict[str, str] = {}
    for node in program.graph.find_nodes(op="call_module"):
        for name, tensor in program.get_submodule(str(node.target)).state_dict(keep_vars=True).items():
            if id(tensor) in fetched:
                readers.setdefault(str(node.target), name)
    return readers


def parts_of(program: Program, graph: fx.Graph, leaf: Callable[[str], nn.Module]) -> dict[str, Any]:
    """All that a graph calls and fetches, by path, to make a Program of: layers as ``leaf`` gives them."""
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and path not in parts:
            parts[path] = leaf(path)
        elif node.op == "get_attr":
            parts[path] = attrgetter(path)(program)
    return parts
