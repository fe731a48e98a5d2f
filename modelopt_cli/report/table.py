"""The table of an evaluation, for terminals, pipes, notebooks and as a picture."""

import io
import re
from collections.abc import Iterable
from html import escape

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from modelopt_cli.measure import Evaluation
from modelopt_cli.report.rows import footer, gate_lines, headings, rows
from modelopt_cli.text import printable

_WIDE = 10_000


def table(evaluation: Evaluation) -> RenderableType:
    """The evaluation as a table with its conditions and gates below.

    Names and paths are put in as plain text, never as markup, with control characters escaped.
    """
    parts: list[RenderableType] = [_grid(evaluation)]
    parts.extend(
        Text(line, style="green" if passed else "bold red") for passed, line in gate_lines(evaluation)
    )
    parts.extend(Text(line, style="dim") for line in footer(evaluation))
    return Group(*parts)


def plain_text(renderable: RenderableType) -> str:
    """The renderable without colour, as wide as it needs, for pipes and files."""
    console = _console(_WIDE)
    width = Measurement.get(console, console.options, renderable).maximum
    console = _console(min(max(width, 1), _WIDE))
    console.print(renderable)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def group(parts: Iterable[RenderableType]) -> RenderableType:
    """Tables and lines below one another; the lines as plain text, never as markup."""
    return Group(*(Text(printable(part)) if isinstance(part, str) else part for part in parts))


def html(renderable: RenderableType) -> str:
    """The renderable for a notebook."""
    return f"<pre>{escape(plain_text(renderable))}</pre>"


def to_svg(evaluation: Evaluation, title: str = "modelopt") -> str:
    """The table as an SVG picture; the same evaluation gives the same bytes."""
    return svg(table(evaluation), title)


def svg(renderable: RenderableType, title: str) -> str:
    """Any renderable as an SVG picture of a terminal that is just wide enough."""
    probe = _console(_WIDE)
    width = Measurement.get(probe, probe.options, renderable).maximum
    console = Console(
        record=True,
        file=io.StringIO(),
        width=max(width, 40),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    console.print(renderable)
    drawn = console.export_svg(title=title, unique_id="modelopt")
    # rich loads its font from a third party; a picture in a README should load nothing.
    return re.sub(r"@font-face\s*\{.*?\}\s*", "", drawn, flags=re.DOTALL)


def _grid(evaluation: Evaluation) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("")
    for i, name in enumerate(headings(evaluation)):
        title: RenderableType = Text(name, overflow="fold")
        if i == evaluation.baseline and len(evaluation.models) > 1:
            title = Group(title, Text("baseline", style="dim"))
        grid.add_column(title, justify="right", overflow="fold")
    for row in rows(evaluation):
        label = Text(f"  {row.label}" if row.compares else row.label)
        grid.add_row(label, *(Text(cell) for cell in row.cells), style="cyan" if row.compares else "")
    return grid


def _console(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, no_color=True, _environ={}
    )
