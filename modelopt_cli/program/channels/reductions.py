"""Sums, means and the like on labels, and the norms that are written out with them."""

from typing import Any

import torch
from torch import fx

from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.channels.ties import nothing
from modelopt_cli.program.channels.trace import Trace

STATISTICS = frozenset(["mean", "var", "std", "var_mean", "std_mean", "norm", "linalg.vector_norm"])
_CASTS = frozenset(["to", "type_as", "float", "double", "half", "bfloat16", "contiguous"])
_POWERS = frozenset(["pow", "square", "abs", "mul"])
_ARITHMETIC = frozenset(["add", "div", "clamp", "clamp_min", "sqrt", "rsqrt", "reciprocal"])


def reduce(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """Tie the channels that are read together, but for the statistics of a norm."""
    x, name, shape = t.labels(bound["input"]), operation(node), t.shapes[node.name]
    dims = bound.get("dim")
    if dims is None:
        return t.unsupported(node, bound, f"goes through {name} over all dimensions")
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)] or list(range(x.dim()))
    first = tuple(slice(0, 1) if d in dims else slice(None) for d in range(x.dim()))
    varying = set(t.ties.varying(x))
    if varying & set(dims) and is_of_norm(node):
        labels = nothing(x[first].shape) if varying <= set(dims) else x[first]
    else:
        labels = t.ties.mix(x, dims, f"goes through {name} over channels")[first]
    if isinstance(shape, tuple) and not isinstance(shape, torch.Size):
        return tuple(labels.reshape(part) for part in shape)  # places are of the channels of their values
    return labels.reshape(shape)


def normalize(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """``F.normalize``: channels that are zero add nothing to the norm of the others."""
    return t.labels(bound["input"])


def is_of_norm(node: fx.Node) -> bool:
    """True if a reduction's result only centres or scales the values that it is a statistic of.

    Then it is a part of a layer norm (Ba et al., 2016), an RMS norm (Zhang and Sennrich, 2019) or the like,
    and its statistic is that of the channels that are left.
    """
    return operation(node) in STATISTICS and _normalizes(node, _origin(source(node)), inverse=False)


def _normalizes(statistic: fx.Node, origin: Any, *, inverse: bool) -> bool:
    """True if a statistic leads only to others of the same values, and to those centred or scaled by it."""
    for user in statistic.users:
        others = [read for read in user.all_input_nodes if read is not statistic]
        name, divides = operation(user), _divides(user, statistic)
        if not others and name in {"getitem", "unsqueeze"} | _CASTS | _POWERS | _ARITHMETIC:
            if not _normalizes(user, origin, inverse=inverse != divides):
                return False
        elif [_origin(other) for other in others] != [origin] or not (
            name == "sub" or (name == "mul" and inverse) or (divides and not inverse)
        ):
            return False
    return True


def _divides(user: fx.Node, statistic: fx.Node) -> bool:
    """True if a call gives the inverse of a statistic, or something over it."""
    name = operation(user)
    if name in ("pow", "div"):
        other = arguments(user)["other"]
        return other is statistic if name == "div" else isinstance(other, int | float) and other < 0
    return name in ("rsqrt", "reciprocal")


def _origin(value: Any) -> Any:
    """The value that this one is worked out from, place by place: x for x, (x - mean(x)) and its square."""
    while isinstance(value, fx.Node):
        name, reads = operation(value), value.all_input_nodes
        centred = name == "sub" and len(reads) == 2 and _is_centre(reads[1], reads[0])
        if not centred and not (name in _CASTS | _POWERS and len(reads) == 1):
            break
        value = reads[0]
    return value


def _is_centre(node: fx.Node, values: fx.Node) -> bool:
    """True for the mean of values, or a view of it."""
    while operation(node) in ("getitem", "unsqueeze"):
        node = node.all_input_nodes[0]
    return operation(node) in STATISTICS and _origin(source(node)) is _origin(values)
