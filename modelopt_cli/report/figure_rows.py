"""Figures of an evaluation: each is one row, from which the table, JSON, Markdown, CSV and docs take it."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter

from modelopt_cli.measure import Comparison, Evaluation
from modelopt_cli.measure.metrics import METRICS, Metric
from modelopt_cli.report.figure import (
    Figure,
    factor,
    megabytes,
    millions,
    milliseconds,
    p_value,
    seconds,
    speedup,
    speedup_interval,
)


def metric_figure(name: str, metric: Metric) -> Figure:
    """The figure of a metric."""
    classifies = metric.column is not None  # those that were there before other tasks have their own places
    return Figure(
        metric.help,
        metric.title,
        lambda model: model.accuracy and model.accuracy.metrics.get(name),
        metric.text,
        path=() if classifies else ("metrics", name),
        optional=not classifies,
        column=metric.column,
    )


def _least(values: Mapping[str, float], of: Callable[[Iterable[str]], str], digits: int, unit: str) -> str:
    """The figure of the output that is furthest from the baseline's, which is named if there are several."""
    name = of(values)
    text = f"{values[name]:.{digits}f}{unit}"
    return text if len(values) == 1 else f"{text} ({name})"


def _of_fidelity(comparison: Comparison, name: str) -> Mapping[str, float] | None:
    if comparison.fidelity is None:
        return None
    by_output: Mapping[str, float] = getattr(comparison.fidelity, name)
    return by_output or None


def _least_figure(
    name: str, help_: str, title: str, digits: int, unit: str = "", *, least: bool = True
) -> Figure:
    """A figure of how near outputs are: of the output that is furthest."""
    furthest = min if least else max
    return Figure(
        help_,
        title,
        lambda comparison: _of_fidelity(comparison, name),
        lambda values: _least(values, partial(furthest, key=values.__getitem__), digits, unit),
        lambda values: furthest(values.values()),
        compares=True,
    )


def _end(help_: str, interval: str, end: str, column: int) -> Figure:
    """The end of an interval that a comparison has, which is only exported."""
    return Figure(help_, "", attrgetter(interval), number=attrgetter(end), compares=True, column=column)


