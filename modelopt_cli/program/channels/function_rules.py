"""Rules for channels, by function and tensor method."""

from typing import Any

import torch
from torch import fx

from modelopt_cli.program.calls import compute, operation
from modelopt_cli.program.channels import layer_rules, weight_rules
from modelopt_cli.program.channels.indexing import by_dimension, getitem, index_select, select, unbind
from modelopt_cli.program.channels.products import added_product, attention, einsum, matmul
from modelopt_cli.program.channels.reductions import STATISTICS, normalize, reduce
from modelopt_cli.program.channels.ties import nothing, spread
from modelopt_cli.program.channels.trace import CONSTANTS, Fetched, Rule, Trace, tensors_in

Bound = dict[str, Any]


def _elementwise(t: Trace, node: fx.Node, bound: Bound) -> Any:
    first, *others = [t.labels(value) for value in tensors_in(bound)]
    for other in others:
        first = t.ties.combine(first, other)
    return first.expand(t.shapes[node.name])


def _first(t: Trace, node: fx.Node, bound: Bound) -> Any:
    return t.labels(bound["input"])


def _shape_only(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """Run as it is, on labels."""
    values = {a.name: t.values[a.name] for a in node.all_input_nodes}
    return compute(node, {name: t.labels(v) if isinstance(v, Fetched) else v for name, v in values.items()})


def _repeat_interleave(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """Repetition by one count for all; by computed counts nobody knows how often a channel is repeated."""
    return _shape_only(t, node, bound) if isinstance(bound["repeats"], int) else t.unsupported(node, bound)


def _roll(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """Channels rolled along their own dimension alone become an ``index_select``, or stay."""
    x = t.labels(bound["input"])
    dims = bound["dims"] or range(x.dim())
    dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    if (len(dims) > 1 or not bound["dims"]) and dims & set(t.ties.varying(x)):
        return t.unsupported(node, bound, "goes through roll over channels and other dimensions at once")
    return _shape_only(t, node, bound)


def _join(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """``cat`` and ``stack``: along the other dimensions the parts go together."""
    parts, dim = [t.labels(part) for part in bound["tensors"]], bound["dim"]
    parts = [part for part in parts if part.numel()] or parts  # one without elements can have any shape
    if operation(node) == "stack":
        parts, dim = [part.unsqueeze(dim) for part in parts], dim % (parts[0].dim() + 1)
    dim %= parts[0].dim()
    tied = [d for d in range(parts[0].dim()) if d != dim and any(d in t.ties.varying(p) for p in parts)]
    if tied:
        parts = [t.ties.mix(part, [dim]) for part in parts]
        for part in parts[1:]:
            t.ties.same(parts[0].narrow(dim, 0, 1), part.narrow(dim, 0, 1))
    return torch.cat(parts, dim)


def _extremes(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """``max`` and ``min``, of two values or over a dimension of one."""
    return (_elementwise if len(tensors_in(bound)) > 1 else reduce)(t, node, bound)


def _mixing(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """Softmax and what else keeps the shape but reads a whole dimension."""
    x, name, dim = t.labels(bound["input"]), operation(node), bound["dim"]
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    return t.ties.mix(x, dims, f"goes through {name} over channels")


def _pool(t: Trace, node: fx.Node, bound: Bound) -> Any:
    x, name, shape = t.labels(bound["input"]), operation(node), t.shapes[node.name]
    ranked = name.removesuffix("_with_indices")
    dims = int(ranked[-2]) if ranked.endswith("d") else x.dim() - 2
    if x.dim() != dims + 2:
        return t.unsupported(node, bound)
    if "indices" in bound:
        return layer_rules.unpool(t, x, t.labels(bound["indices"]), shape)
    return layer_rules.pool(t, x, shape, dims)


def _pad(t: Trace, node: fx.Node, bound: Bound) -> Any:
    x, pads = t.labels(bound["input"]), bound["pad"]
    padded = {x.dim() - 1 - i // 2 for i, amount in enumerate(pads) if amount}
    if bound["mode"] != "constant" and padded & set(t.ties.varying(x)):
        return t.unsupported(node, bound)
    return layer_rules.pad(t, node.name, x, list(pads))


def _set_item(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """A copy with other values at some places, which are those of all its channels."""
    x, index, value = t.labels(bound["input"]), bound["index"], bound["value"]
    by_dim = by_dimension(index if isinstance(index, tuple) else (index,), x.dim())
    whole = all(by_dim.get(d, slice(None)) == slice(None) for d in t.ties.varying(x))
    if not whole or tensors_in(index):
        return t.unsupported(node, bound, "has values assigned to a part of its channels")
    if isinstance(value, torch.Tensor | Fetched):
        labels, part = t.labels(value), x[index]
        t.ties.combine(part, labels)
    return x


def _windows(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """``Tensor.unfold``: windows along one dimension; ``F.unfold``: windows of maps, as channels."""
    x = t.labels(bound["input"])
    if "kernel_size" in bound:
        return layer_rules.repeated(t, x, 1, t.shapes[node.name])
    if bound["dimension"] % x.dim() in t.ties.varying(x):
        return t.unsupported(node, bound, "goes through unfold over channels")
    return x.unfold(bound["dimension"], bound["size"], bound["step"])


def _fold(t: Trace, node: fx.Node, bound: Bound) -> Any:
    return layer_rules.fold(t, t.labels(bound["input"]), t.shapes[node.name])


def _getattr(t: Trace, node: fx.Node, bound: Bound) -> Any:
    value, name = bound["input"], bound["name"]
    if name in ("T", "mT", "H"):
        return getattr(t.labels(value), name)
    return getattr(value.tensor if isinstance(value, Fetched) else value, name)


def _patch_merging(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """The four neighbours of Swin's patch merging, one after another."""
    return spread(t.ties.line(t.labels(bound["x"]), -1).repeat(4), -1, t.shapes[node.name])


def _position_bias(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """A table ``(relative places, heads)`` as ``(1, heads, places, places)``."""
    table = t.labels(bound["relative_position_bias_table"])
    return spread(t.ties.line(table, -1), 1, t.shapes[node.name])


def _like(t: Trace, node: fx.Node, bound: Bound) -> Any:
    return t.labels(bound["input"])


def _made(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """Constants; those that a layer needs in the size of its channels have some that no layer makes."""
    shape = t.shapes[node.name]
    if node.name not in t.sized:
        return nothing(shape)
    return t.ties.fresh(f"constant {node.name}", shape.numel()).view(shape)


def _fact(t: Trace, node: fx.Node, bound: Bound) -> Any:
    values = {a.name: t.values[a.name] for a in node.all_input_nodes}
    return compute(node, {name: v.tensor if isinstance(v, Fetched) else v for name, v in values.items()})


def _pixels(t: Trace, node: fx.Node, bound: Bound) -> Any:
    x, shape = t.labels(bound["input"]), t.shapes[node.name]
    if operation(node) == "pixel_shuffle":
        return layer_rules.pixel_shuffle(t, x, shape)
    return layer_rules.repeated(t, x, -3, shape)


def _channel_shuffle(t: Trace, node: fx.Node, bound: Bound) -> Any:
    return torch.channel_shuffle(t.labels(bound["input"]).contiguous(), bound["groups"])


def _glu(t: Trace, node: fx.Node, bound: Bound) -> Any:
    return layer_rules.glu(t, t.labels(bound["input"]), bound["dim"])


_NAMES: dict[Rule, str] = {
    _elementwise: """
        relu relu6 elu selu celu leaky_relu rrelu gelu silu mish softplus softsign softshrink hardshrink
        tanhshrink threshold hardtanh hardswish hardsigmoid sigmoid tanh logsigmoid neg pos abs
        square sqrt rsqrt reciprocal exp expm1 log log1p log2 sin cos tan atan erf sign round floor ceil
        clamp clamp_min clamp_max add sub mul div floor_divide remainder pow minimum
        maximum lt le eq ne gt ge and or xor invert logical_and logical_or logical_not where masked_fill
        addcmul addcdiv lerp fmod fmin fmax atan2 hypot logaddexp exp2 log10 logit sinh cosh asin acos asinh
        acosh atanh erfc trunc frac nan_to_num isnan isinf isfinite
    """,
    _first: """
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth
        drop_block2d drop_block3d contiguous clone detach float double half bfloat16 int long bool to type_as
    """,
    _shape_only: """
        reshape flatten unflatten permute transpose t movedim squeeze unsqueeze expand expand_as repeat
        tile broadcast_to chunk split tensor_split narrow flip reshape_as
    """,
    _repeat_interleave: "repeat_interleave",
    _roll: "roll",
    select: "select",
    unbind: "unbind",
    _join: "cat stack",
    getitem: "getitem",
    index_select: "index_select",
    reduce: f"{' '.join(sorted(STATISTICS))} sum prod amax amin argmax argmin logsumexp",
    _extremes: "max min",
    normalize: "normalize",
    _mixing: "softmax log_softmax softmin cumsum",
    _pool: """
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool1d lp_pool2d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d interpolate max_unpool1d max_unpool2d max_unpool3d
        max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    """,
    _pad: "pad",
    _set_item: "set_item",
    _windows: "unfold",
    _fold: "fold",
    _getattr: "getattr",
    _patch_merging: "_patch_merging_pad",
    _position_bias: "_get_relative_position_bias",
    _like: "zeros_like ones_like full_like",
    _made: " ".join(sorted(CONSTANTS)),
    _fact: "size numel",
    weight_rules.convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    weight_rules.linear: "linear",
    weight_rules.embedding: "embedding",
    weight_rules.prelu: "prelu",
    _pixels: "pixel_shuffle pixel_unshuffle",
    _channel_shuffle: "channel_shuffle",
    _glu: "glu",
    weight_rules.norm(layer_rules.channel_norm): "batch_norm instance_norm",
    weight_rules.norm(layer_rules.last_dims_norm, of_last_dims=True): "layer_norm rms_norm",
    weight_rules.norm(layer_rules.group_norm): "group_norm",
    einsum: "einsum",
    matmul: "matmul bmm mm",
    added_product: "addmm baddbmm",
    attention: "scaled_dot_product_attention",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""Bare name of a function or method to how it treats channels."""
ELEMENTWISE = frozenset(_NAMES[_elementwise].split())
"""Functions whose results depend, place by place, on the values there alone."""
