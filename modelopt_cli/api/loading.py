"""From a path to a network that runs."""

from pathlib import Path

from torch import nn

from modelopt_cli.api.opening import open_input, open_source
from modelopt_cli.checkpoint import require_network
from modelopt_cli.errors import CaptureError
from modelopt_cli.kernels import prepare
from modelopt_cli.program import InputSpec, Program


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    input: InputSpec | None = None,
    device: str = "cpu",
) -> Program:
    """Open a checkpoint or an artifact as a Program, ready to run.

    Args:
        path: a modelopt file, or any checkpoint whose network is recognised or named.
        arch: the architecture, as ``--arch`` takes it.
        input: shape and preprocessing of one sample, where the architecture does not imply it.
        device: "cpu" or a CUDA device.

    Returns:
        A callable on float tensors ``(N, *program.input.shape)``, with ``.graph``, ``.history``
        and ``.input``.

    Raises:
        InputError: the file, the architecture or the network cannot be used.
        EnvironmentFailure: the device is not there.
    """
    network = load_network(path, arch=arch, input=input, device=device)
    if not isinstance(network, Program):
        raise CaptureError("the network cannot be traced", where=str(path))
    return network


def load_network(
    path: str | Path,
    *,
    arch: str | None = None,
    input: InputSpec | None = None,
    device: str = "cpu",
) -> nn.Module:
    """As ``load``, but a network that cannot be traced is returned as the module it is."""
    opened = open_source(path, arch, input or open_input([path], arch, None, None))
    network = require_network(opened, path)
    return prepare(network, device) if isinstance(network, Program) else network.to(device).eval()
