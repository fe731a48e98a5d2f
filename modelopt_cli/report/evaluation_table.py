"""The table of an evaluation, for terminals, pipes, notebooks, Markdown and as a picture.

One column for each model, one row for each of its figures. A figure that compares a model with the baseline
is on the line below the figure it compares.
"""

import io
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from modelopt_cli.measure import Evaluation
from modelopt_cli.measure.gates import describe
from modelopt_cli.report.figure_rows import figures_of
from modelopt_cli.text import printable, shortened

MISSING = "–"
_WIDE = 10_000


@dataclass(frozen=True)
class TableRow:
    """One line of the table.

    Attributes:
        label: title of the figure.
        cells: one for each model, in order; ``MISSING`` where there is no figure.
        compares: True if the figure compares with the baseline.
    """

    label: str
    cells: tuple[str, ...]
    compares: bool = False


def headings(evaluation: Evaluation) -> tuple[str, ...]:
    """The models' file names, or their paths where two files have the same name."""
    paths = [model.path for model in evaluation.models]
    names = [os.path.basename(path) or path for path in paths]
    return tuple(
        printable(name if names.count(name) == 1 else path) for name, path in zip(names, paths, strict=True)
    )


def rows(evaluation: Evaluation) -> tuple[TableRow, ...]:
    """Return all rows in which at least one model has a figure."""
    comparisons = {c.model: c for c in evaluation.comparisons}
    main = next(iter(evaluation.rows.values()))
    shown = []
    for figure in figures_of(evaluation).values():
        cells = [figure.cell(model, comparisons.get(i)) for i, model in enumerate(evaluation.models)]
        if figure.title and any(cells):
            title = figure.title.format(metric=main.title, change=main.change)
            shown.append(TableRow(title, tuple(cell or MISSING for cell in cells), figure.compares))
    return tuple(shown)


def footer(evaluation: Evaluation) -> tuple[str, ...]:
    """Conditions under which the figures hold; one line each."""
    machine = evaluation.environment
    task = "" if evaluation.task is None else f"task: {evaluation.task}"
    lines = [task, _data_line(evaluation), _input_line(evaluation), _latency_line(evaluation)]
    lines.append(f"{machine.processor}, torch {machine.torch}, device {machine.device}")
    lines.append("MB is 1,000,000 bytes. FLOPs are 2 x MACs of convolutions, linears and matrix products.")
    lines.extend(f"note: {note}" for note in evaluation.notes)
    return tuple(printable(line) for line in lines if line)


def gate_lines(evaluation: Evaluation) -> tuple[tuple[bool, str], ...]:
    """True or False for each gate, met or not, and the line that says so."""
    names = headings(evaluation)
    return tuple(
        (gate.passed, f"{'pass' if gate.passed else 'FAIL'}  {names[gate.model]}: {describe(gate)}")
        for gate in evaluation.gates
    )


def _data_line(evaluation: Evaluation) -> str:
    counts = {model.accuracy.samples for model in evaluation.models if model.accuracy}
    if not counts:
        compared = any(comparison.fidelity for comparison in evaluation.comparisons)
        on_noise = "; outputs are compared on noise" if compared else ""
        return "" if evaluation.data is not None else f"accuracy: not measured, no data was given{on_noise}"
    samples = f"{max(counts):,} sample{'s' * (max(counts) != 1)}"
    line = f"data: {shortened(evaluation.data or '')}, {samples}"
    differences = [each.difference for each in evaluation.comparisons if each.difference]
    difference = next(iter(differences), None)
    if difference is None:
        return line
    if difference.p_value is not None:
        return f"{line}; drop is baseline minus model, with Tango's 95 % interval"
    main = next(iter(evaluation.rows.values()))
    lost = "baseline minus model" if main.higher_is_better else "model minus baseline"
    known = any(math.isfinite(each.high - each.low) for each in differences)  # too few samples have none
    return f"{line}; {main.change} is {lost}{', with a bootstrapped 95 % interval' * known}"


def _input_line(evaluation: Evaluation) -> str:
    return "" if evaluation.input is None else f"input: {evaluation.input}"


def _latency_line(evaluation: Evaluation) -> str:
    baseline = evaluation.models[evaluation.baseline].latency
    timed = next((model.latency for model in evaluation.models if model.latency), None)
    if timed is None:
        return "latency: not measured"
    threads = evaluation.environment.threads
    line = (
        f"latency: batch {timed.batch_size}, {threads} thread{'s' * (threads != 1)}, "
        f"{timed.runs} interleaved runs"
    )
    return f"{line}, baseline in its fastest form: {baseline.variant}" if baseline else line


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
