"""Top-1 and top-5 accuracy, streamed: memory does not grow with the images, only with the verdicts.

Rank of a label: how many classes have a larger logit, plus those with an equal logit and a lower index.
So a tie goes to the lowest index, whatever the kernel or the device, and top-k means rank below k.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.errors import DataError, EnvironmentFailure, InputError, ModeloptError
from modelopt_cli.measure.statistics import BoolArray
from modelopt_cli.measure.subject import LabelledBatches

Progress = Callable[[int, int | None], None]
TOP = 5


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one model answered, sample by sample, in the data's order.

    Attributes:
        predicted: ``(N,)`` int64, the class with the largest logit.
        top1: ``(N,)`` bool, whether that is the label; None if the data has no labels.
        top5: ``(N,)`` bool, whether the label is among the five largest; None if it has no labels or
            the model has fewer than five classes.
        classes: number of logits.
    """

    predicted: np.ndarray[tuple[int], np.dtype[np.int64]]
    top1: BoolArray | None
    top5: BoolArray | None
    classes: int

    @property
    def samples(self) -> int:
        """How many samples were answered."""
        return int(self.predicted.size)

    @property
    def top1_percent(self) -> float | None:
        """Top-1 accuracy in percent."""
        return _percent(self.top1)

    @property
    def top5_percent(self) -> float | None:
        """Top-5 accuracy in percent."""
        return _percent(self.top5)


class Tally:
    """Collects the verdicts on one model, batch by batch.

    Args:
        where: the model's file, for messages.
        labelled: whether there are labels.
        name: what to call a sample in an error, by its place in the data.
    """

    def __init__(
        self, where: str, *, labelled: bool = True, name: Callable[[int], str] | None = None
    ) -> None:
        self._where = where
        self._name = name
        self._labelled = labelled
        self._classes: int | None = None
        self._predicted: list[Tensor] = []
        self._ranks: list[Tensor] = []

    def add(self, logits: object, labels: Tensor) -> None:
        """Judge one batch.

        Args:
            logits: what the model returned, to be ``(N, classes)``.
            labels: ``(N,)`` integers.

        Raises:
            InputError: the output has another form, or holds a NaN.
            DataError: a label is not one of the model's classes.
        """
        scores = self._checked(logits, len(labels))
        self._predicted.append(_lowest_of_largest(scores))
        if self._labelled:
            check_labels(labels, scores.shape[1], self._where, self._name, sum(map(len, self._ranks)))
            self._ranks.append(_rank(scores, labels.to(scores.device)).cpu())

    def result(self) -> Predictions:
        """Everything seen so far.

        Raises:
            DataError: nothing was.
        """
        if not self._predicted or self._classes is None:
            raise DataError("there is not one sample to evaluate on", where=self._where)
        predicted = torch.cat(self._predicted).numpy()
        if not self._labelled:
            return Predictions(predicted, None, None, self._classes)
        ranks = torch.cat(self._ranks).numpy()
        return Predictions(predicted, ranks < 1, ranks < TOP if self._classes >= TOP else None, self._classes)

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
        scores = logits.detach().float()
        if torch.isnan(scores).any():
            raise InputError(
                "the network's output is not a number (NaN)", where=self._where, hint="check its weights"
            )
        return scores


def check_labels(
    labels: Tensor,
    classes: int,
    where: str,
    name: Callable[[int], str] | None = None,
    first: int = 0,
) -> None:
    """Make sure that labels are ``(N,)`` whole numbers below ``classes``.

    Args:
        labels: of a batch.
        classes: of the network.
        where: what to name in the error.
        name: what to name instead, by the sample's place in the data.
        first: place of the batch's first sample.

    Raises:
        DataError: they are not.
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
    """Answers of one model on the whole of ``data``.

    The model's own device and mode are used; put it into ``eval()`` first.

    Raises:
        DataError: no samples, wrong labels, or samples the model cannot take.
        InputError: the model is no classifier or answers NaN.
        EnvironmentFailure: the memory does not suffice.
    """
    tally = Tally(where, labelled=data.labelled)
    done = 0
    for images, labels in data.batches(batch_size, limit=limit, workers=workers):
        tally.add(run(model, images, where), labels)
        done += len(labels)
        if progress:
            progress(done, limit)
    return tally.result()


def run(model: nn.Module, images: Tensor, where: str) -> object:
    """One forward pass without gradients, whose failures become one line.

    Raises:
        DataError: the model does not take such samples.
        EnvironmentFailure: the memory does not suffice.
    """
    with torch.inference_mode(), failing_in_one_line(images, where):
        return model(images)


SMALLER_BATCHES = "use smaller batches, with --batch-size or --data-batch-size"


@contextlib.contextmanager
def failing_in_one_line(images: Tensor, where: str) -> Iterator[None]:
    """Around a model's forward pass: what it raises becomes the errors that :func:`run` lists."""
    try:
        yield
    except ModeloptError:
        raise
    except Exception as error:  # whatever a layer makes of what it is given
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if is_out_of_memory(error):
            hint = SMALLER_BATCHES if len(images) > 1 else None
            what = f"not enough memory for a batch of {len(images)}"
            raise EnvironmentFailure(what, where=where, hint=hint) from error
        # Batch norm says so in training.
        hint = "raise --batch-size" if "more than 1 value per channel" in first else None
        raise DataError(
            f"cannot run on samples of shape {tuple(images.shape[1:])}: {first}", where=where, hint=hint
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch's CPU allocator only says so in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def agreement(first: Predictions, second: Predictions) -> float:
    """Share of the samples on which two models predict the same class, 0 to 1."""
    return float(np.mean(first.predicted == second.predicted))


def _lowest_of_largest(scores: Tensor) -> Tensor:
    classes = scores.shape[1]
    index = torch.arange(classes, device=scores.device)
    largest = scores == scores.amax(1, keepdim=True)
    return torch.where(largest, index, classes).amin(1).cpu()


def _rank(scores: Tensor, labels: Tensor) -> Tensor:
    own = scores.gather(1, labels.long().unsqueeze(1))
    before = torch.arange(scores.shape[1], device=scores.device) < labels.unsqueeze(1)
    return ((scores > own) | ((scores == own) & before)).sum(1)


def _percent(correct: BoolArray | None) -> float | None:
    return None if correct is None else 100.0 * int(np.count_nonzero(correct)) / correct.size
