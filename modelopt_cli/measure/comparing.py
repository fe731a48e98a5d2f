"""Comparison of the measurements of two models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from modelopt_cli.measure.differences import differences
from modelopt_cli.measure.evaluation import Accuracy, Comparison, ModelReport
from modelopt_cli.measure.fidelity import Fidelity
from modelopt_cli.measure.size import times_smaller
from modelopt_cli.measure.speedup import paired_speedup
from modelopt_cli.measure.tally import Predictions, agreement


def summarise(predictions: Predictions | None) -> Accuracy | None:
    """Metrics of one model over all samples, or None where they were not measured."""
    if predictions is None:
        return None
    return Accuracy(predictions.samples, predictions.metrics(), predictions.classes)


def undefined_notes(models: Sequence[ModelReport], predictions: Mapping[int, Predictions]) -> list[str]:
    """A line for each metric that was to be measured and is not a number, and for which models."""
    lines = []
    for name, metric in next(iter(predictions.values())).rows.items() if predictions else ():
        missing = [models[i].path for i, each in predictions.items() if is_undefined(models[i], each, name)]
        if missing:
            of = "" if len(missing) == len(predictions) else f"{', '.join(missing)}: "
            lines.append(f"{of}{metric.title} not measured: {metric.undefined}")
    return lines


def is_undefined(model: ModelReport, predictions: Predictions, name: str) -> bool:
    """True if a metric was to be measured of a model, and is not a number."""
    return name in predictions.scores and model.accuracy is not None and model.accuracy.metrics[name] is None


def compare_all(
    models: Sequence[ModelReport],
    predictions: Mapping[int, Predictions],
    fidelities: Mapping[int, Fidelity],
    baseline: int,
    incomparable: Mapping[int, str],
) -> tuple[Comparison, ...]:
    """Compare every other model with the baseline, in order."""
    return tuple(
        replace(
            _compare(models, predictions, fidelities.get(model), baseline, model),
            incomparable=incomparable.get(model),
        )
        for model in range(len(models))
        if model != baseline
    )


def _compare(
    models: Sequence[ModelReport],
    predictions: Mapping[int, Predictions],
    fidelity: Fidelity | None,
    baseline: int,
    model: int,
) -> Comparison:
    base, other = models[baseline], models[model]
    speedup = None
    if base.latency and other.latency:
        speedup = paired_speedup(base.latency.times, other.latency.times)
    smaller = times_smaller(other.size, base.size)
    if baseline not in predictions or model not in predictions:
        return Comparison(model, None, None, smaller, speedup, fidelity=fidelity)
    first, second = predictions[baseline], predictions[model]
    drops = differences(first, second)
    main, metric = next(iter(first.rows.items()))
    return Comparison(
        model,
        drops.get(main),
        agreement(first, second),
        smaller,
        speedup,
        metric=metric,
        differences=drops,
        fidelity=fidelity,
        nothing_to_lose=base.accuracy is not None and metric.has_nothing_to_lose(base.accuracy.metrics[main]),
    )
