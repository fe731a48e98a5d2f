"""Results of an evaluation, as plain frozen values: the one source of the table and of every export."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelopt_cli.measure.environment import Environment
from modelopt_cli.measure.fidelity import Fidelity
from modelopt_cli.measure.flops import Macs
from modelopt_cli.measure.latency import Latency
from modelopt_cli.measure.metrics import ACCURACY, METRICS, Metric, metrics_of
from modelopt_cli.measure.size import Size
from modelopt_cli.measure.speedup import Speedup
from modelopt_cli.measure.statistics import Interval
from modelopt_cli.tasks import CLASSIFY


@dataclass(frozen=True)
class Accuracy:
    """Metrics of one model on the data.

    Attributes:
        samples: number of samples.
        metrics: those of the task by name, the main one first; None without labels, or where one cannot be
            measured, of too few classes say.
        classes: number of its logits; None where it has none.
    """

    samples: int
    metrics: Mapping[str, float | None]
    classes: int | None = None

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy in percent; None of what is no classifier."""
        return self.metrics.get(ACCURACY)


@dataclass(frozen=True)
class ModelReport:
    """One model's own figures; None where something was not measured.

    Attributes:
        path: of its file, as the user wrote it.
        size: bytes, parameters, non-zeros, bits per weight.
        macs: multiply-accumulates for one sample.
        accuracy: metrics on the data.
        latency: of one forward pass of a batch.
        peak_bytes: memory of loading it and running one batch.
        coverage: share of the layers that are compressed, 0 to 1.
        weight_coverage: share of the weights' bytes that those layers hold, 0 to 1.
        load_s: seconds from its path to a network that is ready to run, or to all its tensors where no
            network is known; see :mod:`modelopt_cli.measure.load_time`.
    """

    path: str
    size: Size
    macs: Macs | None = None
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    peak_bytes: int | None = None
    coverage: float | None = None
    load_s: float | None = None
    weight_coverage: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One model against the baseline.

    Attributes:
        model: its index among the models.
        difference: paired difference of the task's main metric with its 95 % interval.
        agreement: share of the samples on which both predict the same class, 0 to 1.
        ratio: how many times smaller it is, see :func:`measure.size.times_smaller`.
        speedup: median ratio of the latencies of each round, with its 95 % interval; above 1 is faster.
        metric: the main metric.
        differences: the same of each metric that was measured, by name.
        fidelity: how near its outputs are to the baseline's; None where they have none in common.
        nothing_to_lose: the baseline's main metric is the worst there is.
        incomparable: why outputs were not compared, of whatever samples; None where they were.
    """

    model: int
    difference: Interval | None
    agreement: float | None
    ratio: float | None
    speedup: Speedup | None
    metric: Metric = METRICS[ACCURACY]
    differences: Mapping[str, Interval] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    nothing_to_lose: bool = False
    incomparable: str | None = None

    @property
    def visible_drop(self) -> float | None:
        """The drop of the main metric; None where it was not measured or would be 0 whatever is broken."""
        return None if self.difference is None or self.nothing_to_lose else self.difference.drop


@dataclass(frozen=True)
class GateResult:
    """One limit applied to one model.

    Attributes:
        name: of the option, without the dashes, e.g. ``max-drop``.
        limit: set by the user.
        value: figure held against the limit, in the same unit; None if it was not measured.
        passed: True if the limit is kept. A figure that was not measured fails.
        model: index of the model.
        end: ``lower`` or ``upper`` where ``value`` is that end of the 95 % interval.
        unit: of both, after the number; None for that of the gate.
    """

    name: str
    limit: float
    value: float | None
    passed: bool
    model: int
    end: str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured, in the order in which the models were given.

    Attributes:
        models: one report for each.
        baseline: index of the reference.
        comparisons: every other model against it, in order.
        environment: machine, versions, threads.
        data: name of the data, or None.
        input: shape and preprocessing of a sample and who says so, or None where that is not known.
        gates: see :mod:`modelopt_cli.measure.gates`; empty until they are applied.
        notes: one line for each thing the reader should know, such as why something is missing.
        rows: the task's metrics by name, the main one first.
        task: the task and who says so, as one line; None where it was taken by default.
    """

    models: tuple[ModelReport, ...]
    baseline: int
    comparisons: tuple[Comparison, ...]
    environment: Environment
    data: str | None = None
    input: str | None = None
    gates: tuple[GateResult, ...] = ()
    notes: tuple[str, ...] = ()
    rows: Mapping[str, Metric] = field(default_factory=lambda: metrics_of(CLASSIFY))
    task: str | None = None
