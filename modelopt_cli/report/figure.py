"""A figure of an evaluation, and its texts. Sizes are in MB of 1,000,000 bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelopt_cli.measure import Comparison, ModelReport, Speedup
from modelopt_cli.text import json_number


@dataclass(frozen=True)
class Figure:
    """Row of the table, field of JSON and CSV, or both.

    Attributes:
        help: one line for the documentation.
        title: of the table's row, in which ``{metric}`` stands for the title of the task's main metric and
            ``{change}`` for the word for its change for the worse; empty where the figure is only exported.
        measured: the figure of a :class:`ModelReport`, or of a :class:`Comparison` where it compares with the
            baseline; None where it was not measured.
        text: the figure as the table shows it; None where there is nothing to say.
        number: the figure as JSON and CSV hold it; None where it is only shown in the table.
        compares: True if it compares a model with the baseline.
        path: keys in JSON, from the model or the comparison on; empty where its name is the only one.
        optional: False for a figure that JSON always holds, null where it was not measured.
        column: place among the columns of CSV files; those without one come last.
    """

    help: str
    title: str
    measured: Callable[[Any], Any]
    text: Callable[[Any], str | None] = str
    number: Callable[[Any], float | None] | None = lambda figure: figure
    compares: bool = False
    path: tuple[str, ...] = ()
    optional: bool = False
    column: int | None = None

    def cell(self, model: ModelReport, comparison: Comparison | None) -> str | None:
        """Text of the table's cell, or None."""
        figure = self._of(model, comparison)
        return None if figure is None else self.text(figure)

    def value(self, model: ModelReport, comparison: Comparison | None) -> float | None:
        """Number for JSON and CSV, which know neither NaN nor infinity; None where there is none."""
        figure = self._of(model, comparison)
        if figure is None or self.number is None:
            return None
        return json_number(self.number(figure))

    def _of(self, model: ModelReport, comparison: Comparison | None) -> Any:
        source = comparison if self.compares else model
        return None if source is None else self.measured(source)


def megabytes(count: int) -> str:
    """Bytes in MB, with enough digits to tell small files apart."""
    value = count / 1e6
    return f"{value:.2f} MB" if value >= 1 else f"{value:.4f} MB"


def millions(count: int) -> str:
    """Write a count with a unit that keeps it short."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def factor(value: float, better: str, worse: str) -> str | None:
    """Write a factor in words, turned over where it is below one: nobody reads "0.80x faster" right."""
    if not value > 0:
        return None
    if round(max(value, 1 / value), 2) == 1:
        return f"not {better}"
    return f"{value:.2f}x {better}" if value >= 1 else f"{1 / value:.2f}x {worse}"


def speedup(measured: Speedup) -> str | None:
    """A speedup in words, where the measurement tells it from none."""
    if not measured.distinguishable:
        return "not distinguishable"
    return factor(measured.ratio, "faster", "slower")


def speedup_interval(measured: Speedup) -> str:
    """The interval of a speedup, where there were enough runs for one."""
    low, high = measured.low, measured.high
    return f"{low:.2f}x to {high:.2f}x" if math.isfinite(high) else "too few runs"


def p_value(p: float) -> str:
    """A probability, small ones as a power of ten."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def milliseconds(value: float) -> str:
    """Milliseconds with their unit."""
    return f"{value:.2f} ms" if value >= 1 else f"{value:.4f} ms"


def seconds(value: float) -> str:
    """Seconds, short ones in milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
