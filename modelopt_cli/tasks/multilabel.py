"""Any number of classes for each sample, each there or not by itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets
from modelopt_cli.errors import DataError
from modelopt_cli.tasks.draws import Counts, Values, in_rows, nan_mean, sums
from modelopt_cli.tasks.task import Misfit
from modelopt_cli.tasks.task_output import finite, require


class MultilabelTargets(TargetFormat):
    """One number for each class, 1 where it is there and 0 where it is not, float32 ``(N, C)``."""

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Tensor:
        """The row of one sample; see :class:`TargetFormat`."""
        if not isinstance(raw, Tensor) or raw.dim() != 1:
            raise DataError("target is not one 0 or 1 for each class")
        if classes is not None and len(raw) != classes:
            raise DataError(f"target has {len(raw)} classes, the network {classes}")
        row = raw.float()
        if not bool(((row == 0) | (row == 1)).all()):
            odd = row[(row != 0) & (row != 1)][0].item()
            raise DataError(f"target holds {odd:g} where only 0 and 1 may be")
        return row

    def collate(self, targets: Sequence[Tensor]) -> Tensor:
        """Rows ``(N, C)``."""
        if len({len(target) for target in targets}) > 1:
            raise DataError("targets have different numbers of classes")
        return torch.stack(list(targets))


def targets(names: tuple[str, ...] | None = None) -> MultilabelTargets:
    """The format of the targets."""
    return MultilabelTargets()


def judged(logits: Any, rows: Targets, inputs: Any) -> Tensor:
    """Logits ``(N, C)``, float32: above 0 where a class is more likely there than not.

    Raises:
        InputError: the network returns another form, or NaN.
        Misfit: targets are of another number of classes.
    """
    fits = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(rows)
    require(fits, logits, len(rows), "a network for several labels", "classes", "give one")
    if not isinstance(rows, Tensor) or rows.shape != logits.shape:
        classes = rows.shape[1] if isinstance(rows, Tensor) and rows.dim() == 2 else "other"
        raise Misfit(0, f"target has {classes} classes, the network {logits.shape[1]}")
    return finite(logits)


def ranking(logits: Tensor, rows: Tensor) -> Tensor:
    """Logits and targets of each sample, ``(N, 2, C)``, float32, for mean average precision."""
    return torch.stack([logits.float(), rows.float()], 1)


def mean_average_precision(kept: NDArray[np.float32], counts: Counts) -> Values:
    """The mean over the classes of the average precision of their samples' ranking, 0 to 1.

    Average precision is the sum of the precisions at each logit, weighted by the recall that is gained there,
    as in scikit-learn's ``average_precision_score``: equal logits count together. Classes without a positive
    are left out.

    Args:
        kept: what ``ranking`` returns, ``(N, 2, C)``.
        counts: of each sample in each draw, ``(draws, N)``.
    """
    classes = range(kept.shape[2])
    return in_rows(
        counts,
        kept.shape[0],
        lambda some: nan_mean([average_precision(kept[:, 0, c], kept[:, 1, c], some) for c in classes]),
    )


def average_precision(scores: NDArray[Any], positive: NDArray[Any], counts: Counts) -> Values:
    """Average precision of each draw; NaN where it has no positive."""
    order = np.argsort(-scores, kind="stable")
    picked, right = counts[:, order], positive[order].astype(bool)
    # The last of each run of equal scores, where all of them have been counted.
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    seen = picked.cumsum(1)[:, ends]
    hits = (picked * right).cumsum(1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(seen > 0, hits / seen, 0.0)
        return (gained * precision).sum(1) / hits[:, -1]  # type: ignore[no-any-return]


def hits(logits: Tensor, rows: Tensor) -> Tensor:
    """True positives, predicted and actual ones of each sample and class, ``(N, 3, C)``."""
    predicted, actual = logits > 0, rows > 0
    return torch.stack([predicted & actual, predicted, actual], 1).float()


def macro_f1(kept: NDArray[np.float32], counts: Counts) -> Values:
    """The mean over the classes of ``2 TP / (predicted + actual)``, 0 to 1.

    Classes that are neither there nor predicted are left out.
    """
    right, predicted, actual = sums(kept, counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = 2 * right / (predicted + actual)
    return nan_mean(list(each.T))
