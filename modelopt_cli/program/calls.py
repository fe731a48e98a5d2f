"""One spelling for every call of a graph, and its arguments by name.

The same operation can be written as a function of torch's, of ``torch.nn.functional``'s, as a tensor method
or as a Python operator; its arguments by place or by name, under NumPy's names or torch's. Every Program is
brought into one spelling when its code is made (``Program.recompile``), so that what reads a graph asks for
``operation(node)`` and ``arguments(node)`` and knows all there is to know of a call:

    call_function   arithmetic and comparison are Python's operators, which stand by place; every other
                    function is called with named arguments alone, unless it takes any number of tensors
    call_method     only what no function does; the tensor stands by place, all else is named
    call_module     what the layer requires stands by place, as hooks expect; options are named
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.allowlist import FUNCTIONS, METHODS, function_name
from modelopt_cli.program.parameters import Signature, bind, defaults, is_variadic, of_function, of_method

# Names of one operation, and the one it has here.
_SAME = {
    **{"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "divide": "div"},
    **{"ifloordiv": "floor_divide", "imod": "remainder", "ipow": "pow", "iand": "and", "ior": "or"},
    "ixor": "xor",
    **{"true_divide": "div", "subtract": "sub", "multiply": "mul", "concat": "cat", "concatenate": "cat"},
    **{"swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "clip": "clamp"},
    **{"positive": "pos", "absolute": "abs", "less": "lt", "less_equal": "le", "greater": "gt"},
    **{"greater_equal": "ge", "not_equal": "ne", "nelement": "numel"},
    **{"negative": "neg", "floordiv": "floor_divide", "mod": "remainder", "ndimension": "dim"},
    **{"and_": "and", "or_": "or"},
}
_AXES = {"axis0": "dim0", "axis1": "dim1"}
_OPERATOR_NAMES = """
    add sub mul truediv floordiv mod pow matmul neg pos abs lt le eq ne gt ge and_ or_ xor invert lshift
    rshift
"""
_OPERATORS: dict[str, Callable[..., Any]] = {
    _SAME.get(name, name): getattr(operator, name) for name in _OPERATOR_NAMES.split()
}
_OPERANDS = {"exponent": "other", "self": "input"}
# Fields of what max, sort, topk and aminmax give, and their places.
_FIELDS = {"values": 0, "indices": 1, "min": 0, "max": 1}


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls: ``add`` for ``torch.add``, ``Tensor.add_``, ``operator.iadd``.

    Empty for a layer's call, a fetched tensor, the input and the output.
    """
    return _operation(node.op, node.target) if node.op in ("call_function", "call_method") else ""


@cache
def _operation(op: str, target: Any) -> str:
    name = str(target) if op == "call_method" else function_name(target) or ""
    prefix, _, bare = name.rpartition(".")
    if prefix in ("linalg", "fft"):  # torch.norm and torch.linalg.norm are two
        return name
    if bare in ("and_", "or_"):
        return _SAME[bare]
    bare = bare.removesuffix("_")
    return _SAME.get(bare, bare)


def arguments(node: fx.Node, layer: nn.Module | None = None) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those it leaves out.

    Args:
        node: in normal form, or in any spelling of what may be called.
        layer: what a ``call_module`` node calls; without it such a node's first argument is ``input``
            and the others are those given by name.

    Raises:
        ArtifactError: no signature takes these arguments.
    """
    if node.op == "call_module":
        return _of_layer(node, layer)
    if _is_variadic(node):
        return _of_variadic(node)
    signatures = _signatures(node)
    given = _bound(node, signatures)
    return {_read_as(name): value for name, value in {**defaults(signatures, given), **given}.items()}


def source(node: fx.Node) -> Any:
    """The first argument of a call: the tensor it works on, or several of them."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def values_of(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with values in place of nodes."""
    found = {}
    for name, argument in given.items():
        found[name] = fx.node.map_aggregate(
            argument, lambda a: values[a.name] if isinstance(a, fx.Node) else a
        )
    return found


def compute(node: fx.Node, values: Mapping[str, Any]) -> Any:
    """Call what a node calls, with values in place of nodes."""

    def value(argument: Any) -> Any:
        return values[argument.name] if isinstance(argument, fx.Node) else argument

    return call(node, fx.node.map_aggregate(node.args, value), fx.node.map_aggregate(node.kwargs, value))


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Call what a node calls with other arguments in the places and under the names of its own."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def rewrite(node: fx.Node, name: str, given: Mapping[str, Any]) -> None:
    """Let a node call another operation.

    Args:
        node: changed in place.
        name: the operation.
        given: its arguments by name.

    Raises:
        ArtifactError: there is no such operation with these arguments.
    """
    spelled = _spelled(name, dict(given))
    if spelled is None:
        names = ", ".join(given)
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
    if _is_variadic(node):
        if name == "einsum":
            given = _of_variadic(node)
            node.args, node.kwargs = (given["equation"], *given["operands"]), {}
        return
    given = {_AXES.get(key, key): value for key, value in _bound(node, _signatures(node)).items()}
    spelled = _spelled(name, given)
    if spelled is None:  # no other spelling takes these: its own, with names
        by_place = dict.fromkeys(list(given)[:1]) if node.op == "call_method" else {}
        first = tuple(given[source_name] for source_name in by_place)
        spelled = (node.op, node.target, first, {k: v for k, v in given.items() if k not in by_place})
    node.op, node.target, node.args, node.kwargs = spelled


