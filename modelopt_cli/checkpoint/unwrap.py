"""Unwrapping: from whatever a training script saved to one flat mapping of names to tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from modelopt_cli.artifact.lazy import LazyState
from modelopt_cli.checkpoint.standins import StandIn
from modelopt_cli.errors import CheckpointError, a_or_an
from modelopt_cli.text import listing, short

# Keys under which weights are found, in the order they are preferred: plain weights before averaged
# ones, because a file that holds both is a training checkpoint whose `model` is what it reports on.
PLAIN = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "net_state_dict",
    "params", "weights", "model_weights", "backbone", "generator", "student",
)  # fmt: skip
AVERAGED = (
    "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema_state_dict", "params_ema",
    "ema_params", "swa_model", "teacher",
)  # fmt: skip
_DEPTH = 4
_MOST = 200_000  # modules; a few that hold each other can stand for far more than are in the file
_DEEPEST = 100  # dots in a name
_HINT = "save the network's state_dict()"
_T = TypeVar("_T")

# Wrappers that only forward; every layer name below them is longer by this much.
_WRAPPERS = ("module.", "_orig_mod.")
# Scalars that other tools register on modules while they count or average: not weights.
_LEFTOVERS = ("total_ops", "total_params", "n_averaged")


@dataclass(frozen=True)
class Unwrapped:
    """A state dict and how it was found.

    Attributes:
        state: tensors by layer name, in the file's order.
        notes: one line each for what was left aside.
    """

    state: dict[str, torch.Tensor]
    notes: tuple[str, ...]


def unwrap(saved: object, where: str) -> Unwrapped:
    """Find the weights in what a file held and take off the wrappers' prefixes.

    Raises:
        CheckpointError: there is no state dict in it, or several and none preferred.
    """
    path, holder = _find(saved, where)
    notes: list[str] = []
    if isinstance(holder, StandIn):
        notes.append(f"weights taken out of a pickled {short(holder.origin)}, whose code was not read")
    elif path:
        notes.append(f"weights taken from '{short('.'.join(path))}'")
    if isinstance(saved, Mapping):
        unused = [str(key) for key in AVERAGED if key in saved and key not in path]
        if unused:
            notes.append(
                f"averaged weights under {listing(unused)} were left aside; save them alone to use them"
            )
    state, dropped = _tensors(as_mapping(holder, where))
    return Unwrapped(_strip_wrappers(state), (*notes, *_left_aside(dropped)))


def unwrap_lazy(state: LazyState) -> tuple[LazyState, tuple[str, ...]]:
    """:func:`unwrap` for the flat state dict of a safetensors file, of which nothing is read."""
    names = {name: name for name in state if not _is_leftover(name)}
    dropped = [name for name in state if name not in names]
    return state.renamed(_strip_wrappers(names)), _left_aside(dropped)


def _left_aside(names: list[str]) -> tuple[str, ...]:
    return (f"left aside, not tensors of the network: {listing(names)}",) if names else ()


def _find(saved: object, where: str) -> tuple[tuple[str, ...], Any]:
    """The keys that lead to a state dict or a pickled network, and that itself."""
    node: Any = saved
    path: tuple[str, ...] = ()
    for _ in range(_DEPTH):
        if is_network(node) or (isinstance(node, Mapping) and _is_state(node)):
            return path, node
        if not isinstance(node, Mapping):
            break
        key = _next_key(node, where)
        node, path = node[key], (*path, key)
    raise CheckpointError(_what_else(saved), where=where, hint="pass a file with a network's state_dict()")


def _is_state(node: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in node.items())


def _next_key(node: Mapping[Any, Any], where: str) -> str:
    below = [key for key, value in node.items() if isinstance(key, str) and _leads_to_state(value)]
    for key in (*PLAIN, *AVERAGED):
        if key in below:
            return key
    if len(below) == 1:
        return below[0]
    if below:
        raise CheckpointError(
            f"holds several sets of weights ({listing(below, 5)})",
            where=where,
            hint="save the one you mean alone",
        )
    raise CheckpointError(_what_else(node), where=where, hint="pass a file with a network's state_dict()")


def _leads_to_state(value: object, depth: int = _DEPTH) -> bool:
    if is_network(value):
        return True
    if not isinstance(value, Mapping) or depth == 0 or "param_groups" in value:
        return False
    if _is_state(value):
        return True
    # Only known keys are followed, so that a hostile nest of shared dicts costs a bounded walk.
    return any(_leads_to_state(value[key], depth - 1) for key in (*PLAIN, *AVERAGED) if key in value)


def _what_else(saved: object) -> str:
    if isinstance(saved, torch.Tensor):
        return "holds a single tensor, not a network's weights"
    if not isinstance(saved, Mapping):
        kind = saved.origin if isinstance(saved, StandIn) else type(saved).__name__
        return f"holds {a_or_an(short(kind))}, not a network's weights"
    if "param_groups" in saved:
        return "holds an optimizer's state, not a network's weights"
    if not saved:
        return "holds an empty dict"
    return f"holds no network's weights (its keys: {listing([str(key) for key in saved], 5)})"


def _tensors(mapping: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    state: dict[str, torch.Tensor] = {}
    dropped: list[str] = []
    for key, value in mapping.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor) and not _is_leftover(key):
            state[key] = value.detach()
        else:
            dropped.append(str(key))
    return state, dropped


def _is_leftover(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _LEFTOVERS


def _strip_wrappers(state: dict[str, _T]) -> dict[str, _T]:
    for prefix in _peel(list(state)):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    # torch.compile of a part of the network leaves its mark in the middle of names.
    inner = {name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}
    return inner if len(inner) == len(state) else state


def _peel(names: list[str]) -> Iterator[str]:
    while True:
        prefix = next((w for w in _WRAPPERS if names and all(name.startswith(w) for name in names)), None)
        if prefix is None:
            return
        yield prefix
        names = [name.removeprefix(prefix) for name in names]


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
    state: dict[str, torch.Tensor] = {}
    for count, (prefix, module) in enumerate(_modules(value, "")):
        if count == _MOST or prefix.count(".") == _DEEPEST:
            raise CheckpointError("its modules contain each other", where=where, hint=_HINT)
        passing = module.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set) else set()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _items(module, kind):
                if isinstance(tensor, torch.Tensor) and not (kind == "_buffers" and name in passing):
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
