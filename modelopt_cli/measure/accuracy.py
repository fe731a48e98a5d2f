"""Predictions of classifiers and their metrics, batch by batch: memory grows only with the scores."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.data.targets import classes_of
from modelopt_cli.errors import DataError, EnvironmentFailure, InputError, ModeloptError
from modelopt_cli.measure.evaluated_model import LabelledBatches
from modelopt_cli.measure.metrics import ACCURACY, METRICS
from modelopt_cli.measure.statistics import BoolArray
from modelopt_cli.program.inputs import Inputs, batch_size, call, sample_shapes
from modelopt_cli.settings import option

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of one model, sample by sample, in the data's order.

    Attributes:
        predicted: ``(N,)`` int64, the class with the largest logit.
        scores: of each of ``METRICS``, one number for each sample, ``(N,)``. Without labels there are none,
            and a metric that needs more classes is left out.
        classes: number of logits.
    """

    predicted: np.ndarray[tuple[int], np.dtype[np.int64]]
    scores: Mapping[str, np.ndarray[tuple[int], np.dtype[np.generic]]]
    classes: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.predicted.size)

    @property
    def correct(self) -> BoolArray | None:
        """``(N,)`` bool, True where the prediction is the label; None without labels."""
        return self.scores[ACCURACY].astype(bool) if ACCURACY in self.scores else None

    def metrics(self) -> dict[str, float | None]:
        """Each of ``METRICS`` over all samples; None where it was not measured."""
        return {
            name: metric.scale * float(self.scores[name].sum(dtype=np.float64)) / self.samples
            if name in self.scores
            else None
            for name, metric in METRICS.items()
        }


class Tally:
    """Collects the predictions of one model and their scores, batch by batch.

    Args:
        where: the model's file, for messages.
        labelled: False if the labels mean nothing.
        name: gives a sample's name for an error from its place in the data.
    """

    def __init__(
        self, where: str, *, labelled: bool = True, name: Callable[[int], str] | None = None
    ) -> None:
        self._where = where
        self._name = name
        self._labelled = labelled
        self._classes: int | None = None
        self._predicted: list[Tensor] = []
        self._scores: dict[str, list[Tensor]] = {}

    def add(self, logits: object, labels: Tensor) -> None:
        """Score one batch.

        Args:
            logits: outputs of the model, to be ``(N, C)``.
            labels: ``(N,)`` integers.

        Raises:
            InputError: the output has another form, or holds a NaN.
            DataError: a label is not one of the model's classes.
        """
        checked = self._checked(logits, len(labels))
        classes = checked.shape[1]
        if self._labelled:
            check_labels(labels, classes, self._where, self._name, sum(map(len, self._predicted)))
            moved = labels.to(checked.device)
            for name, metric in METRICS.items():
                if classes >= metric.least_classes:
                    self._scores.setdefault(name, []).append(metric.score(checked, moved).cpu())
        self._predicted.append(_lowest_of_largest(checked))

    def result(self) -> Predictions:
        """Join the batches.

        Raises:
            DataError: there was none.
        """
        if not self._predicted or self._classes is None:
            raise DataError("there is not one sample to evaluate on", where=self._where)
        scores = {name: torch.cat(parts).numpy() for name, parts in self._scores.items()}
        return Predictions(torch.cat(self._predicted).numpy(), scores, self._classes)

    def _checked(self, logits: object, samples: int) -> Tensor:
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != samples:
            form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"returned {form} for {samples} samples where a classifier returns ({samples}, classes)",
                where=self._where,
                hint="give a classification network",
            )
        if self._classes not in (None, logits.shape[1]) or logits.shape[1] == 0:
            raise InputError("the number of logits changes or is zero", where=self._where)
        self._classes = logits.shape[1]
        checked = logits.detach().float()
        if torch.isnan(checked).any():
            raise InputError(
                "the network's output is not a number (NaN)", where=self._where, hint="check its weights"
            )
        return checked


def check_labels(
    labels: Tensor,
    classes: int,
    where: str,
    name: Callable[[int], str] | None = None,
    first: int = 0,
) -> None:
    """Refuse labels that are not ``(N,)`` integers from 0, below ``classes``.

    Args:
        labels: of a batch.
        classes: number of the network's classes.
        where: place to name in the error.
        name: gives a sample's name, to be said instead, from its place in the data.
        first: place of the batch's first sample.

    Raises:
        DataError: naming the first of them.
    """
    if labels.dim() != 1 or labels.is_floating_point():
        raise DataError("labels must be one whole number for each sample", where=where)
    outside = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if outside.numel():
        at = int(outside[0])
        raise DataError(
            f"label {int(labels[at])} is not among the network's {classes} classes",
            where=where if name is None else name(first + at),
            hint="check that the data's classes are those the network was trained on",
        )


def predict(
    model: nn.Module,
    data: LabelledBatches,
    batch_size: int = 64,
    progress: Progress | None = None,
    *,
    limit: int | None = None,
    workers: int = 0,
    where: str = "the network",
) -> Predictions:
    """Predictions of one model on all of ``data``.

    The model's own device and mode are used; put it into ``eval()`` first.

    Raises:
        DataError: no samples, wrong labels, or samples the model cannot take.
        InputError: the model is no classifier, or gives NaN.
        EnvironmentFailure: the memory does not suffice.
    """
    tally = Tally(where, labelled=data.labelled)
    done = 0
    for images, labels in data.batches(batch_size, limit=limit, workers=workers):
        tally.add(run(model, images, where), classes_of(labels))
        done += len(labels)
        if progress:
            progress(done, limit)
    return tally.result()


def run(model: nn.Module, inputs: Inputs, where: str) -> object:
    """One forward pass without gradients, whose failures become one line.

    Raises:
        DataError: the model does not take such samples.
        EnvironmentFailure: the memory does not suffice.
    """
    with torch.inference_mode(), failing_in_one_line(inputs, where):
        return call(model, inputs)


def smaller_batches() -> str:
    """Next step where a batch does not fit into memory."""
    return f"use smaller batches, with {option('batch_size')} or {option('data_batch_size')}"


@contextlib.contextmanager
def failing_in_one_line(inputs: Inputs, where: str) -> Iterator[None]:
    """Turn all that a model's forward pass raises into the errors that :func:`run` lists."""
    try:
        yield
    except ModeloptError:
        raise
    except Exception as error:  # a layer may raise anything on inputs that it does not take
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if is_out_of_memory(error):
            hint = smaller_batches() if batch_size(inputs) > 1 else None
            message = f"not enough memory for a batch of {batch_size(inputs)}"
            raise EnvironmentFailure(message, where=where, hint=hint) from error
        # Batch norm says so in training.
        hint = f"raise {option('batch_size')}" if "more than 1 value per channel" in first else None
        raise DataError(
            f"cannot run on samples of {sample_shapes(inputs)}: {first}", where=where, hint=hint
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch or Python ran out of memory; torch's CPU allocator only says so in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def agreement(first: Predictions, second: Predictions) -> float:
    """Fraction of the samples for which two models predict the same class, 0 to 1."""
    return float(np.mean(first.predicted == second.predicted))


def _lowest_of_largest(logits: Tensor) -> Tensor:
    classes = logits.shape[1]
    index = torch.arange(classes, device=logits.device)
    largest = logits == logits.amax(1, keepdim=True)
    return torch.where(largest, index, classes).amin(1).cpu()
