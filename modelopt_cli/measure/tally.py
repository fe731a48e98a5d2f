"""Collecting of scores for a task's metrics, batch by batch: memory grows with the scores alone."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.data.targets import Targets, target_count, targets_to
from modelopt_cli.errors import DataError, InputError
from modelopt_cli.measure.accuracy import Progress, naming_samples, run
from modelopt_cli.measure.bootstrap import once
from modelopt_cli.measure.evaluated_model import LabelledBatches
from modelopt_cli.measure.metrics import Metric, metrics_of
from modelopt_cli.measure.statistics import BoolArray
from modelopt_cli.program.input_batch import to
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.tasks import CLASSIFY, TaskSpec


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of one model's outputs, in the data's order.

    Attributes:
        samples: number of samples.
        rows: the task's metrics by name, the main one first.
        scores: what each of them takes. Without labels there are none, and a metric that needs more classes
            or other targets is left out.
        predicted: ``(N,)`` int64, the class of each sample; None where the task has no such class.
        classes: number of logits; None where there are none.
    """

    samples: int
    rows: Mapping[str, Metric]
    scores: Mapping[str, Any] = field(default_factory=dict)
    predicted: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None
    classes: int | None = None

    @property
    def correct(self) -> BoolArray | None:
        """``(N,)`` bool, True where the main metric counts a sample as right; None where it does not so."""
        scores = self.scores.get(next(iter(self.rows)))
        return scores if is_right_or_wrong(scores) else None

    @property
    def alone(self) -> tuple[int, ...]:
        """Places of the samples that a metric leaves out, since what belongs to them is not there."""
        places = (place for name, kept in self.scores.items() for place in self.rows[name].alone(kept))
        return tuple(sorted(set(places)))

    def metrics(self) -> dict[str, float | None]:
        """Each metric over all samples; None where it was not measured."""
        return {
            name: measured(metric, self.scores[name]) if name in self.scores else None
            for name, metric in self.rows.items()
        }


def measured(metric: Metric, scores: Any) -> float | None:
    """A metric of all samples; None where it is not a number."""
    if is_right_or_wrong(scores):
        return metric.scale * float(scores.sum()) / len(scores)
    value = value_of_all(metric, scores)
    return None if math.isnan(value) else metric.scale * value


def value_of_all(metric: Metric, scores: Any) -> float:
    """The metric's ``value`` of all that it counts, once each; NaN where it counts nothing."""
    units = metric.units(scores)
    return float(metric.value(scores, once(units))[0]) if units else math.nan


def is_right_or_wrong(scores: Any) -> bool:
    """True if what a metric keeps says which samples are right."""
    return isinstance(scores, np.ndarray) and scores.dtype == np.bool_ and scores.ndim == 1


