"""Rules for channels, by kind of layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program.calls import arguments, values_of
from modelopt_cli.program.channels.recurrent_rules import cell, recurrent
from modelopt_cli.program.channels.ties import nothing, spread
from modelopt_cli.program.channels.trace import Trace
from modelopt_cli.program.layer_kinds import row_of


@dataclass(frozen=True)
class LayerRule:
    """A way for a layer to treat channels.

    Attributes:
        labels: labels of its output, from the trace, the layer's path, the layer, its input's labels and the
            shape of its output. It gives the layer's parameters their slots.
        any_rank: it holds without a batch dimension, too.
        others: names of further arguments that the layer can take; ``labels`` gets those given, by name.
    """

    labels: Callable[..., Any]
    any_rank: bool = False
    others: tuple[str, ...] = ()


def apply_layer(trace: Trace, node: fx.Node) -> Any:
    """Labels of a layer's output; slots for its parameters."""
    layer = trace.program.get_submodule(str(node.target))
    rule = RULES.get(row_of(layer).channels or "")
    (_, first), *others = arguments(node, layer).items()
    given = {name: value for name, value in others if value is not None}
    bound = values_of({"first": first, **given}, trace.values)
    if rule is None or not given.keys() <= set(rule.others):
        return trace.unsupported(node, bound)
    for value in given.values():
        trace.size(value)
    x, shape = trace.labels(bound.pop("first")), trace.shapes[node.name]
    rank = _RANKS.get(type(layer).__name__[-2:])
    if rank is not None and x.dim() != rank and not rule.any_rank:
        return trace.unsupported(node, {"first": x, **bound}, "has no batch dimension")
    return rule.labels(trace, str(node.target), layer, x, shape, **bound)


_RANKS = {"1d": 3, "2d": 4, "3d": 5}


def convolve(
    t: Trace,
    key: str,
    sizes: tuple[int, int],
    x: Tensor,
    shape: Any,
    *,
    transposed: bool = False,
    weight: str | None = None,
) -> Tensor:
    """A convolution with the parameters ``key.weight``, or ``weight``, and ``key.bias``.

    With several groups, the same places of every group go together, so that groups stay equally large.
    Where a group has a single input or output (depthwise), whole groups go.

    Args:
        t: the trace.
        key: path of the layer.
        sizes: output channels and groups.
        x: input labels ``(1, in, ...)``.
        shape: of the output.
        transposed: the weight is ``(in, out / groups, ...)`` rather than ``(out, in / groups, ...)``.
        weight: full name of the weight, if it is called otherwise.
    """
    leaving, groups = sizes
    weight = weight or f"{key}.weight"
    inputs, outputs = t.ties.line(x, 1), t.ties.fresh(key, leaving)
    by_group, out_by_group = inputs.view(groups, -1), outputs.view(groups, -1)
    whole_groups = groups > 1 and min(by_group.shape[1], out_by_group.shape[1]) == 1
    if whole_groups:
        t.ties.same(by_group, by_group[:, :1])
        t.ties.same(out_by_group, by_group[:, :1])
    elif groups > 1:
        t.ties.same(by_group, by_group[:1])
        t.ties.same(out_by_group, out_by_group[:1])
    t.fields[key] = {"in_channels": inputs, "out_channels": outputs}
    if whole_groups:
        t.fields[key]["groups"] = by_group[:, 0]
        t.slot(weight, 0, inputs if transposed else outputs, "out")
    elif transposed:
        t.slot(weight, 0, inputs, "in")
        t.slot(weight, 1, out_by_group[0], "out")
    else:
        t.slot(weight, 0, outputs, "out")
        t.slot(weight, 1, by_group[0], "in")
    t.slot(f"{key}.bias", 0, outputs, "bias")
    return spread(outputs, 1, shape)


