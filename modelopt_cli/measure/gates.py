"""Gates the user sets on what compression may cost and must bring.

Every model but the baseline, or the one that is to be judged, is held against every limit. ``min-speedup``
looks at the lower end of the speedup's 95 % interval, because times are noise in part. ``max-drop`` looks at
the measured drop, and with ``confident`` at the upper end of its interval. Size and coverage are exact.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from modelopt_cli.errors import GateNotMet, UsageError
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.measure.evaluation import Comparison, Evaluation, GateResult, ModelReport
from modelopt_cli.measure.speedup import least_rounds, rounds_needed
from modelopt_cli.measure.statistics import samples_needed
from modelopt_cli.measure.subject import Obstacle, Subject
from modelopt_cli.settings import fields_of, option

_RUNS = next(field for field in fields_of(EvalOptions) if field.name == "runs")


@dataclass(frozen=True)
class Means:
    """What an evaluation has to judge by: labels or not, and how many timed rounds."""

    labelled: bool
    runs: int


def _labels(means: Means) -> Obstacle | None:
    return (
        None
        if means.labelled
        else Obstacle("needs labelled data to be held against", f"give {option('data')}")
    )


def _rounds(means: Means) -> Obstacle | None:
    if means.runs >= least_rounds():
        return None
    return Obstacle(
        f"{means.runs} runs give no 95 % interval", f"give {_RUNS.label} {least_rounds()} or more"
    )


@dataclass(frozen=True)
class _Gate:
    """A row of the table of gates.

    Attributes:
        name: its option.
        limit: the number asked for.
        value: the figure it looks at.
        at_most: whether the limit is the largest or the smallest value allowed.
        unit: of both.
        bound: the end of the figure's interval that speaks against the model; None where it is exact.
        cautious: whether ``bound`` is judged instead of ``value``.
        lacks: what the evaluation lacks to measure ``value``.
        hindered: what keeps ``value`` from being measured of the baseline, and of the model it is of.
    """

    name: str
    limit: Callable[[Gates], float | None]
    value: Callable[[ModelReport, Comparison], float | None]
    at_most: bool
    unit: str
    bound: Callable[[Comparison], float | None] | None = None
    cautious: Callable[[Gates], bool] = lambda gates: False
    lacks: Callable[[Means], Obstacle | None] = lambda means: None
    hindered: Callable[[Subject, Subject], tuple[Subject, Obstacle] | None] = lambda baseline, model: None


def _not_run(*subjects: Subject) -> tuple[Subject, Obstacle] | None:
    """The first of two models that cannot be run."""
    return next(((each, each.obstacle) for each in subjects if each.obstacle is not None), None)


def _not_covered(baseline: Subject, model: Subject) -> tuple[Subject, Obstacle] | None:
    if model.coverage is not None:
        return None
    hint = f"give {option('arch')}" if model.model is None else "hold a file that modelopt wrote against it"
    return model, Obstacle("nothing says which of its layers are compressed", hint)


_GATES = (
    _Gate(
        "max-drop",
        lambda gates: gates.max_drop,
        lambda model, against: against.difference.drop_pp if against.difference else None,
        at_most=True,
        unit=" pp",
        bound=lambda against: against.difference.high if against.difference else None,
        cautious=lambda gates: gates.confident,
        lacks=_labels,
        hindered=_not_run,
    ),
    _Gate("min-ratio", lambda gates: gates.min_ratio, lambda model, against: against.ratio, False, "x"),
    _Gate(
        "min-speedup",
        lambda gates: gates.min_speedup,
        lambda model, against: against.speedup.ratio if against.speedup else None,
        at_most=False,
        unit="x",
        bound=lambda against: against.speedup.low if against.speedup else None,
        cautious=lambda gates: True,
        lacks=_rounds,
        hindered=_not_run,
    ),
    _Gate(
        "min-coverage",
        lambda gates: gates.min_coverage,
        lambda model, against: model.coverage,
        at_most=False,
        unit="",
        hindered=_not_covered,
    ),
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
            "is the baseline itself" if gates.judged == baseline else "is not measured", where=option("judge")
        )


def apply(evaluation: Evaluation, gates: Gates) -> Evaluation:
    """The evaluation with the result of every limit on every model that is held against it.

    Raises:
        UsageError: there is no such model.
    """
    require_comparable(gates, len(evaluation.models), evaluation.baseline)
    judged = [against for against in evaluation.comparisons if gates.judged in (None, against.model)]
    results = tuple(
        _result(gate, gates, limit, evaluation.models[against.model], against)
        for against in judged
        for gate in _asked(gates)
        if (limit := gate.limit(gates)) is not None
    )
    notes = [
        f"{evaluation.models[against.model].path}: {note}"
        for against in judged
        for note in _unresolved(gates, against)
    ]
    return dataclasses.replace(evaluation, gates=results, notes=(*evaluation.notes, *notes))


def require_means(gates: Gates, means: Means) -> None:
    """Refuse limits on what an evaluation will not measure, whatever the models are.

    Raises:
        UsageError: there are no labels, or fewer rounds than an interval takes.
    """
    for gate in _asked(gates):
        if (lack := gate.lacks(means)) is not None:
            raise UsageError(lack.what, where=option(gate.name.replace("-", "_")), hint=lack.hint)


def require_measurable(gates: Gates, subjects: Sequence[Subject], baseline: int, means: Means) -> None:
    """Refuse limits that will not be measured of a model that is to be held against them.

    Raises:
        UsageError: as :func:`require_means`; or the baseline or such a model cannot be run, or does not say
            what is compressed in it.
    """
    require_means(gates, means)
    judged = [i for i in range(len(subjects)) if i != baseline and gates.judged in (None, i)]
    for gate in _asked(gates):
        for i in judged:
            if (found := gate.hindered(subjects[baseline], subjects[i])) is not None:
                subject, why = found
                what = f"cannot be judged, {why.what}"
                raise UsageError(what, where=f"--{gate.name}: {subject.path}", hint=why.hint)


def _asked(gates: Gates) -> Iterator[_Gate]:
    return (gate for gate in _GATES if gate.limit(gates) is not None)


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
    if gate.end is not None:
        value += f", the {gate.end} end of its 95 % interval,"
    if gate.passed:
        return f"{gate.name} {value} keeps the limit of {limit}"
    return f"{gate.name} {value} is {'above' if row.at_most else 'below'} the limit of {limit}"


def _result(gate: _Gate, gates: Gates, limit: float, model: ModelReport, against: Comparison) -> GateResult:
    value, end = gate.value(model, against), None
    if value is not None and gate.bound is not None and gate.cautious(gates):
        value, end = gate.bound(against), "upper" if gate.at_most else "lower"
    if value is None or math.isnan(value):
        return GateResult(gate.name, limit, None, False, against.model)
    excess = value - limit if gate.at_most else limit - value
    return GateResult(gate.name, limit, value, excess <= _TOLERANCE, against.model, end)


def _unresolved(gates: Gates, against: Comparison) -> Iterator[str]:
    """Samples or runs needed to tell whether a limit is kept, where the measured interval cannot."""
    found, limit = against.difference, gates.max_drop
    if (
        found is not None
        and limit is not None
        and found.low <= limit <= found.high
        and 0 < limit < found.high - found.drop_pp
    ):
        yield (
            f"{found.samples:,} samples cannot tell whether a limit of {limit:g} pp is kept; with about "
            f"{samples_needed(found, limit):,} the interval would end {limit:g} pp above the drop"
        )
    if against.speedup is not None and gates.min_speedup is not None:
        rounds = rounds_needed(against.speedup, gates.min_speedup)
        if rounds is not None:
            yield (
                f"{against.speedup.rounds:,} runs cannot tell whether it is {gates.min_speedup:g}x faster; "
                f"about {rounds:,} might"
            )
