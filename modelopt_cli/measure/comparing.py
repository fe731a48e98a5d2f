"""Comparison of the measurements of two models."""

from collections.abc import Sequence

from modelopt_cli.measure import accuracy
from modelopt_cli.measure.evaluation import Accuracy, Comparison, ModelReport
from modelopt_cli.measure.size import times_smaller
from modelopt_cli.measure.speedup import paired_speedup
from modelopt_cli.measure.statistics import paired_difference


def summarise(answers: accuracy.Predictions | None) -> Accuracy | None:
    """Accuracy of one model, or None where it was not measured."""
    if answers is None:
        return None
    return Accuracy(answers.samples, answers.top1_percent, answers.top5_percent, answers.classes)


def compare_all(
    models: Sequence[ModelReport], answers: dict[int, accuracy.Predictions], baseline: int
) -> tuple[Comparison, ...]:
    """Every other model against the baseline, in order."""
    return tuple(
        _compare(models, answers, baseline, model) for model in range(len(models)) if model != baseline
    )


def _compare(
    models: Sequence[ModelReport], answers: dict[int, accuracy.Predictions], baseline: int, model: int
) -> Comparison:
    base, other = models[baseline], models[model]
    first, second = answers.get(baseline), answers.get(model)
    difference = agreement = speedup = None
    if first is not None and second is not None:
        agreement = accuracy.agreement(first, second)
        if first.top1 is not None and second.top1 is not None:
            difference = paired_difference(first.top1, second.top1)
    if base.latency and other.latency:
        speedup = paired_speedup(base.latency.times, other.latency.times)
    return Comparison(model, difference, agreement, times_smaller(other.size, base.size), speedup)
