"""Rules for channels of functions that are called with weights, and of norms that have none."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx

from modelopt_cli.program.calls import operation
from modelopt_cli.program.channels import layer_rules
from modelopt_cli.program.channels.ties import nothing, spread
from modelopt_cli.program.channels.trace import Fetched, Rule, Trace

Bound = dict[str, Any]


def _path_of(t: Trace, weight: Any) -> str | None:
    """The path of the layer whose weight a fetched tensor is, if only functions work with it."""
    if not isinstance(weight, Fetched) or t.name_of(weight) in t.called:
        return None
    return weight.path.removesuffix(".weight")


def _has_bias(t: Trace, path: str, bias: Any) -> bool | None:
    """True for the bias below a path, or none at all; False for another value; None where both are there."""
    if bias is None or (isinstance(bias, Fetched) and bias.path == f"{path}.bias"):
        return True
    return None if t.has(f"{path}.bias") else False


def _plus(t: Trace, outputs: Tensor, bias: Any, dim: int) -> Tensor:
    """The labels of outputs to which a value along one dimension is added."""
    line = t.labels(bias)
    shape = [-1 if d == dim % outputs.dim() else 1 for d in range(outputs.dim())]
    return t.ties.combine(outputs, line.reshape(shape)).expand(outputs.shape)


def convolution(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """``F.conv2d`` and the like, of a fetched weight."""
    weight, bias, groups = bound["weight"], bound["bias"], bound["groups"]
    path, name, x = _path_of(t, weight), operation(node), t.labels(bound["input"])
    owns = None if path is None else _has_bias(t, path, bias)
    if path is None or owns is None or x.dim() != int(name[-2]) + 2:
        return t.unsupported(node, bound)
    transposed = "transpose" in name
    leaving = weight.tensor.shape[1] * groups if transposed else weight.tensor.shape[0]
    sizes, shape = (leaving, groups), t.shapes[node.name]
    result = layer_rules.convolve(t, path, sizes, x, shape, transposed=transposed, weight=weight.path)
    t.count(node, groups=t.fields[path].get("groups"))
    return result if owns else _plus(t, result, bias, 1)


def linear(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """``F.linear`` of a fetched weight."""
    path = _path_of(t, bound["weight"])
    owns = None if path is None else _has_bias(t, path, bound["bias"])
    if path is None or owns is None or bound["weight"].tensor.dim() != 2:
        return t.unsupported(node, bound)
    x, weight = t.labels(bound["input"]), bound["weight"].path
    result = layer_rules.linear(t, path, None, x, t.shapes[node.name], weight)
    return result if owns else _plus(t, result, bound["bias"], -1)


def embedding(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """``F.embedding`` of a fetched table."""
    weight = bound["weight"]
    if not isinstance(weight, Fetched) or t.name_of(weight) in t.called:
        return t.unsupported(node, bound)
    t.ties.freeze(t.labels(bound["input"]), "is used as an index")
    outputs = t.ties.fresh(f"columns {weight.path}", weight.tensor.shape[1])
    t.slot(weight.path, 0, nothing(weight.tensor.shape[:1]), "in")
    t.slot(weight.path, 1, outputs, "out")
    return spread(outputs, -1, t.shapes[node.name])


def prelu(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """``F.prelu`` with fetched slopes."""
    x, weight = t.labels(bound["input"]), bound["weight"]
    if not isinstance(weight, Fetched) or t.name_of(weight) in t.called:
        return t.unsupported(node, bound)
    if weight.tensor.numel() > 1:
        t.slot(weight.path, 0, t.ties.line(x, 1), "norm")
    return x


def norm(rule: Any, *, of_last_dims: bool = False) -> Rule:
    """The rule of a norm, which a layer has, for a function.

    Its parameters are found below one path. Over the last dimensions they may be any values.
    """

    def apply(t: Trace, node: fx.Node, bound: Bound) -> Any:
        given = {name: bound[name] for name in _OF_NORMS if bound.get(name) is not None}
        path = _path_of(t, given.get("weight"))
        owns = path is not None and all(_is_own(path, name, value) for name, value in given.items())
        if given and not owns and not of_last_dims:
            return t.unsupported(node, bound)
        path = path if owns and path else f"function {node.name}"
        x, shape = t.labels(bound["input"]), t.shapes[node.name]
        result = rule(t, path, SimpleNamespace(**bound, num_channels=x.shape[1]), x, shape)
        t.count(node, num_groups=t.fields.get(path, {}).get("num_groups"))
        for value in () if owns else given.values():
            result = t.ties.combine(result, t.labels(value)).expand(shape)
        return result

    return apply


_OF_NORMS = ("weight", "bias", "running_mean", "running_var")


def _is_own(path: str, name: str, value: Any) -> bool:
    return isinstance(value, Fetched) and value.path == f"{path}.{name}"
