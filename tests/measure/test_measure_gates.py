"""Gates: each direction, the edge, what was not measured, and what is said."""

import dataclasses
import math

import pytest

from modelopt_cli.errors import GateNotMet, UsageError
from modelopt_cli.measure import Comparison, Evaluation, Fidelity, Gates, ModelReport, Size, Speedup
from modelopt_cli.measure.conditions import Conditions
from modelopt_cli.measure.config import GATES
from modelopt_cli.measure.environment import Environment
from modelopt_cli.measure.gates import apply, describe, require, require_conditions
from modelopt_cli.measure.metrics import METRICS
from modelopt_cli.measure.statistics import Interval, paired_difference_from_counts

SIZE = Size(100, 10, 10, 80.0)


def evaluation(*, measured: bool = True, models: int = 2) -> Evaluation:
    """Every other model loses 1 of 200, is 4 times smaller, surely 2 times faster, and 90 % compressed."""
    difference = paired_difference_from_counts(2, 1, 200) if measured else None
    return Evaluation(
        models=tuple(ModelReport(f"net{i}", SIZE, coverage=0.9 if measured else None) for i in range(models)),
        baseline=0,
        comparisons=tuple(
            Comparison(
                i,
                difference,
                None,
                4.0,
                Speedup(2.2, 2.0, 2.5, 30) if measured else None,
                fidelity=Fidelity({"a": 45.0, "b": 30.0}, {"a": 0.98, "b": 0.99}) if measured else None,
            )
            for i in range(1, models)
        ),
        environment=Environment("cpu", "2", 1, "cpu"),
    )


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        ({"max_drop": 0.5}, True),
        ({"max_drop": 0.49}, False),
        ({"max_drop": -0.1}, False),
        ({"min_ratio": 4}, True),
        ({"min_ratio": 4.01}, False),
        ({"min_speedup": 2}, True),
        ({"min_speedup": 2.1}, False),
        ({"min_coverage": 0.9}, True),
        ({"min_coverage": 0.91}, False),
        ({"min_snr": 30}, True),
        ({"min_snr": 30.1}, False),
        ({"min_cosine": 0.98}, True),
        ({"min_cosine": 0.981}, False),
    ],
    ids=str,
)
def test_limits_include_their_edge(gates: dict[str, float], passed: bool) -> None:
    found = apply(evaluation(), Gates(**gates))
    assert [gate.passed for gate in found.gates] == [passed]
    if passed:
        require(found)
    else:
        with pytest.raises(GateNotMet, match="net1"):
            require(found)


@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_kept_at_its_figure_and_missed_beyond_it(name: str) -> None:
    gate, found = GATES[name], evaluation()
    judge = gate.bound if gate.is_cautious(Gates()) else None
    figure = (
        gate.figure(found.models[1], found.comparisons[0]) if judge is None else judge(found.comparisons[0])
    )
    assert figure is not None
    beyond = figure - 0.01 if gate.at_most else figure + 0.01
    for limit, passed in ((figure, True), (beyond, False)):
        (result,) = apply(found, Gates(**{name.replace("-", "_"): limit})).gates
        assert (result.name, result.limit, result.value, result.passed) == (name, limit, figure, passed)
        assert describe(result).startswith(f"{name} {figure:.6g}{gate.unit}")
        assert ("keeps" in describe(result)) == passed


def test_every_failure_is_named_with_its_value_and_model() -> None:
    found = apply(evaluation(models=3), Gates(max_drop=0.1, min_ratio=2, min_speedup=3))
    assert [(gate.model, gate.name) for gate in found.gates] == [
        *((1, "max-drop"), (1, "min-ratio"), (1, "min-speedup")),
        *((2, "max-drop"), (2, "min-ratio"), (2, "min-speedup")),
    ]
    with pytest.raises(GateNotMet) as caught:
        require(found)
    assert str(caught.value) == (
        "net1: max-drop 0.5 pp is above the limit of 0.1 pp; net1: min-speedup 2x, the lower "
        "end of its 95 % interval, is below the limit of 3x; "
        "net2: max-drop 0.5 pp is above the limit of 0.1 pp; net2: min-speedup 2x, the lower "
        "end of its 95 % interval, is below the limit of 3x"
    )
    assert caught.value.exit_code == 1


