"""Recognising what can be fused into the layer before it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    F.gelu: "gelu",
}
ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}


def activation_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return None
        if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0.0, 6.0):
            return "relu6"
        return ACTIVATION_MODULES.get(type(module))
    if node.op == "call_method":
        return ACTIVATION_METHODS.get(str(node.target))
    if node.kwargs.get("approximate", "none") != "none":
        return None
    return ACTIVATION_FUNCTIONS.get(node.target) if node.op == "call_function" else None


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only reader of a value, or None where there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
