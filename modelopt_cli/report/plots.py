"""Pictures of measurements; they need matplotlib, the ``plots`` extra."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import EnvironmentFailure, UsageError
from modelopt_cli.methods.prune.sensitivity import Sensitivity
from modelopt_cli.report.formats import PICTURES

_ROW_INCHES, _WIDTH_INCHES = 0.22, 9.0
_DARK = 0.45
"""Relative luminance (ITU-R BT.709) below which a cell is too dark for black letters."""


def require_plots(path: str | Path) -> None:
    """Make sure, before anything is measured, that a picture can be drawn.

    Raises:
        EnvironmentFailure: matplotlib is missing.
        UsageError: ``path`` is in none of ``PICTURES``.
    """
    if Path(path).suffix.lower() not in PICTURES:
        raise UsageError("is no picture's name", where=str(path), hint=f"end it in {', '.join(PICTURES)}")
    _matplotlib()


def plot_sensitivity(table: Sequence[Sensitivity], path: str | Path) -> None:
    """Draw what each part of a network minds: a row for each part, a column for each sparsity.

    The colour is the divergence of the logits, on a logarithmic scale, and the number the agreement in
    percent. The same table gives the same bytes with the same matplotlib.

    Args:
        table: as ``prune.sensitivity`` gives it.
        path: where to write; its suffix is the format.

    Raises:
        As ``require_plots``.
    """
    require_plots(path)
    matplotlib, _, _ = _matplotlib()
    columns = max((len(part.points) for part in table), default=1)
    figure = new_figure(_WIDTH_INCHES, 1.8 + _ROW_INCHES * len(table))
    axes = figure.add_subplot()
    cells = [[_cell(part, column) for column in range(columns)] for part in table]
    low, high = _limits(table)
    image = axes.imshow(
        [[value for value, _ in row] for row in cells],
        aspect="auto",
        cmap="YlOrRd",
        norm=matplotlib.colors.LogNorm(low, high, clip=True),
    )
    for y, row in enumerate(cells):
        for x, (value, text) in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < _DARK
            colour = "white" if dark else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(table)), [part.name for part in table], fontsize=7)
    axes.set_xticks(range(columns), _headings(table, columns))
    axes.set_xlabel("removed from this part alone; in the cells, the share of predictions that stay the same")
    figure.colorbar(image, label="KL divergence, nats")
    save(figure, path, force=True)


def new_figure(width: float, height: float) -> Any:
    """An empty one, in inches; raises EnvironmentFailure where matplotlib is missing."""
    _, figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=(width, height), layout="constrained")
    canvas_class(figure)
    return figure


def save(figure: Any, path: str | Path, *, force: bool) -> None:
    """Write a picture, whole or not at all; the same figure gives the same bytes with the same matplotlib.

    Args:
        figure: of :func:`new_figure`.
        path: where to; its suffix is one of ``PICTURES``.
        force: replace an existing file.

    Raises:
        OutputError, EnvironmentFailure: as ``artifact.writer.atomic_write``.
    """
    matplotlib, _, _ = _matplotlib()
    suffix, page = Path(path).suffix.lower(), io.BytesIO()
    # Neither a date nor random ids, so that nothing but what is drawn decides the bytes.
    with matplotlib.rc_context({"svg.hashsalt": "modelopt"}):
        figure.savefig(page, format=suffix[1:], dpi=150, metadata=PICTURES[suffix])
    atomic_write(path, [page.getvalue()], force)


def _cell(part: Sensitivity, column: int) -> tuple[float, str]:
    if column >= len(part.points):
        return float("nan"), ""
    point = part.points[column]
    return max(point.divergence, 1e-12), f"{100 * point.agreement:.0f} %"


def _limits(table: Sequence[Sensitivity]) -> tuple[float, float]:
    divergences = [point.divergence for part in table for point in part.points]
    finite = [value for value in divergences if 0 < value < float("inf")]
    low, high = min(finite, default=1e-6), max(finite, default=1.0)
    return max(low, 1e-6 * high), high * 1.0001


def _headings(table: Sequence[Sensitivity], columns: int) -> list[str]:
    """The sparsities, of the part that has most of them."""
    fullest = max(table, key=lambda part: len(part.points))
    return [f"{100 * point.sparsity:.0f} %" for point in fullest.points[:columns]]


def _matplotlib() -> tuple[Any, Any, Any]:
    try:
        import matplotlib.colors
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFailure(
            "drawing needs matplotlib", hint="pip install 'modelopt-cli[plots]'"
        ) from None
    return matplotlib, Figure, FigureCanvasAgg
