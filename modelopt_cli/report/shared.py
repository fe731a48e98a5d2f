"""Showing what sharing made of each layer."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelopt_cli.methods.share.shared_layers import SharedLayer
from modelopt_cli.option_names import as_read
from modelopt_cli.text import printable


def shared_table(layers: Sequence[SharedLayer]) -> RenderableType:
    """Table of every layer: number of values, bits, error, or why it was left out."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("layer", overflow="fold")
    grid.add_column("kind", overflow="fold")
    for title in ("weights", "values", "bits", "error"):
        grid.add_column(title, justify="right")
    grid.add_column("why left", overflow="fold")
    for layer in layers:
        grid.add_row(
            Text(printable(layer.name)),
            Text(printable(layer.kind)),
            f"{layer.weights:,}",
            f"{layer.values:,}",
            f"{layer.bits:.2f}",
            "" if layer.error is None else f"{100 * layer.error:.2f} %",
            Text(printable(as_read(layer.reason)), "yellow"),
        )
    shared = [layer for layer in layers if not layer.reason]
    count = sum(layer.weights for layer in shared)
    mean = sum(layer.bits * layer.weights for layer in shared) / max(count, 1)
    line = (
        f"{len(shared)} of {len(layers)} layers shared; {count:,} weights at {mean:.2f} bits by their entropy"
    )
    return Group(grid, Text(line, style="bold"))


def shared_json(layers: Sequence[SharedLayer]) -> list[dict[str, Any]]:
    """The layers as ``share --json`` prints them."""
    return [dict(vars(layer)) for layer in layers]
