"""A Program's nodes as plain data, and strictly back.

Each node is checked on its own and against those before it, so that the source fx writes for the graph
can hold nothing but calls of what is on the list.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from modelopt_cli.errors import ArtifactError, a_or_an
from modelopt_cli.program.allowlist import (
    ATTRIBUTES,
    IN_PLACE_OPERATORS,
    METHODS,
    function_called,
    function_name,
)
from modelopt_cli.program.json_arguments import MAX_ITEMS, from_json, to_json
from modelopt_cli.program.metadata import MAX_NODES, keyed, listed, mapped
from modelopt_cli.program.output_structure import MAX_DEPTH, leaves
from modelopt_cli.program.safe_names import is_input_name, is_keyword, is_node_name, is_output_key, shown


def node_to_data(node: fx.Node) -> dict[str, Any]:
    """One node as JSON.

    Raises:
        ArtifactError: its name, function or arguments have no form in a file.
    """
    if not is_node_name(node.name):
        raise ArtifactError(f"a node cannot be named {node.name!r}")
    target = str(node.target)
    if node.op == "call_function":
        target = function_name(node.target) or ""  # type: ignore[arg-type]
        if not target:
            raise ArtifactError(f"the function {node.target} has no form in a file", where=node.name)
    if node.op == "output":
        args = [outputs_to_json(node.args[0])]
    else:
        args = [] if node.op == "placeholder" else [to_json(arg) for arg in node.args]
    kwargs = {key: to_json(value) for key, value in node.kwargs.items()}
    return {"op": node.op, "name": node.name, "target": target, "args": args, "kwargs": kwargs}


def outputs_to_json(outputs: Any) -> Any:
    """Structure of a graph's outputs as JSON.

    Raises:
        ArtifactError: as ``check_outputs``.
    """
    check_outputs(outputs)
    return _outputs_to_json(outputs)


def _outputs_to_json(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        # In pairs: the header of a file sorts the keys of its objects.
        return {"dict": [[key, _outputs_to_json(value)] for key, value in outputs.items()]}
    if isinstance(outputs, list | tuple):
        items = [_outputs_to_json(value) for value in outputs]
        return items if isinstance(outputs, list) else {"tuple": items}
    return to_json(outputs)


def check_outputs(outputs: Any) -> None:
    """Refuse what a graph cannot return: anything but nodes and None in lists, tuples and dictionaries.

    Raises:
        ArtifactError: the message says what it returns.
    """
    _check_outputs(outputs, "", 0)
    if not any(isinstance(value, fx.Node) for _, value in leaves(outputs)):
        raise ArtifactError("no tensor")


def _check_outputs(outputs: Any, path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ArtifactError(f"more than {MAX_DEPTH} containers, one inside the other")
    if isinstance(outputs, Mapping | list | tuple) and len(outputs) > MAX_ITEMS:
        raise ArtifactError(f"more than {MAX_ITEMS} values in one container")
    if isinstance(outputs, Mapping):
        odd = next((key for key in outputs if not is_output_key(key)), None)
        if odd is not None:
            raise ArtifactError(f"a dictionary with the key {odd!r:.60}")
        items = list(outputs.items())
    elif isinstance(outputs, list | tuple):
        items = list(enumerate(outputs))
    elif outputs is None or isinstance(outputs, fx.Node):
        return
    else:
        place = f" at {path!r}" if path else ""
        raise ArtifactError(f"{a_or_an(type(outputs).__name__)}{place}, not a tensor")
    for key, value in items:
        _check_outputs(value, f"{path}.{key}" if path else str(key), depth + 1)


def _outputs_from_json(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """The structure that ``outputs_to_json`` described."""
    if depth > MAX_DEPTH:
        raise ArtifactError("outputs are nested too deep")
    if value is None:
        return None
    if isinstance(value, dict) and list(value) == ["dict"]:
        pairs = listed(value["dict"], "a dictionary of outputs", MAX_ITEMS)
        if not all(isinstance(pair, list) and len(pair) == 2 and is_output_key(pair[0]) for pair in pairs):
            raise ArtifactError("a dictionary of outputs holds pairs of a name and a value")
        outputs = {key: _outputs_from_json(item, nodes, depth + 1) for key, item in pairs}
        if len(outputs) < len(pairs):
            raise ArtifactError("a dictionary of outputs has a name twice")
        return outputs
    if isinstance(value, dict) and list(value) == ["tuple"]:
        return tuple(_outputs_from_json(listed(value["tuple"], "a tuple", MAX_ITEMS), nodes, depth))
    if isinstance(value, list):
        return [_outputs_from_json(item, nodes, depth + 1) for item in value]
    return from_json(value, nodes)


def leaf_above(path: str, modules: Mapping[str, Any]) -> str | None:
    """The leaf layer a path lies in, itself included."""
    parts = path.split(".")
    return next((p for n in range(1, len(parts) + 1) if (p := ".".join(parts[:n])) in modules), None)


def graph_from_data(
    entries: Any, modules: Mapping[str, nn.Module], attributes: Mapping[str, Any], inputs: Sequence[str]
) -> fx.Graph:
    """The graph that the entries describe.

    Args:
        entries: of a file.
        modules: the layers that it may call.
        attributes: the tensors that it may fetch.
        inputs: names of the network's inputs, in order; that of a single one need not be the graph's.

    Raises:
        ArtifactError: it is anything but what ``node_to_data`` writes for a Program's nodes.
    """
    listing = listed(entries, "nodes", MAX_NODES)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for position, entry in enumerate(listing):
        fields = keyed(entry, ("op", "name", "target", "args", "kwargs"), "a node")
        name, op = fields["name"], fields["op"]
        if not is_node_name(name) or name in nodes:
            raise ArtifactError(f"not a new node name: {shown(name)}")
        is_last = position == len(listing) - 1
        if (op == "placeholder") != (position < len(inputs)) or (op == "output") != is_last:
            raise ArtifactError("a graph starts with its inputs and ends with what it returns")
        if op == "placeholder" and len(inputs) > 1 and fields["target"] != inputs[position]:
            raise ArtifactError(f"the input {shown(name)} is not the one described")
        try:
            nodes[name] = _add(graph, fields, nodes, modules, attributes)
        except ArtifactError as error:
            raise ArtifactError(error.message, where=f"node {name}", hint=error.hint) from error
    if len(listing) < 2:
        raise ArtifactError("the graph is empty")
    unused = {*modules, *attributes} - {str(node.target) for node in graph.nodes}
    if unused:
        raise ArtifactError("is not used by the graph", where=shown(min(unused)))
    return graph


def _add(
    graph: fx.Graph,
    fields: dict[str, Any],
    nodes: Mapping[str, fx.Node],
    modules: Mapping[str, nn.Module],
    attributes: Mapping[str, Any],
) -> fx.Node:
    op, name, target = fields["op"], fields["name"], fields["target"]
    args = tuple(
        (_outputs_from_json if op == "output" else from_json)(
            listed(fields["args"], "args", MAX_ITEMS), nodes
        )
    )
    kwargs = {key: from_json(value, nodes) for key, value in mapped(fields["kwargs"], "kwargs").items()}
    if not isinstance(op, str) or not isinstance(target, str) or op not in _OPS:
        raise ArtifactError("unknown operation")
    if not all(map(is_keyword, kwargs)):
        raise ArtifactError("a keyword argument with an odd name")
    if op == "call_function":
        callee: Any = _function(target, args, kwargs)
    elif op == "call_method":
        callee = target if target in METHODS and args and isinstance(args[0], fx.Node) else None
    elif op == "call_module":
        callee = target if target in modules else None
    elif op == "get_attr":
        known = target in attributes or _in_leaf(target, modules)
        callee = target if known and not args and not kwargs else None
    elif op == "placeholder":
        shown_as = name if is_node_name(target) else target
        callee = shown_as if is_input_name(target) and not args and not kwargs else None
    else:
        callee = "output" if len(args) == 1 and not kwargs else None
        check_outputs(args[0] if len(args) == 1 else None)
    if callee is None:
        raise ArtifactError(f"{op} cannot be applied to {shown(target)} with these arguments")
    node = graph.create_node(op, callee, args, kwargs, name=name)
    if node.name != name:
        raise ArtifactError("its name is taken")
    return node


_UNARY = ("neg", "pos", "abs", "invert")
_IN_PLACE = tuple(f"operator.{name}" for name in IN_PLACE_OPERATORS)
_OPS = ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output")


def _function(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function of this name, if generated code can call it with these arguments."""
    function = function_called(target)
    if target == "getattr" or target.startswith("operator."):
        # fx writes these as Python expressions: x.shape, a + b, -a.
        unary = target.removeprefix("operator.") in _UNARY
        if kwargs or len(args) != (1 if unary else 2) or not any(isinstance(arg, fx.Node) for arg in args):
            return None
        if target in ("getattr", "operator.getitem") or target in _IN_PLACE:
            function = function if isinstance(args[0], fx.Node) else None
    if target == "getattr":
        return function if isinstance(args[1], str) and args[1] in ATTRIBUTES else None
    return function


def _in_leaf(path: str, modules: Mapping[str, nn.Module]) -> bool:
    leaf = leaf_above(path, modules)
    return leaf is not None and path[len(leaf) + 1 :] in modules[leaf].state_dict()
