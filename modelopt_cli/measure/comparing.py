"""Comparison of the measurements of two models."""

from collections.abc import Sequence

from modelopt_cli.measure import accuracy
from modelopt_cli.measure.evaluation import Accuracy, Comparison, ModelReport
from modelopt_cli.measure.size import times_smaller
from modelopt_cli.measure.speedup import paired_speedup
from modelopt_cli.measure.statistics import paired_difference


def summarise(predictions: accuracy.Predictions | None) -> Accuracy | None:
    """Metrics of one model over all samples, or None where they were not measured."""
    if predictions is None:
        return None
    return Accuracy(predictions.samples, predictions.metrics(), predictions.classes)


def compare_all(
    models: Sequence[ModelReport], predictions: dict[int, accuracy.Predictions], baseline: int
) -> tuple[Comparison, ...]:
    """Compare every other model with the baseline, in order."""
    return tuple(
        _compare(models, predictions, baseline, model) for model in range(len(models)) if model != baseline
    )


def _compare(
    models: Sequence[ModelReport], predictions: dict[int, accuracy.Predictions], baseline: int, model: int
) -> Comparison:
    base, other = models[baseline], models[model]
    first, second = predictions.get(baseline), predictions.get(model)
    difference = agreement = speedup = None
    if first is not None and second is not None:
        agreement = accuracy.agreement(first, second)
        if first.correct is not None and second.correct is not None:
            difference = paired_difference(first.correct, second.correct)
    if base.latency and other.latency:
        speedup = paired_speedup(base.latency.times, other.latency.times)
    return Comparison(model, difference, agreement, times_smaller(other.size, base.size), speedup)
