"""Display of layers: how each was compressed, why others were not, and how much that is in all."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.prune.summary import PrunedLayer
from modelopt_cli.methods.share.shared_layers import SharedLayer
from modelopt_cli.option_names import as_read
from modelopt_cli.report.pruned import pruned_json, pruned_table
from modelopt_cli.report.shared import shared_json, shared_table
from modelopt_cli.text import printable

_SHOWN = 5

_OWN: dict[type, tuple[Callable[[Any], RenderableType], Callable[[Any], list[dict[str, Any]]]]] = {
    PrunedLayer: (pruned_table, pruned_json),
    SharedLayer: (shared_table, shared_json),
}


def layer_table(layers: Sequence[Any], coverage: Coverage) -> RenderableType:
    """Table of every layer, with the columns of the method that made the result, if it has its own."""
    return _OWN[type(layers[0])][0](layers) if layers else coverage_table(coverage)


def layers_json(layers: Sequence[Any], coverage: Coverage) -> list[dict[str, Any]]:
    """List of the rows of :func:`layer_table` as JSON objects."""
    return _OWN[type(layers[0])][1](layers) if layers else [dict(vars(layer)) for layer in coverage.layers]


def coverage_table(coverage: Coverage) -> RenderableType:
    """Table of every layer: how it is compressed, or why it is not."""
    grid = Table(box=None, pad_edge=False)
    for title in ("layer", "kind", "compressed", "why not"):
        grid.add_column(title, overflow="fold")
    for layer in coverage.layers:
        if layer.compressed:
            status = Text(printable(layer.scheme) or "yes", "green")
        else:
            earlier = f"no, {layer.before} before" if layer.before else "no"
            status = Text(printable(earlier), "yellow")
        grid.add_row(
            Text(printable(layer.name)),
            Text(printable(layer.kind)),
            status,
            Text(printable(as_read(layer.reason))),
        )
    return grid


def coverage_lines(coverage: Coverage) -> list[str]:
    """Lines on the share of layers and of the weights' bytes that is compressed, and why the rest is not."""
    share = _share(coverage.byte_fraction)
    lines = [f"compressed {coverage.compressed} of {_layers(coverage.total)}, {share} of the weights' bytes"]
    if coverage.before:
        lines.append(f"  compressed before this: {len(coverage.before)} of {_layers(coverage.total)}")
    groups = coverage.left_out
    for reason, layers in groups[:_SHOWN]:
        share = _share(sum(layer.bytes for layer in layers) / (coverage.bytes or 1))
        lines.append(printable(f"  not {_layers(len(layers))}, {share}: {as_read(reason)}"))
    if unshown := groups[_SHOWN:]:
        count = sum(len(layers) for _, layers in unshown)
        lines.append(f"  not {_layers(count)} for {len(unshown)} other reasons; -v lists every layer")
    return lines


def coverage_json(coverage: Coverage) -> dict[str, Any]:
    """Numbers of layers and bytes, and reasons, as every method's ``--json`` prints them."""
    return {
        "layers": coverage.compressed,
        "of_layers": coverage.total,
        "bytes": coverage.compressed_bytes,
        "of_bytes": coverage.bytes,
        "layers_before": len(coverage.before),
        "left_out": [
            {"reason": reason, "layers": len(layers), "bytes": sum(layer.bytes for layer in layers)}
            for reason, layers in coverage.left_out
        ],
    }


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _share(fraction: float) -> str:
    """Percent, never rounded to all or nothing where it is not."""
    if 0 < fraction < 0.001:
        return "under 0.1 %"
    if 0.999 < fraction < 1:
        return "over 99.9 %"
    return f"{100 * fraction:.1f} %"
