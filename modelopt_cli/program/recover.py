"""Turns functional calls with fetched weights back into the layers they belong to.

A user's own ``Conv2d`` subclass is traced through, and its ``F.conv2d(x, self.weight, self.bias, ...)``
arrives as a function call with two fetched parameters. As an ``nn.Conv2d`` under the layer's own name it
has the same state-dict keys as before and is a layer every method knows how to compress.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.functional import allocating
from modelopt_cli.program.layer_kinds import build, share

_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class _Call:
    """One functional call: its node, the layer its weights belong to, and that layer's description."""

    node: fx.Node
    layer: str
    kind: str
    config: dict[str, Any]


def recover_layers(graph: fx.Graph, root: nn.Module) -> dict[str, nn.Module]:
    """Replace functional calls in ``graph`` by calls of layers, where that changes nothing.

    A layer is recovered if its tensors have the usual names below one path, nothing else uses them,
    and all its calls agree on the hyperparameters. The others stay functions.

    Args:
        graph: changed in place.
        root: the network that was traced; not changed.

    Returns:
        The recovered layers by path, sharing the network's tensors.
    """
    calls: dict[str, list[_Call]] = defaultdict(list)
    for node in graph.nodes:
        call = _recognise(node, root)
        if call is not None:
            calls[call.layer].append(call)
    recovered = {}
    for layer, of_layer in calls.items():
        module = (
            _module(of_layer, root) if _owns(graph, layer, {call.node for call in of_layer}, root) else None
        )
        if module is not None:
            recovered[layer] = module
            recovered |= _moved_children(graph, layer, root)
            for call in of_layer:
                _replace(graph, call)
    return recovered


def described_layer(node: fx.Node, weight: Any, owner: nn.Module | None = None) -> "_Description":
    """Kind and hyperparameters of the layer that does what a function's call does; None where there is none.

    Args:
        node: in normal form.
        weight: the tensor that it is called with.
        owner: the module that has that, where one is known.
    """
    describe, bound = _DESCRIBED.get(operation(node)), arguments(node)
    counted = not isinstance(bound.get("groups"), fx.Node)
    description = describe(weight, bound, owner) if describe is not None and counted else None
    return None if description is None or _is_computed(description[1]) else description


def _recognise(node: fx.Node, root: nn.Module) -> _Call | None:
    if operation(node) not in _DESCRIBED:
        return None
    bound = arguments(node)
    paths = {name: _path(bound.get(name)) for name in _TENSORS if bound.get(name) is not None}
    layers = {
        path.rpartition(".")[0] if path and path.endswith(f".{name}") else None
        for name, path in paths.items()
    }
    layer = layers.pop() if len(layers) == 1 else None
    if not layer:
        return None
    weight: Any = attrgetter(f"{layer}.weight")(root) if bound.get("weight") is not None else None
    description = described_layer(node, weight, root.get_submodule(layer))
    return None if description is None else _Call(node, layer, *description)


def _path(argument: Any) -> str | None:
    is_fetched = isinstance(argument, fx.Node) and argument.op == "get_attr"
    return str(argument.target) if is_fetched else None


def _is_computed(config: dict[str, Any]) -> bool:
    """True if the graph computes a hyperparameter."""
    return any(isinstance(v, fx.Node) for value in config.values() for v in _flat(value))


_Description = tuple[str, dict[str, Any]] | None
"""Kind and hyperparameters of a layer; None where no layer is like the call."""


