"""Reading the calls of a graph: which operation, and its arguments by name.

The same operation can be written as a function of torch's, of ``torch.nn.functional``'s, as a tensor method
or as a Python operator; its arguments by place or by name, under NumPy's names or torch's. What reads a graph
asks for ``operation(node)`` and ``arguments(node)`` and knows all there is to know of a call, whatever its
spelling; ``spelling`` brings every Program into one.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.allowlist import function_name
from modelopt_cli.program.call_signatures import (
    Signature,
    bind,
    defaults,
    is_variadic,
    of_function,
    of_method,
)

# Names of one operation, and the one it has here.
SAME = {
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
        return SAME[bare]
    bare = bare.removesuffix("_")
    return SAME.get(bare, bare)


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
    if is_variadic_call(node):
        return variadic_arguments(node)
    signatures = _signatures(node)
    named = bound_arguments(node)
    return {_read_as(name): value for name, value in {**defaults(signatures, named), **named}.items()}


def source(node: fx.Node) -> Any:
    """The first argument of a call: the tensor it works on, or several of them."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def values_of(named: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with values in place of nodes."""
    known = {}
    for name, argument in named.items():
        known[name] = fx.node.map_aggregate(
            argument, lambda a: values[a.name] if isinstance(a, fx.Node) else a
        )
    return known


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


def _signatures(node: fx.Node) -> tuple[Signature, ...]:
    if node.op == "call_method":
        return of_method(str(node.target))
    return of_function(cast("Any", node.target))


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that a call gives, by name.

    Raises:
        ArtifactError: no signature takes them.
    """
    signatures = _signatures(node)
    bound = _bound_to(node) if node.target == "to" else bind(signatures, node.args, node.kwargs)
    if bound is None:
        called = function_name(node.target) if node.op == "call_function" else f"Tensor.{node.target}"  # type: ignore[arg-type]
        raise ArtifactError(f"{called} takes no such arguments", where=owner_of(node))
    return {_read_as(key): value for key, value in bound.items()}


def _read_as(name: str) -> str:
    return "input" if name in ("tensor", "self") else name


def shown_name(node: fx.Node) -> str:
    """A node in a message: the path of its layer or tensor, or the name of a call in the graph."""
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def owner_of(node: fx.Node) -> str:
    """The path of the layer whose forward pass made a call, as far as tracing has noted it; else the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return next((str(path) for path, _ in reversed(stack) if path), node.name)


def _bound_to(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of ``Tensor.to``, whose first may be a type, a device or another tensor."""
    named: dict[str, Any] = {"input": node.args[0], **node.kwargs}
    if "tensor" in named:
        named["other"] = named.pop("tensor")
    positional = list(node.args[1:])
    for name in ("device", "dtype", "other"):
        if positional and _target_of_to(positional[0]) == name and name not in named:
            named[name] = positional.pop(0)
    named |= dict(zip(("non_blocking", "copy"), positional, strict=False))
    return named if len(positional) <= 2 else None


def _target_of_to(value: Any) -> str | None:
    """Name of the argument of ``Tensor.to`` that a value given by place is."""
    if isinstance(value, fx.Node):
        is_fact = value.target is getattr and value.args[1] in ("device", "dtype")
        return str(value.args[1]) if is_fact else "other"
    if isinstance(value, torch.dtype):
        return "dtype"
    return "device" if isinstance(value, torch.device | str) else None


def is_variadic_call(node: fx.Node) -> bool:
    """True if a call is of a function that takes any number of tensors by place, as einsum does."""
    return node.op == "call_function" and is_variadic(cast("Any", node.target))


def variadic_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of what takes any number of tensors, which stand by place or in a list."""
    if operation(node) != "einsum":
        listed = len(node.args) == 1 and isinstance(node.args[0], list | tuple)
        return {"tensors": node.args[0] if listed else node.args, **node.kwargs}
    equation, *operands = [*node.args, *node.kwargs.values()]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    return {"equation": equation, "operands": tuple(operands)}


@cache
def forward_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a layer's ``forward``."""
    return inspect.signature(forward)


def bound_layer(node: fx.Node, layer: nn.Module) -> inspect.BoundArguments:
    """The arguments of a layer's call, by the names of its ``forward``.

    Raises:
        ArtifactError: its ``forward`` takes no such arguments.
    """
    try:
        return forward_of(type(layer).forward).bind(layer, *node.args, **node.kwargs)
    except TypeError as error:
        raise ArtifactError(f"{type(layer).__name__}: {error}", where=str(node.target)) from error


def _of_layer(node: fx.Node, layer: nn.Module | None) -> dict[str, Any]:
    if layer is None:
        return {"input": source(node), **(node.kwargs if node.args else {})}
    bound = bound_layer(node, layer)
    bound.apply_defaults()
    names = list(forward_of(type(layer).forward).parameters)[1:]
    return {name: bound.arguments[name] for name in names if name in bound.arguments}