class Tally:
    """Collects what the metrics keep of one model's outputs.

    Args:
        where: the model's file, for messages.
        task: what the model is for.
        labelled: False if the targets mean nothing.
        name: gives a sample's name for an error from its place in the data.
    """

    def __init__(
        self,
        where: str,
        task: TaskSpec = CLASSIFY,
        *,
        labelled: bool = True,
        name: Callable[[int], str] | None = None,
    ) -> None:
        self._where, self._task, self._name = where, task, name
        self._labelled = labelled
        self._metrics = metrics_of(task)
        self._classes: int | None = None
        self._structure: tuple[str, ...] | None = None
        self._samples = 0
        self._predicted: list[Tensor] | None = []
        self._kept: dict[str, list[Any]] = {}

    def add(self, outputs: Any, targets: Targets, inputs: Any = None) -> None:
        """Score one batch.

        Args:
            outputs: all that the model returns.
            targets: of the batch, as the task's format collates them.
            inputs: that the outputs were computed from, where the task looks at them.

        Raises:
            InputError: the outputs have another form, or hold a NaN.
            DataError: a target does not go with the model.
        """
        with naming_samples(self._where, self._samples, self._name):
            self._count_classes(outputs)
            if self._labelled:
                self._score(outputs, targets, inputs)
            self._predict(outputs)
        self._samples += target_count(targets)

    def result(self) -> Predictions:
        """Join the batches.

        Raises:
            DataError: there was none, or targets do not go together.
        """
        if not self._samples:
            raise DataError("there is not one sample to evaluate on", where=self._where)
        joined: dict[int, Any] = {}
        scores = {}
        for name, metric in self._metrics.items():
            if name in self._kept:
                key = id(self._kept[name])
                if key not in joined:
                    with naming_samples(self._where, name=self._name):
                        joined[key] = metric.gathered(_joined(self._kept[name]))
                scores[name] = joined[key]
        predicted = torch.cat(self._predicted).numpy() if self._predicted else None
        return Predictions(self._samples, self._metrics, scores, predicted, self._classes)

    def _count_classes(self, outputs: Any) -> None:
        if not isinstance(outputs, list):  # of a detector, as many as there are samples
            names = tuple(flatten(outputs))
            if self._samples and names != self._structure:
                hint = "have it return the same outputs for every batch"
                raise InputError(f"returned {_named(names)} after {_named(self._structure)}", hint=hint)
            self._structure = names
        classes = self._task.classes(outputs)
        if (self._samples and classes != self._classes) or classes == 0:
            raise InputError("the number of logits changes or is zero")
        self._classes = classes

    def _score(self, outputs: Any, targets: Targets, inputs: Any) -> None:
        device = next((tensor.device for tensor in flatten(outputs).values()), torch.device("cpu"))
        moved = targets_to(targets, device)
        judged = self._task.judged(outputs, moved, inputs)
        done: dict[Any, list[Any]] = {}
        for name, metric in self._metrics.items():
            few = self._classes is not None and self._classes < metric.least_classes
            if few or (metric.needs is not None and metric.needs not in targets):
                continue
            if metric.score not in done:  # metrics that keep the same share it
                done[metric.score] = self._kept.setdefault(name, [])
                done[metric.score].append(_on_cpu(metric.score(judged, moved)))
            self._kept[name] = done[metric.score]

    def _predict(self, outputs: Any) -> None:
        row = self._task.row
        predicted = row.predicted(self._task.find(outputs)) if row.predicted is not None else None
        if predicted is None:
            self._predicted = None
        elif self._predicted is not None:
            self._predicted.append(predicted)


def predict(
    model: nn.Module,
    data: LabelledBatches,
    batch_size: int = 64,
    progress: Progress | None = None,
    *,
    task: TaskSpec = CLASSIFY,
    limit: int | None = None,
    workers: int = 0,
    device: str = "cpu",
    where: str = "the network",
) -> Predictions:
    """Scores of one model on all of ``data``, for a task's metrics.

    The model is on ``device`` already, and its own mode is used; put it into ``eval()`` first.

    Raises:
        DataError: no samples, wrong targets, or samples the model cannot take.
        InputError: the model is not one for this task, or gives NaN.
        EnvironmentFailure: the memory does not suffice.
    """
    tally = Tally(where, task, labelled=data.labelled)
    done = 0
    for inputs, targets in data.batches(batch_size, limit=limit, workers=workers):
        tally.add(run(model, to(inputs, device), where), targets, inputs)
        done += target_count(targets)
        if progress:
            progress(done, limit)
    return tally.result()


def agreement(first: Predictions, second: Predictions) -> float | None:
    """Fraction of the samples for which two models predict the same class, 0 to 1; None without classes."""
    if first.predicted is None or second.predicted is None:
        return None
    return float(np.mean(first.predicted == second.predicted))


def _named(outputs: tuple[str, ...] | None) -> str:
    return " and ".join(name or "one tensor" for name in outputs or ()) or "nothing"


def _on_cpu(kept: Any) -> Any:
    if isinstance(kept, Mapping):
        return {name: _on_cpu(part) for name, part in kept.items()}
    return kept.cpu() if isinstance(kept, Tensor) else kept


def _joined(parts: list[Any]) -> Any:
    """Scores of all batches together: arrays, arrays by name, or a list."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts).numpy()
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts]) for name in first}
    return list(itertools.chain.from_iterable(parts))
