"""A network as its file will give it: a copy with its kernels."""

import copy

from torch import nn

from modelopt_cli.kernels import prepare
from modelopt_cli.program import Program
from modelopt_cli.program.parted import code_of, joined
from modelopt_cli.program.serialization import from_data, state_of, to_data


def as_run(network: nn.Module, device: str) -> nn.Module:
    """A network as it is once it is read from its file: a copy that shares its tensors, with its kernels."""
    if isinstance(network, Program):
        copied = from_data(to_data(network), state_of(network), code_of(network))
        copied.encodings = dict(network.encodings)
        return prepare(copied, device)
    return apart(network) if device == "cpu" else copy.deepcopy(network).eval().to(device)


def graph_as_run(network: nn.Module, device: str) -> nn.Module:
    """The network as it is run; of one that was captured in parts, the graph of all parts."""
    return joined(as_run(network, device))


def apart(module: nn.Module) -> nn.Module:
    """A copy of a module in evaluation mode, with buffers of its own, which a forward pass may change.

    It shares its parameters, so it must not be moved.
    """
    shared = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, shared).eval()