def _conv(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    if weight is None:
        return None
    first, second, *kernel = weight.shape
    config = _conv_options(bound)
    config |= {"in_channels": second * bound["groups"], "out_channels": first, "kernel_size": kernel}
    return f"Conv{len(kernel)}d", config


def _transposed_conv(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    if weight is None:
        return None
    first, second, *kernel = weight.shape
    config = {**_conv_options(bound), "output_padding": _listed(bound["output_padding"])}
    config |= {"in_channels": first, "out_channels": second * bound["groups"], "kernel_size": kernel}
    return f"ConvTranspose{len(kernel)}d", config


def _conv_options(bound: dict[str, Any]) -> dict[str, Any]:
    config = {name: _listed(bound[name]) for name in ("stride", "padding", "dilation")}
    return config | {"groups": bound["groups"], "bias": _has_bias(bound), "padding_mode": "zeros"}


def _linear(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    if weight is None or weight.dim() != 2:
        return None
    out_features, in_features = weight.shape
    return "Linear", {"in_features": in_features, "out_features": out_features, "bias": _has_bias(bound)}


def _embedding(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    if weight is None or weight.dim() != 2 or bound.get("max_norm") is not None:
        return None  # a largest norm is written into the weight at each call
    rows, columns = weight.shape
    config = {name: bound[name] for name in ("padding_idx", "norm_type", "scale_grad_by_freq", "sparse")}
    return "Embedding", config | {"num_embeddings": rows, "embedding_dim": columns, "max_norm": None}


def _layer_norm(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    if weight is None:
        return None
    config = {"normalized_shape": _listed(bound["normalized_shape"]), "eps": bound["eps"]}
    return "LayerNorm", config | {"elementwise_affine": True, "bias": _has_bias(bound)}


def _rms_norm(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    if weight is None:
        return None
    config = {"normalized_shape": _listed(bound["normalized_shape"]), "eps": bound["eps"]}
    return "RMSNorm", config | {"elementwise_affine": True}


def _group_norm(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    if weight is None:
        return None
    config = {"num_groups": bound["num_groups"], "num_channels": weight.shape[0], "eps": bound["eps"]}
    return "GroupNorm", config | {"affine": True, "bias": _has_bias(bound)}


def _has_bias(bound: dict[str, Any]) -> bool:
    return bound.get("bias") is not None


def _batch_norm(weight: Any, bound: dict[str, Any], owner: nn.Module | None) -> _Description:
    kinds = [kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(owner, kind)]
    statistics = bound.get("running_mean") is not None and bound.get("running_var") is not None
    if not kinds or not isinstance(owner, _BatchNorm) or not statistics or bound["training"] is not False:
        return None
    config = {"num_features": owner.num_features, "eps": bound["eps"], "momentum": owner.momentum}
    config |= {"affine": bound.get("weight") is not None, "bias": _has_bias(bound)}
    return kinds[0].__name__, config | {"track_running_stats": True}


_DESCRIBED: dict[str, Callable[[Any, dict[str, Any], nn.Module | None], _Description]] = {
    **{f"conv{d}d": _conv for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _transposed_conv for d in (1, 2, 3)},
    "linear": _linear,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
}
"""Operation to the layer that does the same, from its weight, its arguments and the owner of the weight."""


def _owns(graph: fx.Graph, layer: str, callers: set[fx.Node], root: nn.Module) -> bool:
    """True if only these calls use the layer's tensors, and nothing with state lies below it."""
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and path == layer:
            return False
        if not path.startswith(f"{layer}."):
            continue
        if node.op == "get_attr" and (path.rpartition(".")[0] != layer or not set(node.users) <= callers):
            return False
        if node.op == "call_module" and next(iter(root.get_submodule(path).state_dict()), None) is not None:
            return False
    return True


def _module(calls: list[_Call], root: nn.Module) -> nn.Module | None:
    first = calls[0]
    if any((call.kind, call.config) != (first.kind, first.config) for call in calls):
        return None
    try:
        module = build(first.kind, first.config)
    except ArtifactError:
        return None
    owner = root.get_submodule(first.layer)
    for name, empty in [*module.named_parameters(), *module.named_buffers()]:
        tensor = getattr(owner, name, None)
        if name == "num_batches_tracked" and tensor is None:
            tensor = torch.tensor(0)
        if not isinstance(tensor, Tensor) or tensor.shape != empty.shape:
            return None
        if isinstance(empty, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, name, tensor)
    return module


def _moved_children(graph: fx.Graph, layer: str, root: nn.Module) -> dict[str, nn.Module]:
    """A leaf has no children in a Program: ``conv.static_padding`` becomes ``conv_static_padding``."""
    taken = {str(node.target) for node in graph.nodes}
    moved: dict[str, nn.Module] = {}
    paths: dict[str, str] = {}
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and path.startswith(f"{layer}."):
            if path not in paths:
                paths[path] = layer + "_" + path[len(layer) + 1 :].replace(".", "_")
                while paths[path] in taken:
                    paths[path] += "_"
                moved[paths[path]] = allocating(share(root.get_submodule(path)))
            node.target = paths[path]
    return moved


def _replace(graph: fx.Graph, call: _Call) -> None:
    with graph.inserting_before(call.node):
        node = graph.call_module(call.layer, (source(call.node),))
    call.node.replace_all_uses_with(node)
    graph.erase_node(call.node)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else (value,)
