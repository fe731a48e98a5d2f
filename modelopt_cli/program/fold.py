"""Rewrites that leave the function alone: for inference, a network needs fewer layers than for training."""

from collections.abc import Collection
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from modelopt_cli.program.allowlist import function_name
from modelopt_cli.program.kinds import build, config_of, kind_of
from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import copy_graph, meta_copy, rebuild
from modelopt_cli.program.samples import zeros

_CONVS: tuple[type, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DECONVS: tuple[type, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS: tuple[type, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_IDLE_KINDS = (
    *("Identity", "StochasticDepth", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"),
    *("AlphaDropout", "FeatureAlphaDropout"),
)
# Functions that return their first argument when the argument at this place is False.
_IDLE_FUNCTIONS: dict[str, tuple[int, str]] = {
    **{f"F.{name}": (2, "training") for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")},
    **{f"F.{name}": (2, "training") for name in ("alpha_dropout", "feature_alpha_dropout")},
    "torch.dropout": (2, "train"),
    "torchvision.stochastic_depth": (3, "training"),
    "torchvision.drop_block2d": (5, "training"),
    "torchvision.drop_block3d": (5, "training"),
}


def inference_form(program: Program) -> Program:
    """The Program without the layers that do nothing in inference: dropout, stochastic depth, identity."""
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if _is_idle(node, program):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return rebuild(program, graph)


def _is_idle(node: fx.Node, program: Program) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return kind_of(program.get_submodule(str(node.target))) in _IDLE_KINDS
    if node.op != "call_function":
        return False
    place, name = _IDLE_FUNCTIONS.get(function_name(cast("Any", node.target)) or "", (0, ""))
    if not name:
        return False
    return (node.args[place] if len(node.args) > place else node.kwargs.get(name, True)) is False


def fold_batch_norms(program: Program, leave: Collection[str] = ()) -> Program:
    """The Program with each batch norm folded into the convolution or linear before it.

    Folded where the batch norm is the only use of that layer's output and has running statistics. With
    s = gamma / sqrt(var + eps) the new weight is s * w and the new bias s * (b - mean) + beta, computed in
    float64 (Jacob et al., CVPR 2018, section 3.2). Constant zero padding in front of a convolution, the
    same on both sides of each dimension, moves into the convolution. The Program given is not changed.

    Args:
        program: what to fold.
        leave: layers whose weights are to stay as they are.
    """
    graph = copy_graph(program.graph)
    made: dict[str, nn.Module] = {}
    folding = _Folding(program, graph, made, leave)
    for node in list(graph.nodes):
        folding.batch_norm(node)
    for node in list(graph.nodes):
        folding.padding(node)
    return rebuild(program, graph, made)


class _Folding:
    """The graph being rewritten, and the layers made for it so far."""

    def __init__(
        self, program: Program, graph: fx.Graph, made: dict[str, nn.Module], leave: Collection[str]
    ) -> None:
        self.program, self.graph, self.made, self.leave = program, graph, made, leave
        self.calls: dict[str, int] = {}
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
        return self.made.get(path) or self.program.get_submodule(path)

    def batch_norm(self, node: fx.Node) -> None:
        """Fold this node into the one before it, if it is a batch norm and that can be done."""
        norm = self.layer(node)
        if type(norm) not in _NORMS or norm.running_mean is None or len(node.args) != 1:
            return
        source = node.args[0]
        layer = self.layer(source)
        if layer is None or not isinstance(source, fx.Node) or not self._is_free(source, layer):
            return
        if str(source.target) in self.leave:
            return
        weight = _scaled(layer, norm)
        if weight is None or (isinstance(layer, nn.Linear) and self._rank(source) != 2):
            return
        folded = build(kind_of(layer) or "", {**config_of(layer), "bias": True})
        grad = layer.weight.requires_grad
        folded.weight = nn.Parameter(weight, requires_grad=grad)
        folded.bias = nn.Parameter(_shifted(layer, norm), requires_grad=grad)
        self.made[str(source.target)] = folded
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def padding(self, node: fx.Node) -> None:
        """Move the padding before this node into it, if it is a convolution and that can be done."""
        layer = self.layer(node)
        if type(layer) not in _CONVS or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return
        source = node.args[0]
        extra = self._zero_padding(source, len(layer.kernel_size))
        movable = (
            isinstance(layer.padding, tuple) and layer.padding_mode == "zeros" and len(source.users) == 1
        )
        if extra is None or not movable or self.calls[str(node.target)] != 1:
            return
        padding = [own + more for own, more in zip(layer.padding, extra, strict=True)]
        merged = build(kind_of(layer) or "", {**config_of(layer), "padding": padding})
        merged.weight, merged.bias = layer.weight, layer.bias
        self.made[str(node.target)] = merged
        source.replace_all_uses_with(cast("fx.Node", source.args[0]))
        self.graph.erase_node(source)

    def _is_free(self, node: fx.Node, layer: nn.Module) -> bool:
        """Whether the layer's weights serve this one call, and its output only one other."""
        path = str(node.target)
        fetched = any(name.startswith(f"{path}.") for name in self.calls)
        tied = any(id(tensor) in self.tied for tensor in layer.parameters())
        return len(node.users) == 1 and self.calls[path] == 1 and not fetched and not tied

    def _rank(self, node: fx.Node) -> int:
        """Dimensions of a node's output: batch norm scales dimension 1, a linear layer makes the last."""
        if self.ranks is None:
            self.ranks = _ranks(self.program)
        return self.ranks.get(node.name, 0)

    def _zero_padding(self, node: fx.Node, dims: int) -> list[int] | None:
        """Zeros added on both sides of each dimension, in order; None if it is no such padding."""
        pads = _pads(node, self.layer(node))
        if pads is None or len(pads) % 2 or len(pads) > 2 * dims or not isinstance(node.args[0], fx.Node):
            return None
        if any(type(pad) is not int or pad < 0 for pad in pads) or pads[0::2] != pads[1::2]:
            return None
        return [0] * (dims - len(pads) // 2) + pads[0::2][::-1]


def _pads(node: fx.Node, layer: nn.Module | None) -> list[Any] | None:
    """The argument of ``F.pad`` that a node stands for, where it pads with zeros."""
    if isinstance(layer, nn.ConstantPad1d | nn.ConstantPad2d | nn.ConstantPad3d):  # ZeroPad among them
        return list(layer.padding) if layer.value == 0 and len(node.args) == 1 else None
    if node.op != "call_function" or node.target is not F.pad:
        return None
    bound = {**dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)), **node.kwargs}
    zeros = bound.get("mode", "constant") == "constant" and bound.get("value") in (None, 0, 0.0)
    return list(bound["pad"]) if zeros and isinstance(bound["pad"], list | tuple) and node.args else None


def _ranks(program: Program) -> dict[str, int]:
    ranks: dict[str, int] = {}

    class _Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            ranks[n.name] = result.dim() if isinstance(result, Tensor) else 0
            return result

    with torch.no_grad():
        _Interpreter(meta_copy(program)).run(zeros(program.input, 2, "meta"))
    return ranks


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
