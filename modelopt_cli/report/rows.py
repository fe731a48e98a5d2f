"""Rows of the table as plain text: the terminal, Markdown and the picture share them.

One column for each model, one row for each of ``FIGURES``. A figure that compares a model with the baseline
is on the line below the figure it compares.
"""

import os
from dataclasses import dataclass

from modelopt_cli.measure import Evaluation
from modelopt_cli.measure.gates import describe
from modelopt_cli.report.figures import FIGURES
from modelopt_cli.text import printable

MISSING = "–"


@dataclass(frozen=True)
class Row:
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


def rows(evaluation: Evaluation) -> tuple[Row, ...]:
    """All rows in which at least one model has a figure."""
    comparisons = {c.model: c for c in evaluation.comparisons}
    shown = []
    for figure in FIGURES.values():
        cells = [figure.cell(model, comparisons.get(i)) for i, model in enumerate(evaluation.models)]
        if figure.title and any(cells):
            shown.append(Row(figure.title, tuple(cell or MISSING for cell in cells), figure.compares))
    return tuple(shown)


def footer(evaluation: Evaluation) -> tuple[str, ...]:
    """Conditions under which the figures hold; one line each."""
    machine = evaluation.environment
    lines = [_data_line(evaluation), _input_line(evaluation), _latency_line(evaluation)]
    lines.append(f"{machine.processor}, torch {machine.torch}, device {machine.device}")
    lines.append("MB is 1,000,000 bytes. FLOPs are 2 x MACs of convolutions, linears and matrix products.")
    lines.extend(f"note: {note}" for note in evaluation.notes)
    return tuple(printable(line) for line in lines if line)


def gate_lines(evaluation: Evaluation) -> tuple[tuple[bool, str], ...]:
    """For each gate, True if it was met, and the line that says so."""
    names = headings(evaluation)
    return tuple(
        (gate.passed, f"{'pass' if gate.passed else 'FAIL'}  {names[gate.model]}: {describe(gate)}")
        for gate in evaluation.gates
    )


def _data_line(evaluation: Evaluation) -> str:
    counts = {model.accuracy.samples for model in evaluation.models if model.accuracy}
    if not counts:
        return "accuracy: not measured, no data was given" if evaluation.data is None else ""
    line = f"data: {evaluation.data}, {max(counts):,} samples"
    if not any(comparison.difference for comparison in evaluation.comparisons):
        return line
    return f"{line}; drop is baseline minus model, with Tango's 95 % interval"


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
    return f"{line}, baseline in its fastest form: {baseline.form}" if baseline else line
