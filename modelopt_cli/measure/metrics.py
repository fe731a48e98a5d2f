"""Metrics of classifiers: each is one row, from which evaluations, tables, exports and docs take it.

The rank of a label is the number of classes with a larger logit, plus those with an equal logit and a lower
index. A tie goes to the lowest index, then, whatever the kernel or the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """The mean over all samples of a number that logits and a label give.

    Attributes:
        help: one line for the documentation.
        title: of its row in the table.
        score: the number of each sample, ``(N,)``, bool or float, from logits ``(N, C)``, float32, and labels
            ``(N,)``, int64, on the same device.
        scale: factor of the mean; 100 for a percentage.
        unit: after the number in the table.
        digits: after the decimal point in the table.
        least_classes: with fewer classes it says nothing, and is not measured.
        column: place among the columns of CSV files; those without one come last.
    """

    help: str
    title: str
    score: "Callable[[Tensor, Tensor], Tensor]"
    scale: float = 1.0
    unit: str = ""
    digits: int = 4
    least_classes: int = 1
    column: int | None = None


def ranks(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Rank of each label among the classes, from 0, see the module's docstring.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``, int64.

    Returns:
        ``(N,)``, int64.
    """
    import torch

    own = logits.gather(1, labels.long().unsqueeze(1))
    before = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    return ((logits > own) | ((logits == own) & before)).sum(1)


def is_among_largest(logits: "Tensor", labels: "Tensor", count: int) -> "Tensor":
    """True for each sample whose label is among the ``count`` classes with the largest logits, ``(N,)``."""
    return ranks(logits, labels) < count


ACCURACY = "top1"
"""The metric of which models are compared sample by sample; each of its scores is True or False."""

METRICS: dict[str, Metric] = {
    "top1": Metric(
        "samples whose label has the largest logit, in percent",
        "top-1",
        partial(is_among_largest, count=1),
        scale=100,
        unit=" %",
        digits=2,
        column=7,
    ),
    "top5": Metric(
        "samples whose label has one of the five largest logits, in percent; of five classes or more",
        "top-5",
        partial(is_among_largest, count=5),
        scale=100,
        unit=" %",
        digits=2,
        least_classes=5,
        column=8,
    ),
}
