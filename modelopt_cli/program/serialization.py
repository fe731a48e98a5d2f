"""A Program as plain data, and strictly back.

The data form is JSON with these keys; the tensors travel next to it (docs/format.md):

    input       {"shape": [...], "preprocess": {...} or null, ...}, and what else the network takes
    labels      class names, or null
    history     what was done to the network
    arch        the spec it was built from, or null
    modules     {path: {"kind": name, "config": {...}}}       the leaf layers
    attributes  {path: "parameter" | "buffer"}                tensors outside of leaf layers
    tensors     {path: {"dtype": name, "shape": [...]}}       all that must come with it
    tied        {path: path}                                  names for a tensor that has another name
    nodes       [{"op", "name", "target", "args", "kwargs"}]  the graph, in order
    parts       {...} of a network that was captured in parts only; see ``part_data``

Everything is checked before fx sees any of it: fx writes a graph as Python source and runs it.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from modelopt_cli.errors import ArtifactError, CaptureError, ModeloptError, a_or_an
from modelopt_cli.program.allowlist import is_in_place
from modelopt_cli.program.bounds import check_bounds
from modelopt_cli.program.file_tensors import assign, check_values, checked_tensors, fetch_from_leaves
from modelopt_cli.program.functional import allocating
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.json_arguments import dtype_name, number_from_json, number_to_json
from modelopt_cli.program.layer_kinds import build, config_of, kind_of
from modelopt_cli.program.metadata import MAX_NODES, from_header, keyed, mapped, to_header
from modelopt_cli.program.nodes import graph_from_data, leaf_above, node_to_data
from modelopt_cli.program.normal import is_normal, normalize
from modelopt_cli.program.part_data import parts_from_data, parts_to_data
from modelopt_cli.program.parted import PartedProgram, parts_of_network
from modelopt_cli.program.parts import Parts
from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import meta_copy
from modelopt_cli.program.safe_names import is_path, shown
from modelopt_cli.text import first_line

_GRAPH_KEYS = ("modules", "attributes", "tensors", "tied", "nodes")
_HEADER_KEYS = ("input", "labels", "history", "arch")


def state_of(program: Program) -> dict[str, Tensor]:
    """The tensors to store with ``to_data(program)``: each once, under its first name."""
    state, tied = _named_once(program)
    return {path: tensor.detach() for path, tensor in state.items() if path not in tied}


def to_data(program: Program) -> dict[str, Any]:
    """The Program as JSON-able data without tensors and encodings.

    Raises:
        ArtifactError: it holds a layer, function or argument that has no form in a file, or changes a value
            in place.
    """
    state, tied = _named_once(program)
    layers = dict(program.named_modules())
    for node in program.graph.nodes:
        if is_in_place(node, layers):
            raise ArtifactError("changes a value in place", where=node.name)
    modules = {path: _module_to_data(program, path) for path in _targets(program, "call_module")}
    attributes = [path for path in _targets(program, "get_attr") if leaf_above(path, modules) is None]
    parts = parts_of_network(program)
    attributes += parts.remaining if parts is not None else ()
    data = to_header(program) | {
        "modules": modules,
        "attributes": {
            p: "parameter" if isinstance(state[p], nn.Parameter) else "buffer" for p in attributes
        },
        "tensors": {
            path: {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
            for path, tensor in state.items()
            if path not in tied
        },
        "tied": tied,
        "nodes": [node_to_data(node) for node in program.graph.nodes],
    }
    if parts is not None:
        data["parts"] = parts_to_data(parts)
    _check_paths(data["modules"], data["attributes"])
    return data


def require_readable(program: Program) -> None:
    """Refuse a Program that could be written to a file, but not be read from it.

    Raises:
        ArtifactError: its graph takes more than a file may ask for, or cannot be run without values.
    """
    empty = meta_copy(program).float()  # as the layers are when a file is read
    layers = {path: empty.get_submodule(path) for path in _targets(empty, "call_module")}
    tensors = {path: attrgetter(path)(empty) for path in _targets(empty, "get_attr")}
    check_bounds(empty.graph, layers, tensors, empty.input)


def _named_once(program: Program) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by name, and for the second and later names of a tensor its first."""
    state: dict[str, Tensor] = program.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for path, tensor in state.items():
        first.setdefault(id(tensor), path)
    return state, {path: first[id(tensor)] for path, tensor in state.items() if first[id(tensor)] != path}


def _targets(program: Program, op: str) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in program.graph.nodes if node.op == op))


