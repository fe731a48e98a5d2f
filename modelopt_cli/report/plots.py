"""Pictures of measurements; they need matplotlib, the ``plots`` extra."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import EnvironmentFailure, UsageError
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


@dataclass(frozen=True)
class HeatMap:
    """A picture of a table: a number in each cell, shown by its colour, and what is written there.

    Attributes:
        rows: their names.
        columns: their headings.
        cells: of each row: a number, above 0, and a text; None of an empty cell.
        along: what the columns are.
        colours: what the numbers are.
        ticks: names of numbers, of which the least has the palest colour; what is above the largest is black.
            Without any the colours reach from the least number in a cell to the largest.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[tuple[float, str] | None]]
    along: str
    colours: str
    ticks: Mapping[float, str] = field(default_factory=dict)


def draw(picture: HeatMap, path: str | Path) -> None:
    """Draw a table, the colours on a logarithmic scale.

    The same table gives the same bytes with the same matplotlib.

    Args:
        picture: what to draw.
        path: where to write; its suffix is the format.

    Raises:
        As ``require_plots``.
    """
    require_plots(path)
    matplotlib, _, _ = _matplotlib()
    figure = new_figure(_WIDTH_INCHES, 1.8 + _ROW_INCHES * len(picture.rows))
    axes = figure.add_subplot()
    numbers = [cell[0] for row in picture.cells for cell in row if cell is not None]
    low, high = (min(picture.ticks), max(picture.ticks)) if picture.ticks else _limits(numbers)
    image = axes.imshow(
        [[float("nan") if cell is None else max(cell[0], 1e-12) for cell in row] for row in picture.cells],
        aspect="auto",
        cmap=matplotlib.colormaps["YlOrRd"].with_extremes(over="black" if picture.ticks else None),
        norm=matplotlib.colors.LogNorm(low, high),
    )
    for y, row in enumerate(picture.cells):
        for x, cell in enumerate(row):
            if cell is not None:
                red, green, blue, _ = image.cmap(image.norm(max(cell[0], 1e-12)))
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < _DARK
                colour = "white" if dark else "black"
                axes.text(x, y, cell[1], ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(picture.rows)), picture.rows, fontsize=7)
    axes.set_xticks(range(len(picture.columns)), picture.columns)
    axes.set_xlabel(picture.along)
    bar = figure.colorbar(image, label=picture.colours, extend="both" if picture.ticks else "neither")
    if picture.ticks:
        bar.set_ticks(list(picture.ticks), labels=list(picture.ticks.values()), minor=False)
        bar.minorticks_off()
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


def _limits(numbers: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in numbers if 0 < value < float("inf")]
    low, high = min(finite, default=1e-6), max(finite, default=1.0)
    return max(low, 1e-6 * high), high * 1.0001


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
