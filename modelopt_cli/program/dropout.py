"""Turns ``F.dropout(x, p, training=False)`` back into a layer that drops in training.

A network is captured in evaluation mode, in which ``F.dropout(x, p, self.training)`` is a call that will
never do anything again. As an ``nn.Dropout`` it follows the Program's mode, and in evaluation it still
returns what it was given.
"""

import itertools
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.layer_kinds import build
from modelopt_cli.program.safe_names import is_path

_KINDS: dict[str, str] = {
    **{"dropout": "Dropout", "dropout1d": "Dropout1d", "dropout2d": "Dropout2d", "dropout3d": "Dropout3d"},
    **{"alpha_dropout": "AlphaDropout", "feature_alpha_dropout": "FeatureAlphaDropout"},
}
"""Operation -> kind of the layer."""


def recover_dropout(graph: fx.Graph, leaves: Collection[str]) -> dict[str, nn.Module]:
    """Replace calls of dropout that are switched off by layers that follow the network's mode.

    Args:
        graph: changed in place.
        leaves: paths below which the Program can have nothing, though the network may have modules there.

    Returns:
        The layers by path: ``dropout``, ``dropout_1`` and so on in the module that made the call.
    """
    taken = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")} | {*leaves}
    recovered: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        bound = _bound(node)
        if bound is None:
            continue
        path = _free_path(_owner(node), taken, leaves)
        taken.add(path)
        config = {"p": bound["p"], "inplace": False}
        recovered[path] = build(_KINDS[operation(node)], config)
        with graph.inserting_before(node):
            layer = graph.call_module(path, (bound["input"],))
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
        graph.erase_node(node)
    return recovered


def _bound(node: fx.Node) -> dict[str, Any] | None:
    """The arguments by name; None where the call is no dropout, is always on, or is computed."""
    if operation(node) not in _KINDS or not node.users:
        return None
    bound = arguments(node)
    plain = isinstance(bound["p"], int | float)
    return bound if plain and bound.get("training", bound.get("train")) is False else None


def _owner(node: fx.Node) -> str:
    """The path of the module whose forward pass made the call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _free_path(owner: str, taken: set[str], leaves: Collection[str]) -> str:
    parts = owner.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    leaf = next((path for path in above if path in leaves), None)
    start = f"{leaf}_" if leaf else f"{owner}." if is_path(f"{owner}.dropout") else ""
    for number in itertools.count():
        path = f"{start}dropout" + (f"_{number}" if number else "")
        if not any(path == t or t.startswith(f"{path}.") or path.startswith(f"{t}.") for t in taken):
            return path
    raise AssertionError("unreachable")
