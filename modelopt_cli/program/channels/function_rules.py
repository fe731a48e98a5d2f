"""Rules for channels, by function and tensor method."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from modelopt_cli.program.calls import compute, operation
from modelopt_cli.program.channels import layer_rules
from modelopt_cli.program.channels.indexing import getitem, index_select, select, unbind
from modelopt_cli.program.channels.products import attention, einsum, matmul
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
    """By one count for all; how often a channel is repeated by counts that are computed, nobody knows."""
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


def _reduce(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """Sums, means and the like: what is read together can only stay or go together."""
    x, name, shape = t.labels(bound["input"]), operation(node), t.shapes[node.name]
    if name in ("max", "min") and len(tensors_in(bound)) > 1:
        return _elementwise(t, node, bound)
    dims = bound.get("dim")
    if dims is None:
        return t.unsupported(node, bound, f"goes through {name} over all dimensions")
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)] or list(range(x.dim()))
    x = t.ties.mix(x, dims, f"goes through {name} over channels")
    x = x[tuple(slice(0, 1) if d in dims else slice(None) for d in range(x.dim()))]
    if isinstance(shape, tuple) and not isinstance(shape, torch.Size):
        return x.reshape(shape[0]), x.reshape(shape[1])  # places are of the channels that their values are of
    return x.reshape(shape)


def _mixing(t: Trace, node: fx.Node, bound: Bound) -> Any:
    """Softmax and what else keeps the shape but reads a whole dimension."""
    x, name, dim = t.labels(bound["input"]), operation(node), bound["dim"]
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    return t.ties.mix(x, dims, f"goes through {name} over channels")


def _pool(t: Trace, node: fx.Node, bound: Bound) -> Any:
    x, name, shape = t.labels(bound["input"]), operation(node), t.shapes[node.name]
    dims = int(name[-2]) if name.endswith("d") else x.dim() - 2
    if not isinstance(shape, torch.Size) or x.dim() != dims + 2:
        return t.unsupported(node, bound)
    return layer_rules.pool(t, x, shape, dims)


def _pad(t: Trace, node: fx.Node, bound: Bound) -> Any:
    x, pads = t.labels(bound["input"]), bound["pad"]
    padded = {x.dim() - 1 - i // 2 for i, amount in enumerate(pads) if amount}
    if bound["mode"] != "constant" and padded & set(t.ties.varying(x)):
        return t.unsupported(node, bound)
    return layer_rules.pad(t, node.name, x, list(pads))


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


def _layer_of(t: Trace, weight: Any, bias: Any) -> str | None:
    """The path of the layer whose fetched weight and bias these are, if only functions work with them."""
    if (
        not isinstance(weight, Fetched)
        or not weight.path.endswith(".weight")
        or t.name_of(weight) in t.called
    ):
        return None
    path = weight.path.removesuffix(".weight")
    return path if bias is None or (isinstance(bias, Fetched) and bias.path == f"{path}.bias") else None


def _convolution(t: Trace, node: fx.Node, bound: Bound) -> Any:
    weight = bound["weight"]
    path, name, x = _layer_of(t, weight, bound["bias"]), operation(node), t.labels(bound["input"])
    transposed = "transpose" in name
    groups = bound["groups"]
    if path is None or groups != 1 or x.dim() != int(name[-2]) + 2:
        return t.unsupported(node, bound)
    sizes = (weight.tensor.shape[1 if transposed else 0], groups)
    return layer_rules.convolve(t, path, sizes, x, t.shapes[node.name], transposed=transposed)


def _linear(t: Trace, node: fx.Node, bound: Bound) -> Any:
    path = _layer_of(t, bound["weight"], bound["bias"])
    if path is None or bound["weight"].tensor.dim() != 2:
        return t.unsupported(node, bound)
    return layer_rules.linear(t, path, None, t.labels(bound["input"]), t.shapes[node.name])


def _embedding(t: Trace, node: fx.Node, bound: Bound) -> Any:
    weight = bound["weight"]
    if not isinstance(weight, Fetched) or t.name_of(weight) in t.called:
        return t.unsupported(node, bound)
    t.ties.freeze(t.labels(bound["input"]), "is used as an index")
    outputs = t.ties.fresh(f"columns {weight.path}", weight.tensor.shape[1])
    t.slot(weight.path, 0, nothing(weight.tensor.shape[:1]), "in")
    t.slot(weight.path, 1, outputs, "out")
    return spread(outputs, -1, t.shapes[node.name])


def _prelu(t: Trace, node: fx.Node, bound: Bound) -> Any:
    x, weight = t.labels(bound["input"]), bound["weight"]
    if not isinstance(weight, Fetched) or t.name_of(weight) in t.called:
        return t.unsupported(node, bound)
    if weight.tensor.numel() > 1:
        t.slot(weight.path, 0, t.ties.line(x, 1), "norm")
    return x


def _pixels(t: Trace, node: fx.Node, bound: Bound) -> Any:
    x, shape = t.labels(bound["input"]), t.shapes[node.name]
    if operation(node) == "pixel_shuffle":
        return layer_rules.pixel_shuffle(t, x, shape)
    return layer_rules.repeated(t, x, -3, shape)


def _channel_shuffle(t: Trace, node: fx.Node, bound: Bound) -> Any:
    return torch.channel_shuffle(t.labels(bound["input"]).contiguous(), bound["groups"])


def _glu(t: Trace, node: fx.Node, bound: Bound) -> Any:
    return layer_rules.glu(t, t.labels(bound["input"]), bound["dim"])


def _norm_call(rule: Any) -> Rule:
    def apply(t: Trace, node: fx.Node, bound: Bound) -> Any:
        path = _layer_of(t, bound.get("weight"), bound.get("bias"))
        statistics = {name: bound.get(name) for name in ("running_mean", "running_var")}
        own = all(
            isinstance(value, Fetched) and value.path == f"{path}.{name}"
            for name, value in statistics.items()
            if value is not None
        )
        if path is None or not own:
            return t.unsupported(node, bound)
        layer = SimpleNamespace(normalized_shape=bound.get("normalized_shape"))
        return rule(t, path, layer, t.labels(bound["input"]), t.shapes[node.name])

    return apply


_NAMES: dict[Rule, str] = {
    _elementwise: """
        relu relu6 elu selu celu leaky_relu rrelu gelu silu mish softplus softsign softshrink hardshrink
        tanhshrink threshold hardtanh hardswish hardsigmoid sigmoid tanh logsigmoid neg pos abs
        square sqrt rsqrt reciprocal exp expm1 log log1p log2 sin cos tan atan erf sign round floor ceil
        clamp clamp_min clamp_max add sub mul div floor_divide remainder pow minimum
        maximum lt le eq ne gt ge and or xor invert logical_and logical_or logical_not where masked_fill
    """,
    _first: """
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth
        drop_block2d drop_block3d contiguous clone detach float double half bfloat16 int long bool to type_as
    """,
    _shape_only: """
        reshape flatten unflatten permute transpose t movedim squeeze unsqueeze expand expand_as repeat
        tile broadcast_to chunk split tensor_split narrow flip
    """,
    _repeat_interleave: "repeat_interleave",
    _roll: "roll",
    select: "select",
    unbind: "unbind",
    _join: "cat stack",
    getitem: "getitem",
    index_select: "index_select",
    _reduce: "mean sum prod amax amin max min argmax std var norm logsumexp",
    _mixing: "softmax log_softmax softmin normalize cumsum",
    _pool: """
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool1d lp_pool2d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d interpolate
    """,
    _pad: "pad",
    _getattr: "getattr",
    _patch_merging: "_patch_merging_pad",
    _position_bias: "_get_relative_position_bias",
    _like: "zeros_like ones_like full_like",
    _made: " ".join(sorted(CONSTANTS)),
    _fact: "size numel",
    _convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    _linear: "linear",
    _embedding: "embedding",
    _prelu: "prelu",
    _pixels: "pixel_shuffle pixel_unshuffle",
    _channel_shuffle: "channel_shuffle",
    _glu: "glu",
    _norm_call(layer_rules.channel_norm): "batch_norm",
    _norm_call(layer_rules.last_dims_norm): "layer_norm rms_norm",
    einsum: "einsum",
    matmul: "matmul bmm mm",
    attention: "scaled_dot_product_attention",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""Bare name of a function or method to how it treats channels."""