def _conv(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    return convolve(t, path, (layer.out_channels, layer.groups), x, shape, transposed=layer.transposed)


def linear(t: Trace, path: str, layer: Any, x: Tensor, shape: Any, weight: str | None = None) -> Tensor:
    """A linear layer with the parameters ``path.weight``, or ``weight``, and ``path.bias``."""
    weight = weight or f"{path}.weight"
    inputs, outputs = t.ties.line(x, -1), t.ties.fresh(path, shape[-1])
    t.fields[path] = {"in_features": inputs, "out_features": outputs}
    t.slot(weight, 0, outputs, "out")
    t.slot(weight, 1, inputs, "in")
    t.slot(f"{path}.bias", 0, outputs, "bias")
    return spread(outputs, -1, shape)


def _embedding(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    t.ties.freeze(x, "is used as an index")
    outputs = t.ties.fresh(path, layer.embedding_dim)
    t.fields[path] = {"embedding_dim": outputs}
    t.slot(f"{path}.weight", 0, nothing((layer.num_embeddings,)), "in")  # also where a linear layer has it
    t.slot(f"{path}.weight", 1, outputs, "out")
    return spread(outputs, -1, shape)


def channel_norm(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    """Batch and instance norm: each channel on its own."""
    line = t.ties.line(x, 1)
    t.fields[path] = {"num_features": line}
    _norm_slots(t, path, line)
    return spread(line, 1, shape)


def _norm_slots(t: Trace, path: str, line: Tensor) -> None:
    t.slot(f"{path}.weight", 0, line, "norm")
    t.slot(f"{path}.bias", 0, line, "bias")
    for name in ("running_mean", "running_var"):
        t.slot(f"{path}.{name}", 0, line, "statistic")


def group_norm(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    """Group norm: the same places of every group go together, or whole groups of one channel."""
    line = t.ties.line(x, 1)
    t.fields[path] = {"num_channels": line}
    if layer.num_groups == layer.num_channels:
        t.fields[path]["num_groups"] = line
    else:
        grouped = line.view(layer.num_groups, -1)
        t.ties.same(grouped, grouped[:1])
    _norm_slots(t, path, line)
    return spread(line, 1, shape)


def last_dims_norm(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    """Layer and RMS norm over the last dimensions; their statistics are those of the channels left.

    What varies along the dimensions before, as heads do, is normalized apart.
    """
    rank = len(layer.normalized_shape)
    if min(t.ties.varying(x), default=x.dim()) < x.dim() - rank:
        return x
    block = t.ties.product(x[(0,) * (x.dim() - rank)])
    varying = t.ties.varying(block)
    sizes = list(layer.normalized_shape)
    t.fields[path] = {
        "normalized_shape": [t.ties.line(block, d) if d in varying else sizes[d] for d in range(rank)]
    }
    t.block(f"{path}.weight", block, "norm")
    t.block(f"{path}.bias", block, "bias")
    return x


def _prelu(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    if layer.num_parameters == 1:
        return x
    line = t.ties.line(x, 1)
    t.fields[path] = {"num_parameters": line}
    t.slot(f"{path}.weight", 0, line, "norm")
    return spread(line, 1, shape)


def _over_channels(t: Trace, path: str, x: Tensor, dim: int) -> Tensor:
    return t.ties.mix(x, [dim], f"is mixed by {path}")


def _softmax(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    dims = range(x.dim()) if layer.dim is None else [layer.dim]
    return t.ties.mix(x, dims, f"is mixed by {path}")


def pool(t: Trace, x: Tensor, shape: Any, dims: int) -> Any:
    """Something that works on the last ``dims`` dimensions and leaves channels apart.

    With several shapes, such as those of a pool's values and of their places, there are as many results.
    """
    x = t.ties.mix(x, range(x.dim() - dims, x.dim()))
    x = x[tuple(slice(None) if d < x.dim() - dims else slice(0, 1) for d in range(x.dim()))]
    return x.expand(shape) if isinstance(shape, torch.Size) else tuple(x.expand(part) for part in shape)


def unpool(t: Trace, x: Tensor, indices: Tensor, shape: Any) -> Tensor:
    """Values put back to their places in each channel's map."""
    return pool(t, t.ties.combine(x, indices), shape, x.dim() - 2)  # type: ignore[no-any-return]


def glu(t: Trace, x: Tensor, dim: int) -> Tensor:
    """One half times the sigmoid of the other."""
    first, second = x.chunk(2, dim)
    t.ties.same(first, second)
    return first


def pixel_shuffle(t: Trace, x: Tensor, shape: Any) -> Tensor:
    """All the channels that become one are tied."""
    grouped = t.ties.line(x, -3).view(shape[-3], -1)
    t.ties.same(grouped, grouped[:, :1])
    return spread(grouped[:, 0], -3, shape)


def repeated(t: Trace, x: Tensor, dim: int, shape: Any) -> Tensor:
    """Each channel becomes several neighbouring ones."""
    line = t.ties.line(x, dim)
    return spread(line.repeat_interleave(shape[dim] // len(line)), dim, shape)


def fold(t: Trace, x: Tensor, shape: Any) -> Tensor:
    """Sums neighbourhoods: the channels of one kernel are tied."""
    grouped = t.ties.line(x, 1).view(shape[1], -1)
    t.ties.same(grouped, grouped[:, :1])
    return spread(grouped[:, 0], 1, shape)


def pad(t: Trace, key: str, x: Tensor, pads: list[int]) -> Tensor:
    """Padding; what is added to a dimension of channels becomes channels that no layer makes."""
    for i in range(len(pads) // 2):
        d, (before, after) = x.dim() - 1 - i, pads[2 * i : 2 * i + 2]
        varying = t.ties.varying(x)
        if d not in varying or min(before, after) < 0:
            x = t.ties.mix(x, [d])
            x = x.narrow(d, 0, 1).expand([*x.shape[:d], x.shape[d] + before + after, *x.shape[d + 1 :]])
            continue
        sizes = [before + after if e == d else n for e, n in enumerate(x.shape)]
        own = [n if e == d or e in varying else 1 for e, n in enumerate(sizes)]
        new = t.ties.fresh(f"pad {key} {d} {own}", math.prod(own)).view(own).expand(sizes)
        first, last = new.split([before, after], d)
        x = torch.cat([first, x, last], d)
    return x


def _channel_shuffle(t: Trace, path: str, layer: Any, x: Tensor, shape: Any) -> Tensor:
    return torch.channel_shuffle(x.contiguous(), layer.groups)


RULES: dict[str, LayerRule] = {
    "conv": LayerRule(_conv),
    "linear": LayerRule(linear),
    "embedding": LayerRule(_embedding),
    "channel_norm": LayerRule(channel_norm, any_rank=True),
    "group_norm": LayerRule(group_norm),
    "last_dims_norm": LayerRule(last_dims_norm),
    "prelu": LayerRule(_prelu),
    "same": LayerRule(lambda t, path, layer, x, shape: x, any_rank=True),
    "response_norm": LayerRule(lambda t, path, layer, x, shape: _over_channels(t, path, x, 1)),
    "softmax_2d": LayerRule(lambda t, path, layer, x, shape: _over_channels(t, path, x, -3)),
    "softmax": LayerRule(_softmax),
    "spatial": LayerRule(lambda t, path, layer, x, shape: pool(t, x, shape, x.dim() - 2)),
    "reshape": LayerRule(lambda t, path, layer, x, shape: x.reshape(shape)),
    "glu": LayerRule(lambda t, path, layer, x, shape: glu(t, x, layer.dim)),
    "pixel_shuffle": LayerRule(lambda t, path, layer, x, shape: pixel_shuffle(t, x, shape)),
    "pixel_unshuffle": LayerRule(lambda t, path, layer, x, shape: repeated(t, x, -3, shape)),
    "unfold": LayerRule(lambda t, path, layer, x, shape: repeated(t, x, 1, shape)),
    "fold": LayerRule(lambda t, path, layer, x, shape: fold(t, x, shape)),
    "channel_shuffle": LayerRule(_channel_shuffle),
    "unpool": LayerRule(
        lambda t, path, layer, x, shape, indices, output_size=None: unpool(t, x, t.labels(indices), shape),
        others=("indices", "output_size"),
    ),
    "recurrent": LayerRule(recurrent, others=("hx",)),
    "cell": LayerRule(cell, others=("hx",)),
}
"""Rule by the name that a kind's row has for it (``program.layer_kinds``)."""
