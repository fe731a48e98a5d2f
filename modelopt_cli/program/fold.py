"""Rewrites that leave the function alone: for inference, a network needs fewer layers than for training."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.layer_kinds import build, config_of, kind_of, row_of
from modelopt_cli.program.patterns import sole_user
from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import copy_graph, rebuild
from modelopt_cli.program.shapes import program_values

_CONVS: tuple[type, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DECONVS: tuple[type, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS: tuple[type, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Operations that return their first argument outside of training.
_IDLE_OPERATIONS = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("stochastic_depth", "drop_block2d", "drop_block3d"),
)


def inference_form(program: Program) -> Program:
    """The Program without the layers that do nothing in inference: dropout, stochastic depth, identity."""
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if _is_idle(node, program):
            node.replace_all_uses_with(source(node))
            graph.erase_node(node)
    return rebuild(program, graph)


def _is_idle(node: fx.Node, program: Program) -> bool:
    if node.op == "call_module":
        return row_of(program.get_submodule(str(node.target))).idle
    if operation(node) not in _IDLE_OPERATIONS:
        return False
    bound = arguments(node)
    return bound.get("training", bound.get("train")) is False


def fold_batch_norms(program: Program, leave: Collection[str] = ()) -> Program:
    """The Program with each batch norm folded into the convolution or linear before it.

    Folded where the batch norm is the only use of that layer's outputs, in every call of it, and has running
    statistics. With
    s = gamma / sqrt(var + eps) the new weight is s * w and the new bias s * (b - mean) + beta, computed in
    float64 (Jacob et al., CVPR 2018, section 3.2). Constant zero padding in front of a convolution, the
    same on both sides of each dimension, moves into the convolution. The Program given is not changed.

    Args:
        program: what to fold.
        leave: layers whose weights are to stay as they are.
    """
    graph = copy_graph(program.graph)
    new_layers: dict[str, nn.Module] = {}
    folding = _Folding(program, graph, new_layers, leave)
    for node in list(graph.nodes):
        folding.batch_norm(node)
    for node in list(graph.nodes):
        folding.padding(node)
    return rebuild(program, graph, new_layers)


class _Folding:
    """The graph being rewritten, and the layers made for it so far."""

    def __init__(
        self, program: Program, graph: fx.Graph, new_layers: dict[str, nn.Module], leave: Collection[str]
    ) -> None:
        self.program, self.graph, self.new_layers, self.leave = program, graph, new_layers, leave
        self.calls: dict[str, int] = {}
        self.folded: set[fx.Node] = set()
        names: dict[int, int] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1
        for tensor in program.state_dict(keep_vars=True).values():
            names[id(tensor)] = names.get(id(tensor), 0) + 1
        self.tied = {tensor for tensor, count in names.items() if count > 1}
        self.ranks: dict[str, int] | None = None

    def layer(self, node: Any) -> Any:
        """The leaf a node calls, or None."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        path = str(node.target)
        return self.new_layers.get(path) or self.program.get_submodule(path)

    def batch_norm(self, node: fx.Node) -> None:
        """Fold this node into the one before it, if it is a batch norm and that can be done."""
        norm = self.layer(node)
        if node in self.folded or type(norm) not in _NORMS or norm.running_mean is None:
            return
        before = source(node)
        layer = self.layer(before)
        if layer is None or str(before.target) in self.leave or not self._is_free(before, layer):
            return
        followers = [sole_user(call) for call in self._calls_of(before)]
        if not all(_calls(follower, str(node.target)) for follower in followers):
            return
        weight = _scaled(layer, norm)
        ranks = {self._rank(call) for call in self._calls_of(before)} if isinstance(layer, nn.Linear) else {2}
        if weight is None or ranks != {2}:
            return
        folded = build(kind_of(layer) or "", {**config_of(layer), "bias": True})
        grad = layer.weight.requires_grad
        folded.weight = nn.Parameter(weight, requires_grad=grad)
        folded.bias = nn.Parameter(_shifted(layer, norm), requires_grad=grad)
        self.new_layers[str(before.target)] = folded
        self.folded.update(follower for follower in followers if follower is not None)
        for call, follower in zip(self._calls_of(before), followers, strict=True):
            assert follower is not None
            follower.replace_all_uses_with(call)
            self.graph.erase_node(follower)

    def padding(self, node: fx.Node) -> None:
        """Move the padding before this node into it, if it is a convolution and that can be done."""
        layer = self.layer(node)
        if type(layer) not in _CONVS:
            return
        before = source(node)
        extra = self._zero_padding(before, len(layer.kernel_size))
        movable = (
            isinstance(layer.padding, tuple) and layer.padding_mode == "zeros" and len(before.users) == 1
        )
        if extra is None or not movable or self.calls[str(node.target)] != 1:
            return
        padding = [own + more for own, more in zip(layer.padding, extra, strict=True)]
        merged = build(kind_of(layer) or "", {**config_of(layer), "padding": padding})
        merged.weight, merged.bias = layer.weight, layer.bias
        self.new_layers[str(node.target)] = merged
        before.replace_all_uses_with(source(before))
        self.graph.erase_node(before)

    def _is_free(self, node: fx.Node, layer: nn.Module) -> bool:
        """True if the layer's weights serve its calls alone."""
        fetched = any(name.startswith(f"{node.target}.") for name in self.calls)
        return not fetched and not any(id(tensor) in self.tied for tensor in layer.parameters())

    def _calls_of(self, node: fx.Node) -> list[fx.Node]:
        """All calls of the layer that a node calls."""
        return [call for call in self.graph.find_nodes(op="call_module") if call.target == node.target]

    def _rank(self, node: fx.Node) -> int:
        """Dimensions of a node's output: batch norm scales dimension 1, a linear layer makes the last."""
        if self.ranks is None:
            values = program_values(self.program, 2)
            self.ranks = {n.name: v.dim() for n, v in values.items() if isinstance(v, Tensor)}
        return self.ranks.get(node.name, 0)

    def _zero_padding(self, node: fx.Node, dims: int) -> list[int] | None:
        """Zeros added on both sides of each dimension, in order; None if it is no such padding."""
        pads = zero_padding(node, self.layer(node))
        if pads is None or len(pads) % 2 or len(pads) > 2 * dims:
            return None
        if any(type(pad) is not int or pad < 0 for pad in pads) or pads[0::2] != pads[1::2]:
            return None
        return [0] * (dims - len(pads) // 2) + pads[0::2][::-1]


def _calls(node: fx.Node | None, layer: str) -> bool:
    return node is not None and node.op == "call_module" and node.target == layer


def zero_padding(node: fx.Node, layer: nn.Module | None) -> list[Any] | None:
    """The argument of ``F.pad`` that a node stands for, where it pads with zeros.

    Args:
        node: any.
        layer: what it calls, if it calls one.
    """
    if isinstance(layer, nn.ConstantPad1d | nn.ConstantPad2d | nn.ConstantPad3d):  # ZeroPad among them
        return list(layer.padding) if layer.value == 0 else None
    if operation(node) != "pad":
        return None
    bound = arguments(node)
    zeros = bound["mode"] == "constant" and bound["value"] in (None, 0, 0.0)
    return list(bound["pad"]) if zeros and isinstance(bound["pad"], list | tuple) else None


def _scale(norm: Any) -> Tensor:
    scale: Tensor = 1.0 / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale if norm.weight is None else scale * norm.weight.double()


def _scaled(layer: Any, norm: Any) -> Tensor | None:
    """The layer's weight times the norm's scale; None if they do not belong together."""
    scale: Tensor = _scale(norm).detach()
    weight: Any = getattr(layer, "weight", None)
    scaled: Tensor
    if type(layer) in _DECONVS and layer.out_channels == len(scale):
        grouped = weight.detach().double().unflatten(0, (layer.groups, -1))
        scaled = (grouped * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    elif type(layer) in (*_CONVS, nn.Linear) and weight.shape[0] == len(scale):
        scaled = weight.detach().double() * scale.view(-1, *[1] * (weight.dim() - 1))
    else:
        return None
    return scaled.to(weight.dtype)


def _shifted(layer: Any, norm: Any) -> Tensor:
    bias = layer.bias.detach().double() if layer.bias is not None else 0.0
    shifted = (bias - norm.running_mean.double()) * _scale(norm).detach()
    if norm.bias is not None:
        shifted = shifted + norm.bias.detach().double()
    result: Tensor = shifted.to(layer.weight.dtype)
    return result
