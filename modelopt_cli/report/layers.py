"""The layers of a result: by the method's own rows where it has some, else by what was compressed."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType

from modelopt_cli.methods.prune.summary import PrunedLayer
from modelopt_cli.methods.share.shared_layers import SharedLayer
from modelopt_cli.program.coverage import Coverage
from modelopt_cli.report.coverage import coverage_table
from modelopt_cli.report.pruned import pruned_json, pruned_table
from modelopt_cli.report.shared import shared_json, shared_table

_OWN: dict[type, tuple[Callable[[Any], RenderableType], Callable[[Any], list[dict[str, Any]]]]] = {
    PrunedLayer: (pruned_table, pruned_json),
    SharedLayer: (shared_table, shared_json),
}


def layer_table(layers: Sequence[Any], coverage: Coverage) -> RenderableType:
    """A table of every layer."""
    return _OWN[type(layers[0])][0](layers) if layers else coverage_table(coverage)


def layers_json(layers: Sequence[Any], coverage: Coverage) -> list[dict[str, Any]]:
    """The same as JSON."""
    return _OWN[type(layers[0])][1](layers) if layers else [dict(vars(layer)) for layer in coverage.layers]