def test_a_drop_is_held_against_its_limit_in_the_unit_of_its_metric() -> None:
    one = Comparison(1, Interval(0.5, 0.2, 0.9, 24), None, 4.0, None, metric=METRICS["psnr"])
    found = dataclasses.replace(evaluation(), comparisons=(one,))
    (result,) = apply(found, Gates(max_drop=0.4)).gates
    assert describe(result) == "max-drop 0.5 dB is above the limit of 0.4 dB"
    (result,), (note,) = (lambda judged: (judged.gates, judged.notes))(
        apply(found, Gates(max_drop=0.3, confident=True))
    )
    assert describe(result).startswith("max-drop 0.9 dB, the upper end of its 95 % interval, is above")
    # 0.4 above the drop now; within 0.3 after 24 (4 / 3)^2 samples.
    assert note.endswith(
        "limit of 0.3 dB is kept; with about 43 the interval would end 0.3 dB above the drop"
    )


def test_one_model_alone_can_be_judged() -> None:
    found = apply(evaluation(models=4), Gates(min_ratio=2, min_speedup=3, judged=2))
    assert [(gate.model, gate.name) for gate in found.gates] == [(2, "min-ratio"), (2, "min-speedup")]


@pytest.mark.parametrize(
    ("judged", "why"), [(0, "the baseline itself"), (3, "not measured"), (-1, "not meas")]
)
def test_only_a_model_that_is_compared_can_be_judged(judged: int, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        apply(evaluation(models=3), Gates(min_ratio=1, judged=judged))


@pytest.mark.parametrize("name", ["max_drop", "min_speedup", "min_coverage", "min_snr", "min_cosine"])
def test_what_was_not_measured_fails(name: str) -> None:
    found = apply(evaluation(measured=False), Gates(**{name: 0.5}))
    assert (found.gates[0].value, found.gates[0].passed) == (None, False)
    with pytest.raises(GateNotMet, match="was not measured"):
        require(found)


def test_no_gates_no_results() -> None:
    assert not Gates()
    assert apply(evaluation(), Gates()).gates == ()
    assert apply(evaluation(models=1), Gates()).gates == ()


def test_a_limit_needs_something_to_hold_it_against() -> None:
    with pytest.raises(UsageError, match="second model"):
        apply(evaluation(models=1), Gates(min_ratio=1))


@pytest.mark.parametrize(
    "gates",
    [{"max_drop": math.nan}, {"min_ratio": math.inf}, {"min_ratio": -1}, {"min_coverage": 95}],
    ids=str,
)
def test_limits_that_mean_nothing_are_refused(gates: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^m"):
        Gates(**gates)


@pytest.mark.parametrize(("limit", "passed"), [(3.2, True), (3.1, False)])
def test_confident_holds_the_upper_end_of_the_drop_against_the_limit(limit: float, passed: bool) -> None:
    high = paired_difference_from_counts(2, 1, 200).high
    assert 3.1 < high < 3.2
    assert apply(evaluation(), Gates(max_drop=limit)).gates[0].passed
    (gate,) = apply(evaluation(), Gates(max_drop=limit, confident=True)).gates
    assert (gate.value, gate.passed, gate.end) == (high, passed, "upper")


def test_a_speedup_is_judged_by_what_is_sure() -> None:
    (gate,) = apply(evaluation(), Gates(min_speedup=2.1)).gates
    assert (gate.value, gate.passed, gate.end) == (2.0, False, "lower")


def test_too_few_runs_for_an_interval_are_refused() -> None:
    require_conditions(Gates(min_speedup=1.5), Conditions(labelled=False, runs=6))
    require_conditions(Gates(max_drop=1), Conditions(labelled=True, runs=0))
    with pytest.raises(UsageError, match=r"min_speedup.*give latency_runs 6 or more"):
        require_conditions(Gates(min_speedup=1.5), Conditions(labelled=True, runs=5))


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        # z^2 (1 - L) / L for no disagreement: 3.8415 * 0.999 / 0.001
        (
            {"max_drop": 0.1},
            "20 samples cannot tell whether a limit of 0.1 pp is kept; with about "
            "3,838 the interval would end 0.1 pp above the drop",
        ),
        ({"max_drop": 17}, ""),
        ({"max_drop": 0}, ""),
        # (2.2 - 2.0) / (2.2 - 2.1) is 2, so four times the runs
        ({"min_speedup": 2.1}, "30 runs cannot tell whether it is 2.1x faster; about 120 might"),
        ({"min_speedup": 2.0}, ""),
        ({"min_speedup": 2.2}, ""),
    ],
    ids=str,
)
def test_a_limit_that_the_interval_holds_asks_for_more(gates: dict[str, float], said: str) -> None:
    measured = evaluation()
    same = dataclasses.replace(measured.comparisons[0], difference=paired_difference_from_counts(0, 0, 20))
    notes = apply(dataclasses.replace(measured, comparisons=(same,)), Gates(**gates)).notes
    assert notes == ((f"net1: {said}",) if said else ())