def _module_to_data(program: Program, path: str) -> dict[str, Any]:
    module = program.get_submodule(path)
    kind = kind_of(module)
    if kind is None:
        raise ArtifactError(f"{a_or_an(type(module).__name__)} has no form in a file", where=path)
    return {"kind": kind, "config": {k: number_to_json(v) for k, v in config_of(module).items()}}


def from_data(
    data: Mapping[str, Any], state: Mapping[str, Tensor], network: nn.Module | None = None
) -> Program:
    """The Program that ``to_data`` described, with the tensors of ``state`` (shared, not copied).

    Args:
        data: parsed JSON; not trusted.
        state: exactly the tensors it lists. Tied names may be present, too, with equal values.
        network: whose code calls the graphs, where they are parts of one; its weights are not used.

    Returns:
        A Program in eval mode, without encodings.

    Raises:
        ArtifactError: anything else than what ``to_data`` writes, or tensors that do not fit it.
        ArchitectureError: the network is not the one whose parts they are.
    """
    parted = "parts" in mapped(data, "the program")
    fields = keyed(data, (*_HEADER_KEYS, *_GRAPH_KEYS, *["parts"] * parted), "the program")
    header = from_header({key: fields[key] for key in _HEADER_KEYS})
    described, attributes = mapped(fields["modules"], "modules"), mapped(fields["attributes"], "attributes")
    if len(described) + len(attributes) > MAX_NODES:
        raise ArtifactError("too many layers")
    modules = {path: _module_from_data(path, entry) for path, entry in described.items()}
    _check_paths(modules, attributes)
    parts = parts_from_data(fields["parts"], attributes, network) if parted else None
    sample = header["input_spec"] if parts is None else parts.graph_input
    outside = {} if parts is None else dict.fromkeys(parts.remaining)
    fetched = {path: kind for path, kind in attributes.items() if path not in outside}
    names = [each.name for each in sample.tensors]
    graph = graph_from_data(fields["nodes"], modules, fetched, names)
    tensors = checked_tensors(mapped(fields["tensors"], "tensors"), mapped(fields["tied"], "tied"), state)
    check_bounds(graph, modules, {path: tensors[path] for path in attributes}, sample)
    root: dict[str, Any] = {**modules, **assign(modules, attributes, tensors)}
    check_values(modules)
    fetch_from_leaves(graph, root)
    try:
        if not is_normal(graph, modules):
            _normalize(graph, fx.GraphModule(root, graph), sample)
        if parts is None:
            program = Program(root, graph, **header)
        else:
            _check_results(graph, parts)
            program = PartedProgram(root, graph, parts=parts, remaining=root, **header)
    except ModeloptError:
        raise
    except Exception as error:  # whatever fx finds wrong with the source it writes
        raise ArtifactError(f"the graph cannot be built: {first_line(error)!r}") from error
    return program.eval()


def _check_results(graph: fx.Graph, parts: Parts) -> None:
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    if not isinstance(results, dict) or results.keys() != parts.by_path.keys():
        raise ArtifactError("the graph of parts must return what each of them does")


def _normalize(graph: fx.Graph, root: nn.Module, input_spec: InputSpec) -> None:
    """Bring the graph of a file from before the normal form into it."""
    try:
        normalize(graph, root.eval(), input_spec)
    except CaptureError as error:
        raise ArtifactError(error.message, where=error.where, hint=error.hint) from error
    for layer in root.modules():
        allocating(layer)


def _module_from_data(path: str, entry: Any) -> nn.Module:
    fields = keyed(entry, ("kind", "config"), "a layer")
    if not isinstance(fields["kind"], str):
        raise ArtifactError("a layer's kind must be a string")
    config = {key: number_from_json(value) for key, value in mapped(fields["config"], "config").items()}
    try:
        return build(fields["kind"], config)
    except ArtifactError as error:
        raise ArtifactError(error.message, where=shown(path), hint=error.hint) from error


def _check_paths(modules: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Every path is well formed and none lies inside another."""
    taken = {**modules, **attributes}
    if len(taken) != len(modules) + len(attributes):
        raise ArtifactError("a layer and a tensor have the same name")
    for path in taken:
        if not is_path(path):
            raise ArtifactError(f"not a layer name: {shown(path)}")
        if leaf_above(path, taken) != path:
            raise ArtifactError("lies inside another layer", where=path)
    if any(kind not in ("parameter", "buffer") for kind in attributes.values()):
        raise ArtifactError("an attribute is a parameter or a buffer")
