"""Display of what a method would cost each layer alone: table, JSON and picture, by method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import RenderableType

from modelopt_cli.methods.quantize.sensitivity.layer_sensitivity import QuantizeSensitivity
from modelopt_cli.report import plots, pruned, rounded


class _View(NamedTuple):
    """Forms in which a result is shown."""

    table: Callable[[Any], RenderableType]
    json: Callable[[Any], dict[str, Any]]
    picture: Callable[[Any], plots.HeatMap]


_OWN: dict[type, _View] = {
    tuple: _View(pruned.sensitivity_table, pruned.sensitivity_json, pruned.sensitivity_picture),
    QuantizeSensitivity: _View(
        rounded.sensitivity_table, rounded.sensitivity_json, rounded.sensitivity_picture
    ),
}
"""By the type of the result: a tuple of ``prune.sensitivity.Sensitivity``, or ``QuantizeSensitivity``."""


def sensitivity_table(found: Any) -> RenderableType:
    """Table with one line for each part of the network that a method was tried on alone."""
    return _OWN[type(found)].table(found)


def sensitivity_json(found: Any) -> dict[str, Any]:
    """The object that ``--dry-run --sensitivity --json`` prints."""
    return _OWN[type(found)].json(found)


def plot_sensitivity(found: Any, path: str | Path) -> None:
    """Draw the table: a row for each part; the same table gives the same bytes with the same matplotlib.

    Raises:
        As ``plots.require_plots``.
    """
    plots.require_plots(path)
    plots.draw(_OWN[type(found)].picture(found), path)
