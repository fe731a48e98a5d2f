"""The weight matrices and kernels of a Program: layers that have some, and those that functions fetch."""

from operator import attrgetter

import torch
from torch import fx, nn

from modelopt_cli.program.layer_kinds import KINDS, class_of
from modelopt_cli.program.program import Program
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent

WEIGHTED_KINDS = tuple(class_of(kind) for kind, row in KINDS.items() if row.weighted)

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_MATMULS = ("matmul", "mm", "mv", "bmm", "baddbmm", "addmm", "einsum", "tensordot")
_RECURRENT = (
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
)
_PRODUCTS = frozenset(("linear", "bilinear", "embedding", *_CONVOLUTIONS, *_MATMULS, *_RECURRENT))
_TURNS = frozenset(("t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "contiguous"))
"""Functions and methods, by name, that multiply matrices, and that only lay them out differently."""


def weight_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weight matrices and kernels that a layer holds by their own names, integer ones included."""
    inside = isinstance(module, QuantizedRecurrent)
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=inside))
    return {name: tensor for name, tensor in held if "weight" in name and tensor.dim() > 1}


def fetched_weights(program: Program) -> dict[str, torch.Tensor]:
    """Weights that functions of the graph fetch without a layer, as Swin's attention does, by name.

    They have two or more dimensions, and are called ``weight`` or multiplied with something. A position
    embedding or a scale, which is not, is no weight.
    """
    weights: dict[str, torch.Tensor] = {}
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name in weights:
            continue
        tensor = attrgetter(name)(program)
        is_matrix = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
        if is_matrix and (name.endswith(".weight") or _is_multiplied(node)):
            weights[name] = tensor
    return weights


def _is_multiplied(node: fx.Node) -> bool:
    """True if a value goes into a matrix product, transposed on the way or not."""
    for user in node.users:
        called = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
        if called in _PRODUCTS or (called in _TURNS and _is_multiplied(user)):
            return True
    return False


def parts_of_layers(program: Program) -> set[str]:
    """Int8 layers that are part of another one."""
    whole = [name for name, layer in program.named_modules() if isinstance(layer, QuantizedRecurrent)]
    return {f"{name}.{part}" for name in whole for part, _ in program.get_submodule(name).named_children()}


def call_name(layer: str, number: int) -> str:
    """Name of the int8 layer for a further call of a layer: 2 is the second."""
    return f"{layer}__{number}"


def further_calls(program: Program) -> dict[str, str]:
    """Int8 layers that stand for further calls of another and share its tensors: their names to its name."""
    layers = {name: layer for name, layer in program.named_modules() if isinstance(layer, Weighted)}
    first = {name: name.rpartition("__")[0] for name in layers}
    return {
        name: first[name]
        for name, layer in layers.items()
        if first[name] in layers and layers[first[name]].weight is layer.weight
    }


def weight_label(parameter: str) -> str:
    """Name of a weight in reports: its layer's, or its own where it belongs to none."""
    return parameter.rpartition(".")[0] or parameter if parameter.endswith("weight") else parameter
