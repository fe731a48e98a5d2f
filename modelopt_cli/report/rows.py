"""What the table shows, as plain text: the terminal, Markdown and the picture share it.

One column for each model, one row for each figure. What compares a model with the baseline stands on the
line below the figure it compares. Sizes are in MB of 1,000,000 bytes.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from modelopt_cli.measure import Comparison, Evaluation, ModelReport
from modelopt_cli.measure.gates import describe
from modelopt_cli.text import printable

MISSING = "–"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: what the figure is.
        cells: one for each model, in order; ``MISSING`` where there is no figure.
        relative: whether it compares with the baseline.
    """

    label: str
    cells: tuple[str, ...]
    relative: bool = False


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
    found = []
    for label, cell in _ROWS:
        cells = tuple(cell(model, comparisons.get(i)) or MISSING for i, model in enumerate(evaluation.models))
        if any(text != MISSING for text in cells):
            found.append(Row(label.strip(), cells, relative=label.startswith(" ")))
    return tuple(found)


def footer(evaluation: Evaluation) -> tuple[str, ...]:
    """Under which conditions the figures hold; one line each."""
    machine = evaluation.environment
    lines = [_data_line(evaluation), _input_line(evaluation), _latency_line(evaluation)]
    lines.append(f"{machine.processor}, torch {machine.torch}, device {machine.device}")
    lines.append("MB is 1,000,000 bytes. FLOPs are 2 x MACs of convolutions, linears and matrix products.")
    lines.extend(f"note: {note}" for note in evaluation.notes)
    return tuple(printable(line) for line in lines if line)


def gate_lines(evaluation: Evaluation) -> tuple[tuple[bool, str], ...]:
    """For each gate whether it was met, and the line that says so."""
    names = headings(evaluation)
    return tuple(
        (gate.passed, f"{'pass' if gate.passed else 'FAIL'}  {names[gate.model]}: {describe(gate)}")
        for gate in evaluation.gates
    )


# --- cells -------------------------------------------------------------------------------------------

Cell = Callable[[ModelReport, Comparison | None], str | None]


def megabytes(count: int) -> str:
    """Bytes in MB, with enough digits to tell small files apart."""
    value = count / 1e6
    return f"{value:.2f} MB" if value >= 1 else f"{value:.4f} MB"


def millions(count: int) -> str:
    """A count with a unit that keeps it short."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def _drop(model: ModelReport, against: Comparison | None) -> str | None:
    found = against.difference if against else None
    return f"{found.drop_pp + 0.0:+.2f} pp" if found else None


def _interval(model: ModelReport, against: Comparison | None) -> str | None:
    found = against.difference if against else None
    return f"{found.low:+.2f} to {found.high:+.2f} pp" if found else None


def _p_value(model: ModelReport, against: Comparison | None) -> str | None:
    found = against.difference if against else None
    if not found:
        return None
    return f"{found.p_value:.3f}" if found.p_value >= 0.001 else f"{found.p_value:.0e}"


def _times(value: float | None, better: str, worse: str) -> str | None:
    """A factor in words, turned over where it is below one: nobody reads "0.80x faster" right."""
    if value is None or value <= 0:
        return None
    if round(max(value, 1 / value), 2) == 1:
        return f"not {better}"
    return f"{value:.2f}x {better}" if value >= 1 else f"{1 / value:.2f}x {worse}"


def _speedup(model: ModelReport, against: Comparison | None) -> str | None:
    found = against.speedup if against else None
    if found is None:
        return None
    return _times(found.ratio, "faster", "slower") if found.distinguishable else "not distinguishable"


def _speedup_interval(model: ModelReport, against: Comparison | None) -> str | None:
    found = against.speedup if against else None
    if found is None:
        return None
    return f"{found.low:.2f}x to {found.high:.2f}x" if math.isfinite(found.high) else "too few runs"


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms" if value >= 1 else f"{value:.4f} ms"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} %"


_ROWS: tuple[tuple[str, Cell], ...] = (
    ("file size", lambda m, c: megabytes(m.size.file_bytes)),
    ("tensors in it", lambda m, c: None if m.size.tensor_bytes is None else megabytes(m.size.tensor_bytes)),
    (" vs baseline", lambda m, c: _times(c.ratio, "smaller", "larger") if c else None),
    ("parameters", lambda m, c: millions(m.size.parameters)),
    ("non-zero", lambda m, c: millions(m.size.nonzero)),
    (
        "bits per weight",
        lambda m, c: None if m.size.bits_per_weight is None else f"{m.size.bits_per_weight:.2f}",
    ),
    ("layers compressed", lambda m, c: None if m.coverage is None else f"{100 * m.coverage:.0f} %"),
    (
        "weights compressed",
        lambda m, c: None if m.weight_coverage is None else f"{100 * m.weight_coverage:.1f} %",
    ),
    ("MACs", lambda m, c: millions(m.macs.total) if m.macs else None),
    ("FLOPs", lambda m, c: millions(m.macs.flops) if m.macs else None),
    ("top-1", lambda m, c: _percent(m.accuracy.top1) if m.accuracy else None),
    ("top-5", lambda m, c: _percent(m.accuracy.top5) if m.accuracy else None),
    (" top-1 drop", _drop),
    (" 95 % interval", _interval),
    (" p (McNemar)", _p_value),
    (" same prediction", lambda m, c: _percent(100 * c.agreement) if c and c.agreement is not None else None),
    ("latency, median", lambda m, c: _milliseconds(m.latency.median) if m.latency else None),
    ("latency, IQR", lambda m, c: _milliseconds(m.latency.iqr) if m.latency else None),
    (" vs baseline", _speedup),
    (" speedup, 95 % interval", _speedup_interval),
    ("timed as", lambda m, c: m.latency.form if m.latency else None),
    ("throughput", lambda m, c: f"{m.latency.throughput:.1f} /s" if m.latency else None),
    ("time to load", lambda m, c: None if m.load_s is None else _seconds(m.load_s)),
    ("peak memory", lambda m, c: None if m.peak_bytes is None else megabytes(m.peak_bytes)),
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
