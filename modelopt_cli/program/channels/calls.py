"""What a node of a graph calls, and with what."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from modelopt_cli.program.allowlist import function_name


def arguments(node: fx.Node, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with values in place of nodes."""

    def value(argument: Any) -> Any:
        return values[argument.name] if isinstance(argument, fx.Node) else argument

    args: Any = fx.node.map_aggregate(node.args, value)
    kwargs: Any = fx.node.map_aggregate(node.kwargs, value)
    return args, kwargs


def argument(args: Any, kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    """One argument, given by place or by name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls: ``add`` for ``torch.add``, ``Tensor.add_``, ``operator.iadd``."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = (function_name(node.target) or "").rpartition(".")[2]  # type: ignore[arg-type]
    else:
        return ""
    return _SAME.get(name, name).removesuffix("_")


_SAME = {
    **{"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "divide": "div"},
    **{"true_divide": "div", "subtract": "sub", "multiply": "mul", "concat": "cat", "concatenate": "cat"},
    **{"swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "and_": "and", "or_": "or"},
}


def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what a node calls."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
