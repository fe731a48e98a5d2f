"""Gates the user sets on what compression may cost and must bring.

Every model beside the baseline, or the one that is to be judged, is held against every limit. ``max-drop``
looks at the measured drop, not at the end of its interval; with few samples, read the interval too.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from modelopt_cli.errors import GateNotMet, UsageError
from modelopt_cli.measure.evaluation import Comparison, Evaluation, GateResult, ModelReport


@dataclass(frozen=True)
class Gates:
    """What is asked for; None asks for nothing.

    Attributes:
        max_drop: top-1 accuracy that may be lost, in percentage points.
        min_ratio: how many times smaller the file must be.
        min_speedup: how many times faster the median forward pass must be.
        min_coverage: share of the layers that must be compressed, 0 to 1.
        judged: index of the one model to hold against the limits; None holds all beside the baseline.
    """

    max_drop: float | None = None
    min_ratio: float | None = None
    min_speedup: float | None = None
    min_coverage: float | None = None
    judged: int | None = None

    def __post_init__(self) -> None:
        for gate in _GATES:
            value = gate.limit(self)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{value} is not a number to compare with", where=f"--{gate.name}")
        for name, value in (("--min-ratio", self.min_ratio), ("--min-speedup", self.min_speedup)):
            if value is not None and value < 0:
                raise UsageError(f"{value:g} is below zero", where=name)
        if self.min_coverage is not None and not 0 <= self.min_coverage <= 1:
            raise UsageError(
                f"{self.min_coverage:g} is not a share", where="--min-coverage", hint="give 0 to 1, e.g. 0.95"
            )

    def __bool__(self) -> bool:
        return any(gate.limit(self) is not None for gate in _GATES)


@dataclass(frozen=True)
class _Gate:
    """A row of the table of gates: its option, its limit, what it looks at, and how it reads."""

    name: str
    limit: Callable[[Gates], float | None]
    value: Callable[[ModelReport, Comparison], float | None]
    at_most: bool
    unit: str


_GATES = (
    _Gate(
        "max-drop",
        lambda gates: gates.max_drop,
        lambda model, against: against.difference.drop_pp if against.difference else None,
        at_most=True,
        unit=" pp",
    ),
    _Gate("min-ratio", lambda gates: gates.min_ratio, lambda model, against: against.ratio, False, "x"),
    _Gate("min-speedup", lambda gates: gates.min_speedup, lambda model, against: against.speedup, False, "x"),
    _Gate("min-coverage", lambda gates: gates.min_coverage, lambda model, against: model.coverage, False, ""),
)
# A drop of exactly one image in 200 must pass a limit of 0.5 although 0.5 came out of a division.
_TOLERANCE = 1e-9


def require_comparable(gates: Gates, models: int, baseline: int = 0) -> None:
    """Refuse limits that there is nothing to hold against.

    Raises:
        UsageError: there are limits but no model beside the baseline, or the one to judge is not such a one.
    """
    if gates and models < 2:
        raise UsageError("a limit needs a second model to compare with the baseline", hint="give two files")
    if gates.judged is not None and (gates.judged == baseline or not 0 <= gates.judged < models):
        raise UsageError(
            "is the baseline itself" if gates.judged == baseline else "is not measured", where="--judge"
        )


def apply(evaluation: Evaluation, gates: Gates) -> Evaluation:
    """The evaluation with the result of every limit on every model that is held against it.

    Raises:
        UsageError: there is no such model.
    """
    require_comparable(gates, len(evaluation.models), evaluation.baseline)
    results = tuple(
        _result(gate, limit, evaluation.models[against.model], against)
        for against in evaluation.comparisons
        if gates.judged in (None, against.model)
        for gate in _GATES
        if (limit := gate.limit(gates)) is not None
    )
    return dataclasses.replace(evaluation, gates=results)


def require(evaluation: Evaluation) -> None:
    """Pass silently if every gate was met.

    Raises:
        GateNotMet: naming each gate that was not, with its value, its limit and the model.
    """
    failed = [gate for gate in evaluation.gates if not gate.passed]
    if failed:
        lines = [f"{evaluation.models[gate.model].path}: {describe(gate)}" for gate in failed]
        raise GateNotMet("; ".join(lines))


def describe(gate: GateResult) -> str:
    """One gate in words, e.g. ``max-drop 1.2 pp is above the limit of 1 pp``."""
    row = next(row for row in _GATES if row.name == gate.name)
    limit = f"{gate.limit:.6g}{row.unit}"
    if gate.value is None:
        return f"{gate.name} was not measured (limit {limit})"
    value = f"{gate.value:.6g}{row.unit}"
    if gate.passed:
        return f"{gate.name} {value} keeps the limit of {limit}"
    return f"{gate.name} {value} is {'above' if row.at_most else 'below'} the limit of {limit}"


def _result(gate: _Gate, limit: float, model: ModelReport, against: Comparison) -> GateResult:
    value = gate.value(model, against)
    if value is None or math.isnan(value):
        return GateResult(gate.name, limit, None, False, against.model)
    excess = value - limit if gate.at_most else limit - value
    return GateResult(gate.name, limit, value, excess <= _TOLERANCE, against.model)
