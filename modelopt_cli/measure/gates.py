"""Judging of an evaluation by the gates that the user sets.

Every model but the baseline, or the one that is to be judged, is held against every limit. A gate looks at
the measured figure, or at the end of its 95 % interval that speaks against the model.
"""

import dataclasses
import math
from collections.abc import Sequence

from modelopt_cli.errors import GateNotMet, UsageError
from modelopt_cli.measure.conditions import Conditions
from modelopt_cli.measure.config import GATES, Gate, Gates
from modelopt_cli.measure.evaluated_model import EvaluatedModel
from modelopt_cli.measure.evaluation import Comparison, Evaluation, GateResult, ModelReport
from modelopt_cli.measure.metrics import metrics_of
from modelopt_cli.settings import option
from modelopt_cli.tasks import TaskSpec

# A drop of exactly one image in 200 must pass a limit of 0.5 although 0.5 came out of a division.
_TOLERANCE = 1e-9


def require_comparable(gates: Gates, models: int, baseline: int = 0) -> None:
    """Refuse limits on which no model can be judged.

    Raises:
        UsageError: there are limits but no model to judge, or the one to judge is the baseline.
    """
    if gates and models < 2:
        raise UsageError("a gate needs a second model to compare with the baseline", hint="give two files")
    if gates.judged is not None and (gates.judged == baseline or not 0 <= gates.judged < models):
        raise UsageError(
            "is the baseline itself" if gates.judged == baseline else "is not measured",
            where=option("target_model"),
        )


def apply(evaluation: Evaluation, gates: Gates) -> Evaluation:
    """Add to an evaluation the result of every limit on every model that is held against it.

    Raises:
        UsageError: there is no such model.
    """
    require_comparable(gates, len(evaluation.models), evaluation.baseline)
    limits = gates.limits()
    judged = [each for each in evaluation.comparisons if gates.judged in (None, each.model)]
    results = tuple(
        _result(name, limit, gates, evaluation.models[comparison.model], comparison)
        for comparison in judged
        for name, limit in limits.items()
    )
    notes = [
        f"{evaluation.models[comparison.model].path}: {note}"
        for comparison in judged
        for name, limit in limits.items()
        if (note := GATES[name].unresolved(comparison, limit)) is not None
    ]
    return dataclasses.replace(evaluation, gates=results, notes=(*evaluation.notes, *notes))


def require_conditions(gates: Gates, conditions: Conditions) -> None:
    """Refuse limits on what an evaluation will not measure, whatever the models are.

    Raises:
        UsageError: there are no labels, or fewer rounds than an interval takes.
    """
    for name in gates.limits():
        if (lacking := GATES[name].lacking(conditions)) is not None:
            raise UsageError(lacking.reason, where=_label(name), hint=lacking.hint)


def require_measurable(
    gates: Gates, models: Sequence[EvaluatedModel], baseline: int, conditions: Conditions
) -> None:
    """Refuse limits that will not be measured of a model that is to be held against them.

    Raises:
        UsageError: as :func:`require_conditions`; or the baseline or such a model cannot be run, or does not
            say which of its layers are compressed.
    """
    require_conditions(gates, conditions)
    judged = [i for i in range(len(models)) if i != baseline and gates.judged in (None, i)]
    for name in gates.limits():
        for i in judged:
            if (pair := GATES[name].obstacle(models[baseline], models[i])) is not None:
                model, obstacle = pair
                message = f"cannot be judged, {obstacle.reason}"
                raise UsageError(message, where=f"{_label(name)}: {model.path}", hint=obstacle.hint)


def require_reachable(gates: Gates, task: TaskSpec) -> None:
    """Refuse a largest drop that the task's main metric never exceeds.

    Raises:
        UsageError: it is more than the metric's whole range.
    """
    main = next(iter(metrics_of(task).values()))
    most = main.largest if main.higher_is_better else None  # an error may be larger than any
    if gates.max_drop is not None and most is not None and gates.max_drop > most:
        problem = f"is more than {main.title} can lose, {most:g}{main.drop_unit}: every file would pass"
        raise UsageError(
            problem, where=option("max_drop", f"{gates.max_drop:g}"), hint="give a smaller limit"
        )


def _label(name: str) -> str:
    return option(name.replace("-", "_"))


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
    """Return one gate in words, e.g. ``max-drop 1.2 pp is above the limit of 1 pp``."""
    row = GATES[gate.name]
    unit = row.unit if gate.unit is None else gate.unit
    limit = f"{gate.limit:.6g}{unit}"
    if gate.value is None:
        return f"{gate.name} was not measured (limit {limit})"
    value = f"{gate.value:.6g}{unit}"
    if gate.end is not None:
        value += f", the {gate.end} end of its 95 % interval,"
    if gate.passed:
        return f"{gate.name} {value} keeps the limit of {limit}"
    return f"{gate.name} {value} is {'above' if row.at_most else 'below'} the limit of {limit}"


def _result(name: str, limit: float, gates: Gates, model: ModelReport, comparison: Comparison) -> GateResult:
    gate: Gate = GATES[name]
    value, end = gate.figure(model, comparison), None
    if value is not None and gate.bound is not None and gate.is_cautious(gates):
        value, end = gate.bound(comparison), "upper" if gate.at_most else "lower"
    unit = gate.unit_of(comparison) if gate.unit_of is not None else None
    if value is None or math.isnan(value):
        return GateResult(name, limit, None, False, comparison.model, unit=unit)
    excess = value - limit if gate.at_most else limit - value
    return GateResult(name, limit, value, excess <= _TOLERANCE, comparison.model, end, unit)
