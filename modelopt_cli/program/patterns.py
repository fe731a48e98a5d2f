"""Recognising what can be fused into the layer before it."""

from collections.abc import Mapping

from torch import fx, nn

from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.quantization import ACTIVATIONS

_LAYERS = {activation.layer: name for name, activation in ACTIVATIONS.items()}


def activation_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return None
        if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0.0, 6.0):
            return "relu6"
        return _LAYERS.get(type(module))
    name = operation(node)
    if name not in ACTIVATIONS or arguments(node).get("approximate", "none") != "none":
        return None
    return name


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True if the node is a ReLU, which on uint8 is a maximum with the zero point."""
    name = activation_of(node, modules)
    return name is not None and ACTIVATIONS[name].rectifies


def is_add(node: fx.Node) -> bool:
    """True if a node is the plain sum of two different tensors."""
    return operation(node) == "add" and len(node.all_input_nodes) == 2 and "alpha" not in node.kwargs


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only reader of a value, or None where there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
