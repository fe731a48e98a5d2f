"""Limits for networks whose sizes come from a file that may say anything: those of the weights next to it."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.program.metadata import MAX_LABELS, MAX_NODES
from modelopt_cli.text import short

_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_encoder_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers",
)  # fmt: skip
_MOST = {**dict.fromkeys(_LAYERS, MAX_NODES), "num_labels": MAX_LABELS}
"""Counts for which a configuration makes lists before there is any network, and the most of each."""

# A network may register a weight several times, of which a file holds one: tied ones, and those that are
# replaced while it is built. It may also have small ones that no file holds.
_TIMES, _MORE_TENSORS, _MORE_VALUES = 16, 1000, 1 << 24


class _TooLarge(ArchitectureError):
    """The network has more weights than the file could fill."""


def check_counts(configuration: Any, where: str) -> None:
    """Refuse numbers of layers and of labels that no network has, in a configuration and those within it.

    Raises:
        ArchitectureError: there is one; names its field.
    """
    if isinstance(configuration, list):
        for each in configuration:
            check_counts(each, where)
    for name, value in configuration.items() if isinstance(configuration, dict) else ():
        most = _MOST.get(name)
        if most is not None and isinstance(value, int) and not 0 <= value <= most:
            problem = f"says {name} {short(str(value))}, and a network has 0 to {most:,}"
            raise ArchitectureError(problem, where=where)
        check_counts(value, where)


def build_within(architecture: Architecture, state: Mapping[str, torch.Tensor], where: str) -> nn.Module:
    """Build a network, unless it has far more weights than a file: first without memory, then with it.

    Args:
        architecture: what to build.
        state: the file's tensors.
        where: the file, for messages.

    Raises:
        ArchitectureError: it has, which is said as soon as it is known; or it cannot be built.
    """
    try:
        _try_without_memory(architecture, state, where)
        with _limited(state, where):
            return architecture.build()
    except _TooLarge as error:
        raise ArchitectureError(error.message, where=error.where, hint=error.hint) from None


def _try_without_memory(architecture: Architecture, state: Mapping[str, torch.Tensor], where: str) -> None:
    try:
        with torch.device("meta"), _limited(state, where):
            architecture.build()
    except _TooLarge:
        raise
    except Exception:  # one that computes with values fails here alone; all else is said with memory
        pass


@contextlib.contextmanager
def _limited(state: Mapping[str, torch.Tensor], where: str) -> Iterator[None]:
    """Networks that are built in this thread have about as many weights as the file."""
    tensors, values = len(state), sum(tensor.numel() for tensor in state.values())
    count = size = 0
    thread = threading.get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, size
        if parameter is None or threading.get_ident() != thread:
            return
        count, size = count + 1, size + parameter.numel()
        if count > _TIMES * tensors + _MORE_TENSORS:
            raise _too_large(f"{count:,} weights", f"{tensors:,}", where)
        if size > _TIMES * values + _MORE_VALUES:
            raise _too_large(f"{size:,} parameters", f"{values:,}", where)

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def _too_large(network: str, file: str, where: str) -> _TooLarge:
    problem = f"its config.json describes a network of at least {network}, and the file has {file}"
    hint = "its numbers of layers and sizes must be those of the weights"
    return _TooLarge(problem, where=where, hint=hint)
