"""Padding as a function in front of its convolution, where int8 kernels have no form for it."""

from typing import Any

import torch.nn.functional as F
from torch import nn

from modelopt_cli.program.calls import source
from modelopt_cli.program.layer_kinds import build, config_of, kind_of
from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import copy_graph, rebuild

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def explicit_padding(program: Program) -> Program:
    """The Program with uneven, reflecting and repeating padding outside the convolutions that do it.

    torch pads first there, too, so that the values are the same. Padding with zeros, the same on both sides
    of each dimension, stays where it is.

    Args:
        program: in inference form; it is not changed.

    Returns:
        The Program itself where there is no such convolution.
    """
    modules = dict(program.named_modules())
    moved = {path: _unpadded(layer) for path, layer in modules.items() if _is_special(layer)}
    if not moved:
        return program
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in moved:
            with graph.inserting_before(node):
                padded = graph.call_function(F.pad, *_pad(source(node), modules[str(node.target)]))
            node.replace_input_with(source(node), padded)
    rewritten = rebuild(program, graph, moved)
    rewritten.encodings = dict(program.encodings)
    return rewritten


def _is_special(layer: nn.Module) -> bool:
    if not isinstance(layer, _CONVOLUTIONS):
        return False
    sides = layer._reversed_padding_repeated_twice
    return any(sides) and (layer.padding_mode != "zeros" or sides[::2] != sides[1::2])


def _pad(value: Any, layer: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the function ``pad`` that does what the layer does."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return (value, list(layer._reversed_padding_repeated_twice)), {"mode": mode}


def _unpadded(layer: Any) -> nn.Module:
    """The layer without padding, with the same tensors."""
    none = {"padding": [0] * len(layer.kernel_size), "padding_mode": "zeros"}
    bare = build(kind_of(layer) or "", {**config_of(layer), **none})
    bare.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
    return bare.eval()
