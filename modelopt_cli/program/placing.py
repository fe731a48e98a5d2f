"""Putting tensors and layers into a network at paths such as ``head.fc.weight``."""

from torch import Tensor, nn


def place(root: nn.Module, path: str, value: Tensor | nn.Module) -> None:
    """Hold a parameter, a buffer or a layer at a path, in modules that are made where there are none.

    Args:
        root: the network, which is changed.
        path: names below it, joined by dots.
        value: a plain tensor becomes a buffer.

    Raises:
        KeyError, AttributeError: torch has the name for something of its own, such as ``forward``.

    Example:
        >>> network = nn.Module()
        >>> place(network, "head.fc", nn.Linear(2, 3))
        >>> list(network.state_dict())
        ['head.fc.weight', 'head.fc.bias']
    """
    *owners, name = path.split(".")
    for owner in owners:
        if owner not in root._modules:
            root.add_module(owner, nn.Module())
        root = root.get_submodule(owner)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
