"""The one spelling of every call: bringing a graph into it, and writing a call in it.

call_function   arithmetic and comparison are Python's operators, which stand by place; every other
                function is called with named arguments alone, unless it takes any number of tensors
call_method     only what no function does; the tensor stands by place, all else is named
call_module     what the layer requires stands by place, as hooks expect; options are named
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.allowlist import FUNCTIONS, METHODS, function_name
from modelopt_cli.program.call_signatures import bind, of_function
from modelopt_cli.program.calls import (
    SAME,
    bound_arguments,
    bound_layer,
    forward_of,
    is_variadic_call,
    operation,
    variadic_arguments,
)

_AXES = {"axis0": "dim0", "axis1": "dim1"}
_OPERATOR_NAMES = """
    add sub mul truediv floordiv mod pow matmul neg pos abs lt le eq ne gt ge and_ or_ xor invert lshift
    rshift
"""
_OPERATORS: dict[str, Callable[..., Any]] = {
    SAME.get(name, name): getattr(operator, name) for name in _OPERATOR_NAMES.split()
}
_OPERANDS = {"exponent": "other", "self": "input"}
# Fields of what max, sort, topk and aminmax give, and their places.
_FIELDS = {"values": 0, "indices": 1, "min": 0, "max": 1}


def rewrite(node: fx.Node, name: str, named: Mapping[str, Any]) -> None:
    """Let a node call another operation.

    Args:
        node: changed in place.
        name: the operation.
        named: its arguments by name.

    Raises:
        ArtifactError: there is no such operation with these arguments.
    """
    spelled = spell(name, dict(named))
    if spelled is None:
        names = ", ".join(named)
        raise ArtifactError(f"{name} cannot be called with {names}", where=node.name)
    node.op, node.target, node.args, node.kwargs = spelled


def canonicalize(graph: fx.Graph, root: nn.Module) -> None:
    """Bring every call of a graph into its one spelling; what it computes stays the same to the last bit.

    Args:
        graph: changed in place; its nodes keep their names.
        root: where the targets of ``call_module`` nodes are.

    Raises:
        ArtifactError: a call's arguments cannot be told apart.
    """
    for node in graph.nodes:
        if node.op == "call_module":
            _by_place(node, root)
        elif node.op in ("call_function", "call_method") and _may_be_called(node):
            _canonicalize(node)


def _may_be_called(node: fx.Node) -> bool:
    """True if a call is on the allow-list; what is not is refused where that is checked."""
    if node.op == "call_method":
        return node.target in METHODS
    return function_name(node.target) is not None  # type: ignore[arg-type]


def _canonicalize(node: fx.Node) -> None:
    name = operation(node)
    if node.target is getattr and node.args[1] in _FIELDS:
        node.target, node.args = operator.getitem, (node.args[0], _FIELDS[str(node.args[1])])
        return
    if node.target is getattr or name == "getitem":
        return
    if is_variadic_call(node):
        if name == "einsum":
            node.op, node.target, node.args, node.kwargs = spell(name, variadic_arguments(node))  # type: ignore[misc]
        return
    named = {_AXES.get(key, key): value for key, value in bound_arguments(node).items()}
    spelled = spell(name, named)
    if spelled is None:  # no other spelling takes these: its own, with names
        by_place = dict.fromkeys(list(named)[:1]) if node.op == "call_method" else {}
        first = tuple(named[source_name] for source_name in by_place)
        spelled = (node.op, node.target, first, {k: v for k, v in named.items() if k not in by_place})
    node.op, node.target, node.args, node.kwargs = spelled


Spelled = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def spell(name: str, named: dict[str, Any]) -> Spelled | None:
    """The one spelling of an operation with these arguments: op, target, args, kwargs.

    Args:
        name: bare, or as ``FUNCTIONS`` has it.
        named: the arguments by name.

    Returns:
        None where nothing of this name takes these arguments.
    """
    if name in ("getitem", "getattr"):
        target: Callable[..., Any] = operator.getitem if name == "getitem" else getattr
        return "call_function", target, tuple(named.values()), {}
    if name == "einsum":
        return "call_function", torch.einsum, (named["equation"], *named["operands"]), {}
    if name in FUNCTIONS:
        return "call_function", FUNCTIONS[name], (), named
    operands = {_OPERANDS.get(key, key): value for key, value in named.items()}
    if name in _OPERATORS and operands.pop("alpha", 1) == 1 and operands.keys() <= {"input", "other"}:
        both = tuple(operands[key] for key in ("input", "other") if key in operands)
        return "call_function", _OPERATORS[name], both, {}
    if name == "dim" and named.keys() == {"input"}:
        return "call_function", getattr, (named["input"], "ndim"), {}
    if name == "size" and named.keys() == {"input"}:
        return "call_function", getattr, (named["input"], "shape"), {}
    if name == "view" and named.keys() == {"input", "size"}:  # the same values, whatever the strides
        return spell("reshape", {"input": named["input"], "shape": named["size"]})
    if name == "view_as":
        return spell("reshape_as", named)
    if name == "to" and "other" in named:  # torch calls it "tensor"
        options = {key: value for key, value in named.items() if key not in ("input", "other")}
        return "call_method", name, (named["input"], named["other"]), options
    for prefix in ("F", "torch", "torchvision", "modelopt"):
        function = FUNCTIONS.get(f"{prefix}.{name}")
        for first in ("input", "tensor", "self"):
            renamed = {first if key == "input" else key: value for key, value in named.items()}
            if function is not None and bind(of_function(function), (), renamed) == renamed:
                return "call_function", function, (), renamed
    if name in METHODS and "input" in named:
        options = {key: value for key, value in named.items() if key != "input"}
        return "call_method", name, (named["input"],), options
    return None


def _by_place(node: fx.Node, root: nn.Module) -> None:
    """A layer's required arguments by place, in order, the others by name."""
    if len(node.args) == 1 and not node.kwargs:
        return
    layer = root.get_submodule(str(node.target))
    bound = bound_layer(node, layer).arguments
    parameters = list(forward_of(type(layer).forward).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    variable = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    if variable:
        return
    node.args = tuple(bound[name] for name in required)
    node.kwargs = {p.name: bound[p.name] for p in parameters if p.name in bound and p.name not in required}
