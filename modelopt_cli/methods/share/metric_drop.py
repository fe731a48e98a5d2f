"""Loss in a task's main metric by ``share``, measured on samples that no choice was made by."""

import math
from dataclasses import dataclass

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.measure.differences import difference
from modelopt_cli.measure.metrics import Metric, metrics_of
from modelopt_cli.measure.statistics import Z_95, proportion_interval
from modelopt_cli.measure.tally import Predictions, predict
from modelopt_cli.methods.context import Context
from modelopt_cli.program import Program
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.settings import option
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.training.split import hold_out

HELD_OUT = 0.5
"""Fraction of the calibration samples on which the network chosen by the others is verified."""


@dataclass(frozen=True)
class MetricDrop:
    """Loss of networks on some samples: of the main metric or, where classes have no labels, of agreement.

    Attributes:
        data: the samples.
        context: device, batch size, workers, task.
        original: scores of the original network.
    """

    data: Data
    context: Context
    original: Predictions

    @classmethod
    def of(cls, program: Program, data: Data, context: Context) -> "MetricDrop":
        """The measure of what is lost against ``program``.

        Raises:
            DataError: the targets cannot be used, do not go with the network, or have no metric.
            UsageError: there are no labels, and the outputs are no classes that could agree.
        """
        data = context.task.read_targets(data, program.labels)
        original = _predictions(program, data, context)
        metric = main_metric(context.task)
        if not data.labelled and original.predicted is None:
            raise UsageError(
                f"{option('max_drop')} of {metric.title} needs labels",
                where=data.name,
                hint=f"give {option('calibration')} with labels, or another budget",
            )
        if data.labelled and next(iter(original.metrics().values())) is None:
            raise DataError(f"{metric.title} has no value: {metric.undefined}", where=data.name)
        return cls(data, context, original)

    def upper(self, program: Program) -> float:
        """The upper end of the 95 % interval of what is lost, in the metric's unit.

        Of agreement, where there are no labels, it is Wilson's.
        """
        predictions = _predictions(program, self.data, self.context)
        if not self.data.labelled:
            assert self.original.predicted is not None
            assert predictions.predicted is not None
            changed = int((self.original.predicted != predictions.predicted).sum())
            return 100 * proportion_interval(changed, predictions.samples)[1]
        name, metric = next(iter(self.original.rows.items()))
        drop = difference(metric, self.original.scores[name], predictions.scores[name]).high
        return math.inf if math.isnan(drop) else drop


def main_metric(task: TaskSpec) -> Metric:
    """The metric of a task that a largest drop is of."""
    return next(iter(metrics_of(task).values()))


def unit_of(metric: Metric) -> str:
    """Unit of a drop in words, after the number."""
    return " points" if metric.in_percent else metric.drop_unit


def split_to_verify(context: Context, most: float) -> tuple[Data, Data]:
    """Samples to choose a network by, and others to verify it on.

    Where the network is trained on the samples too, they are verified on those that training does not see.

    Args:
        context: its data and what it trains with.
        most: that may be lost, in the unit of the task's main metric.

    Raises:
        UsageError: there are none, they have no length, or are too few to tell such a drop.
    """
    data, training = context.data, context.training
    if data is None:
        raise UsageError(
            f"{option('max_drop')} is measured on data",
            hint=f"give {option('calibration')} or {option('data')}",
        )
    if data.size is None:
        raise UsageError(f"{option('max_drop')} holds samples out, and these have no length", where=data.name)
    if training is not None and training.val is not None:
        choosing, held = data, training.val
    else:
        unseen = training is not None and data is training.train and training.config.val_fraction
        choosing, held = hold_out(data, unseen) if unseen else data.split(round(HELD_OUT * data.size))
    for part in (choosing, held):
        if part.size is not None:
            require_enough(part.size, most, data.name, main_metric(context.task))
    return choosing, held


def require_enough(samples: int, most: float, where: str, metric: Metric) -> None:
    """Refuse samples on which even a network that differs on none could have lost more than is allowed.

    Raises:
        UsageError: says how many there must be.
    """
    # The interval of networks that differ on none of n samples ends at z^2 / (n + z^2) of the metric's range.
    square, largest = Z_95 * Z_95, metric.largest
    if largest is None or largest * square / (samples + square) <= most:
        return
    if most <= 0:
        raise UsageError(
            "no number of samples shows that nothing is lost", where=option("max_drop"), hint="allow more"
        )
    needed = math.ceil(square * (largest / most - 1))
    raise UsageError(
        f"{samples:,} samples cannot tell a {metric.change} of {most:g}{unit_of(metric)}: it takes "
        f"{needed:,} to choose by, and as many to verify on",
        where=where,
        hint=f"give more with {option('calibration')}, or allow more",
    )


def _predictions(program: Program, data: Data, context: Context) -> Predictions:
    network = program.to(context.device)
    try:
        with evaluation_mode(network):
            return predict(
                network,
                data,
                context.batch_size,
                task=context.task,
                workers=context.workers,
                device=context.device,
            )
    finally:
        program.to("cpu")
