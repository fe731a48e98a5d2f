"""The state dict of a pickled network, out of the stand-ins that were read for its modules."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from modelopt_cli.checkpoint.standins import StandIn
from modelopt_cli.errors import CheckpointError

_MOST = 200_000  # modules; a few that hold each other can stand for far more than are in the file
_DEEPEST = 100  # dots in a name
_HINT = "save the network's state_dict()"


def is_network(value: object) -> bool:
    """True if a value is a stand-in with the attributes of every ``nn.Module``."""
    state = value.state if isinstance(value, StandIn) else None
    return isinstance(state, Mapping) and "_parameters" in state and "_modules" in state


def as_mapping(value: Any, where: str) -> Any:
    """The state dict of a pickled network; anything else as it is.

    It has the names and the order of ``state_dict()``: parameters and persistent buffers, then the modules
    below. What a network's own code adds to its state dict is not in it.

    Raises:
        CheckpointError: its modules contain each other.
    """
    if not is_network(value):
        return value
    state: dict[str, Tensor] = {}
    for count, (prefix, module) in enumerate(_modules(value, "")):
        if count == _MOST or prefix.count(".") == _DEEPEST:
            raise CheckpointError("its modules contain each other", where=where, hint=_HINT)
        passing = module.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set) else set()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _items(module, kind):
                if isinstance(tensor, Tensor) and not (kind == "_buffers" and name in passing):
                    state[prefix + name] = tensor
    return state


def _modules(network: StandIn, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield prefix, network.state
    for name, module in _items(network.state, "_modules"):
        if is_network(module):
            yield from _modules(module, f"{prefix}{name}.")


def _items(module: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    entries = module.get(kind)
    if isinstance(entries, Mapping):
        yield from ((name, value) for name, value in entries.items() if isinstance(name, str))