Spelled = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def _spelled(name: str, given: dict[str, Any]) -> Spelled | None:
    """The one spelling of an operation with these arguments: op, target, args, kwargs."""
    operands = {_OPERANDS.get(key, key): value for key, value in given.items()}
    if name in _OPERATORS and operands.pop("alpha", 1) == 1 and operands.keys() <= {"input", "other"}:
        both = tuple(operands[key] for key in ("input", "other") if key in operands)
        return "call_function", _OPERATORS[name], both, {}
    if name == "dim" and given.keys() == {"input"}:
        return "call_function", getattr, (given["input"], "ndim"), {}
    if name == "size" and given.keys() == {"input"}:
        return "call_function", getattr, (given["input"], "shape"), {}
    if name == "view" and given.keys() == {"input", "size"}:  # the same values, whatever the strides
        return _spelled("reshape", {"input": given["input"], "shape": given["size"]})
    if name == "view_as":
        return _spelled("reshape_as", given)
    if name == "to" and "other" in given:  # torch calls it "tensor"
        rest = {key: value for key, value in given.items() if key not in ("input", "other")}
        return "call_method", name, (given["input"], given["other"]), rest
    for prefix in ("F", "torch", "torchvision"):
        function = FUNCTIONS.get(f"{prefix}.{name}")
        for first in ("input", "tensor", "self"):
            renamed = {first if key == "input" else key: value for key, value in given.items()}
            if function is not None and bind(of_function(function), (), renamed) == renamed:
                return "call_function", function, (), renamed
    if name in METHODS and "input" in given:
        rest = {key: value for key, value in given.items() if key != "input"}
        return "call_method", name, (given["input"],), rest
    return None


def _signatures(node: fx.Node) -> tuple[Signature, ...]:
    if node.op == "call_method":
        return of_method(str(node.target))
    return of_function(cast("Any", node.target))


def _bound(node: fx.Node, signatures: tuple[Signature, ...]) -> dict[str, Any]:
    bound = _bound_to(node) if node.target == "to" else bind(signatures, node.args, node.kwargs)
    if bound is None:
        called = function_name(node.target) if node.op == "call_function" else f"Tensor.{node.target}"  # type: ignore[arg-type]
        raise ArtifactError(f"{called} takes no such arguments", where=owner_of(node))
    return {_read_as(key): value for key, value in bound.items()}


def _read_as(name: str) -> str:
    return "input" if name in ("tensor", "self") else name


def owner_of(node: fx.Node) -> str:
    """The path of the layer whose forward pass made a call, as far as tracing has noted it; else the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return next((str(path) for path, _ in reversed(stack) if path), node.name)


def _bound_to(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of ``Tensor.to``, whose first may be a type, a device or another tensor."""
    given: dict[str, Any] = {"input": node.args[0], **node.kwargs}
    if "tensor" in given:
        given["other"] = given.pop("tensor")
    rest = list(node.args[1:])
    for name in ("device", "dtype", "other"):
        if rest and _target_of_to(rest[0]) == name and name not in given:
            given[name] = rest.pop(0)
    given |= dict(zip(("non_blocking", "copy"), rest, strict=False))
    return given if len(rest) <= 2 else None


def _target_of_to(value: Any) -> str | None:
    """Which argument of ``Tensor.to`` a value given by place is."""
    if isinstance(value, fx.Node):
        is_fact = value.target is getattr and value.args[1] in ("device", "dtype")
        return str(value.args[1]) if is_fact else "other"
    if isinstance(value, torch.dtype):
        return "dtype"
    return "device" if isinstance(value, torch.device | str) else None


def _is_variadic(node: fx.Node) -> bool:
    return node.op == "call_function" and is_variadic(cast("Any", node.target))


def _of_variadic(node: fx.Node) -> dict[str, Any]:
    """The arguments of what takes any number of tensors, which stand by place or in a list."""
    if operation(node) != "einsum":
        listed = len(node.args) == 1 and isinstance(node.args[0], list | tuple)
        return {"tensors": node.args[0] if listed else node.args, **node.kwargs}
    equation, *operands = [*node.args, *node.kwargs.values()]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    return {"equation": equation, "operands": tuple(operands)}


@cache
def _forward(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _bound_layer(node: fx.Node, layer: nn.Module) -> inspect.BoundArguments:
    try:
        return _forward(type(layer).forward).bind(layer, *node.args, **node.kwargs)
    except TypeError as error:
        raise ArtifactError(f"{type(layer).__name__}: {error}", where=str(node.target)) from error


def _of_layer(node: fx.Node, layer: nn.Module | None) -> dict[str, Any]:
    if layer is None:
        return {"input": source(node), **(node.kwargs if node.args else {})}
    bound = _bound_layer(node, layer)
    bound.apply_defaults()
    names = list(_forward(type(layer).forward).parameters)[1:]
    return {name: bound.arguments[name] for name in names if name in bound.arguments}


def _by_place(node: fx.Node, root: nn.Module) -> None:
    """A layer's required arguments by place, in order, the others by name."""
    if len(node.args) == 1 and not node.kwargs:
        return
    layer = root.get_submodule(str(node.target))
    bound = _bound_layer(node, layer).arguments
    parameters = list(_forward(type(layer).forward).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    variable = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    if variable:
        return
    node.args = tuple(bound[name] for name in required)
    node.kwargs = {p.name: bound[p.name] for p in parameters if p.name in bound and p.name not in required}