FIGURES: dict[str, Figure] = {
    "file_bytes": Figure(
        "bytes on disk; of a folder or an index, of the files that the weights are read from",
        "file size",
        lambda model: model.size.file_bytes,
        megabytes,
        column=0,
    ),
    "tensor_bytes": Figure(
        "bytes of the network's tensors in the file, without an optimizer's state or a header",
        "tensors in it",
        lambda model: model.size.tensor_bytes,
        megabytes,
        column=1,
    ),
    "ratio": Figure(
        "ratio of the baseline's size to the model's, of the files or their tensors, whichever is less",
        "vs baseline",
        lambda comparison: comparison.ratio,
        lambda ratio: factor(ratio, "smaller", "larger"),
        compares=True,
        column=17,
    ),
    "parameters": Figure(
        "weights, biases, embeddings, scales and shifts of norms",
        "parameters",
        lambda model: model.size.parameters,
        millions,
        column=2,
    ),
    "nonzero": Figure(
        "parameters that are not zero", "non-zero", lambda model: model.size.nonzero, millions, column=3
    ),
    "bits_per_weight": Figure(
        "bits that the file spends on tensors, for each parameter",
        "bits per weight",
        lambda model: model.size.bits_per_weight,
        lambda bits: f"{bits:.2f}",
        column=5,
    ),
    "coverage": Figure(
        "share of the layers with weights that any method has compressed, also an earlier one",
        "layers compressed",
        lambda model: model.coverage,
        lambda share: f"{100 * share:.0f} %",
        column=11,
    ),
    "weight_coverage": Figure(
        "share of the weights' bytes that those layers held before anything was compressed",
        "weights compressed",
        lambda model: model.weight_coverage,
        lambda share: f"{100 * share:.1f} %",
        column=12,
    ),
    "macs": Figure(
        "multiply-accumulates of convolutions, linear layers and matrix products, for one sample",
        "MACs",
        lambda model: model.macs and model.macs.total,
        millions,
        column=4,
    ),
    "flops": Figure(
        "twice the MACs", "FLOPs", lambda model: model.macs and model.macs.flops, millions, number=None
    ),
    "samples": Figure(
        "samples of `--data` that were evaluated, the same for all models",
        "",
        lambda model: model.accuracy and model.accuracy.samples,
        column=6,
    ),
    **{name: metric_figure(name, metric) for name, metric in METRICS.items()},
    "drop": Figure(
        "loss of the task's main metric: of the baseline minus of the model; of an error, "
        "where the row says rise, the other way round",
        "{metric} {change}",
        lambda comparison: comparison.difference and comparison,
        lambda comparison: comparison.metric.drop_text(comparison.difference.drop),
        None,
        compares=True,
    ),
    "interval": Figure(
        "95 % interval of the drop: Tango's where samples are right or wrong, else bootstrapped",
        "95 % interval",
        lambda comparison: comparison.difference and comparison,
        lambda comparison: comparison.metric.interval_text(
            comparison.difference.low, comparison.difference.high
        ),
        None,
        compares=True,
    ),
    "drop_pp": Figure(
        "the drop, where the metric is in percent, in percentage points",
        "",
        lambda comparison: comparison.difference if comparison.metric.in_percent else None,
        number=lambda difference: difference.drop,
        compares=True,
        column=14,
    ),
    "low": _end("lower end of the drop's interval", "difference", "low", 15),
    "high": _end("upper end of the drop's interval", "difference", "high", 16),
    "p_value": Figure(
        "probability of predictions that differ so much if both models are equally good",
        "p (McNemar)",
        lambda comparison: comparison.difference and comparison.difference.p_value,
        p_value,
        None,
        compares=True,
    ),
    "agreement": Figure(
        "samples for which both models predict the same class",
        "same prediction",
        lambda comparison: comparison.agreement,
        lambda share: f"{100 * share:.2f} %",
        compares=True,
        column=21,
    ),
    "snr_db": _least_figure(
        "snr_db",
        "signal-to-noise ratio of the outputs against the baseline's, of the output that has the least",
        "signal to noise",
        1,
        " dB",
    ),
    "cosine": _least_figure(
        "cosine",
        "mean cosine of a sample's output with the baseline's, the least of all outputs",
        "cosine",
        5,
    ),
    "kl": _least_figure(
        "kl",
        "KL divergence of the probabilities from the baseline's, in nats, where outputs are logits",
        "KL divergence",
        5,
        least=False,
    ),
    "latency_median_ms": Figure(
        "milliseconds of one pass of `--latency-batch-size` samples, the median of `--latency-runs` rounds",
        "latency, median",
        lambda model: model.latency and model.latency.median,
        milliseconds,
        path=("latency_ms", "median"),
        column=9,
    ),
    "latency_iqr_ms": Figure(
        "third quartile of the latency minus the first",
        "latency, IQR",
        lambda model: model.latency and model.latency.iqr,
        milliseconds,
        path=("latency_ms", "iqr"),
        column=10,
    ),
    "speedup": Figure(
        "median ratio of the baseline's latency to the model's in the same round",
        "vs baseline",
        lambda comparison: comparison.speedup,
        speedup,
        lambda speedup: speedup.ratio,
        compares=True,
        column=18,
    ),
    "speedup_interval": Figure(
        "95 % interval of the speedup",
        "speedup, 95 % interval",
        lambda comparison: comparison.speedup,
        speedup_interval,
        None,
        compares=True,
    ),
    "speedup_low": _end("lower end of the speedup's interval", "speedup", "low", 19),
    "speedup_high": _end("upper end of the speedup's interval", "speedup", "high", 20),
    "timed_as": Figure(
        "the fastest float32 variant that torch has for the model here, or the network as it was loaded",
        "timed as",
        lambda model: model.latency and model.latency.variant,
        number=None,
    ),
    "throughput": Figure(
        "samples per second at the median latency",
        "throughput",
        lambda model: model.latency and model.latency.throughput,
        lambda rate: f"{rate:.1f} /s",
        None,
    ),
    "load_s": Figure(
        "seconds from a path to a network that is ready to run, see below",
        "time to load",
        lambda model: model.load_s,
        seconds,
        column=13,
    ),
    "peak_bytes": Figure(
        "memory of loading the file and running one batch, without what torch itself needs",
        "peak memory",
        lambda model: model.peak_bytes,
        megabytes,
        None,
    ),
}


def figures_of(evaluation: Evaluation) -> dict[str, Figure]:
    """All figures, with those of a metric that the user has brought along."""
    own = {name: metric_figure(name, row) for name, row in evaluation.rows.items() if name not in METRICS}
    rows, place = list(FIGURES.items()), list(FIGURES).index("drop")
    return dict([*rows[:place], *own.items(), *rows[place:]])


def exported(figures: Mapping[str, Figure] = FIGURES) -> list[tuple[str, Figure]]:
    """The figures that JSON and CSV hold, by name, in the order of CSV's columns."""
    rows = [(name, figure) for name, figure in figures.items() if figure.number is not None]
    return sorted(rows, key=lambda row: math.inf if row[1].column is None else row[1].column)
