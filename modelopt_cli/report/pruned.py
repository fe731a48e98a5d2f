"""Showing what pruning left of each layer, and what pruning each would cost."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelopt_cli.methods.context import Reached
from modelopt_cli.methods.prune.sensitivity import SPARSITIES, Point, Sensitivity
from modelopt_cli.methods.prune.summary import PrunedLayer
from modelopt_cli.methods.prune.target_figures import TARGETS
from modelopt_cli.methods.share.choices import BUDGETS
from modelopt_cli.option_names import as_read
from modelopt_cli.report.plots import HeatMap
from modelopt_cli.text import json_number, printable

_WHOLE = 1.0


def pruned_table(layers: Sequence[PrunedLayer]) -> RenderableType:
    """Table of every layer: weights that are kept, shape before and after, or why it is unpruned."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("layer", overflow="fold")
    grid.add_column("kind", overflow="fold")
    for title in ("weights left", "of", "removed"):
        grid.add_column(title, justify="right")
    grid.add_column("shape", overflow="fold")
    grid.add_column("why whole", overflow="fold")
    for layer in layers:
        grid.add_row(
            Text(printable(layer.name)),
            Text(printable(layer.kind)),
            f"{layer.kept:,}",
            f"{layer.total:,}",
            Text(f"{100 * layer.sparsity:.1f} %", "yellow" if layer.reason else "green"),
            _shapes(layer),
            Text(printable(as_read(layer.reason))),
        )
    kept, total = sum(layer.kept for layer in layers), sum(layer.total for layer in layers)
    count = sum(not layer.reason for layer in layers)
    line = f"{count} of {len(layers)} layers pruned; {kept:,} of {total:,} weights are left"
    return Group(grid, Text(line, style="bold"))


def _shapes(layer: PrunedLayer) -> str:
    before = "x".join(map(str, layer.shape))
    if layer.shape_left is None:
        return f"{before} -> gone"
    return (
        before if layer.shape_left == layer.shape else f"{before} -> {'x'.join(map(str, layer.shape_left))}"
    )


def target_line(target: Reached) -> str:
    """Line on a target and what was reached, in percent: removed for a sparsity, else kept."""
    lines = {row.metric: row.line for row in BUDGETS.values() if row.line}
    if target.metric in lines:
        return lines[target.metric].format(**dataclasses.asdict(target))
    row = TARGETS.get(target.metric)
    side = "removed" if row is not None and row.removed else "left"
    return f"{target.metric}: wanted {100 * target.wanted:.1f} % {side}, reached {100 * target.reached:.1f} %"


def pruned_json(layers: Sequence[PrunedLayer]) -> list[dict[str, Any]]:
    """The layers as ``prune --json`` prints them."""
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "total": layer.total,
            "kept": layer.kept,
            "sparsity": layer.sparsity,
            "shape": list(layer.shape),
            "left": None if layer.shape_left is None else list(layer.shape_left),
            "reason": layer.reason,
        }
        for layer in layers
    ]


def sensitivity_table(parts: Sequence[Sensitivity]) -> RenderableType:
    """Table with one line for each part: divergence of the logits, and predictions that stay the same."""
    columns = _columns(parts)
    grid = Table(box=None, pad_edge=False)
    grid.add_column("part", overflow="fold")
    for column in columns:
        grid.add_column(f"{100 * column:.0f} % removed", justify="right")
    for part in parts:
        points = {_column(point): point for point in part.points}
        grid.add_row(Text(printable(part.name)), *(_cell(points.get(column), column) for column in columns))
    line = (
        "KL divergence of the logits in nats, and predictions that stay the same, with this part alone pruned"
    )
    return Group(grid, Text(line, style="dim"))


def _columns(parts: Sequence[Sensitivity]) -> list[float]:
    return sorted({_column(point) for part in parts for point in part.points})


def _column(point: Point) -> float:
    """The sparsity of the table that a point belongs to; numbers of channels are whole."""
    return min((*SPARSITIES, _WHOLE), key=lambda sparsity: abs(sparsity - point.sparsity))


def _cell(point: Point | None, column: float) -> str:
    if point is None:
        return ""
    exact = "" if abs(point.sparsity - column) < 0.005 else f" at {100 * point.sparsity:.0f} %"
    return f"{point.divergence:.4f} {100 * point.agreement:5.1f} %{exact}"


def sensitivity_picture(parts: Sequence[Sensitivity]) -> HeatMap:
    """Picture of the table: the colours are divergences, the numbers predictions that stay the same."""
    columns = max((len(part.points) for part in parts), default=1)
    fullest = max(parts, key=lambda part: len(part.points))
    cells = [
        [(point.divergence, f"{100 * point.agreement:.0f} %") for point in part.points] for part in parts
    ]
    return HeatMap(
        rows=[part.name for part in parts],
        columns=[f"{100 * point.sparsity:.0f} %" for point in fullest.points],
        cells=[[*row, *[None] * (columns - len(row))] for row in cells],
        along="removed from this part alone; in the cells, the share of predictions that stay the same",
        colours="KL divergence, nats",
    )


def sensitivity_json(parts: Sequence[Sensitivity]) -> dict[str, Any]:
    """The object that ``prune --dry-run --sensitivity --json`` prints."""
    return {
        "schema_version": 1,
        "sensitivity": [
            {
                "name": part.name,
                "layers": list(part.layers),
                "points": [_point_json(point) for point in part.points],
            }
            for part in parts
        ],
    }


def _point_json(point: Point) -> dict[str, float | None]:
    divergence = json_number(point.divergence)
    return {"sparsity": point.sparsity, "divergence": divergence, "agreement": point.agreement}
