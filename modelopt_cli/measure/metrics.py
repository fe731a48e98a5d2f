"""Metrics of tasks: each is one row, from which evaluations, tables, exports and docs take it.

A metric is computed in three steps. ``score`` keeps of each sample what the metric needs, batch by batch, so
that memory grows only with that. ``gathered`` brings together what was kept of all samples. ``value`` makes
the number of it, for any draw of the samples: as they are, or as ``measure.bootstrap`` draws them for the
interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from modelopt_cli.lazy_names import deferred

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt_cli.tasks import TaskSpec

_TASKS = "modelopt_cli.tasks"
_PERCENT = " %"
_mean = deferred(f"{_TASKS}.draws", "mean")
_share = deferred(f"{_TASKS}.draws", "share")
_among_largest = deferred(f"{_TASKS}.classification", "is_among_largest")


@dataclass(frozen=True)
class Metric:
    """One number that says how good a network is.

    Attributes:
        help: one line for the documentation.
        title: of its row in the table.
        tasks: keys of ``TASKS`` that it measures. The first of a task's metrics is its main one: that of
            ``--max-drop``, by which training chooses the best weights.
        score: what is kept of each sample of a batch, from what the task judges and the targets: a tensor
            ``(N, ...)``, a dictionary of them, or a list. One that is bool ``(N,)`` says which samples are
            right.
        value: ``value(kept, counts)``, the metric of each draw, ``(draws,)``; by default the mean.
        gathered: what ``value`` takes, from what was kept of all samples in NumPy arrays or a list.
        units: number of things in it that are drawn.
        alone: places of the samples that say nothing, since what belongs to them is not among the samples.
        scale: factor of the value; 100 for a percentage.
        unit: after the number in the table.
        digits: after the decimal point in the table.
        higher_is_better: False of an error.
        largest: largest difference of two values there can be, times ``scale``; None where it has no bound.
        least_classes: with fewer classes it says nothing, and is not measured.
        needs: part of the targets without which it is not measured.
        undefined: when it is not a number, as the reason why it was not measured.
        column: place among the columns of CSV files; those without one come last.
    """

    help: str
    title: str
    tasks: tuple[str, ...]
    score: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], Any] = _mean
    gathered: Callable[[Any], Any] = lambda kept: kept
    units: Callable[[Any], int] = len
    alone: Callable[[Any], Sequence[int]] = lambda gathered: ()
    scale: float = 1.0
    unit: str = ""
    digits: int = 4
    higher_is_better: bool = True
    largest: float | None = None
    least_classes: int = 1
    needs: str | None = None
    undefined: str = "it is not a number"
    column: int | None = None

    @property
    def in_percent(self) -> bool:
        """True if it is a percentage, so that a difference is in percentage points."""
        return self.unit == _PERCENT

    @property
    def drop_unit(self) -> str:
        """The unit of a difference."""
        return " pp" if self.in_percent else self.unit

    def has_nothing_to_lose(self, value: float | None) -> bool:
        """True of a value that is the worst there is: a drop from there is 0, whatever a method broke."""
        return value == 0 and self.higher_is_better and self.largest is not None

    @property
    def change(self) -> str:
        """The word for a change for the worse: a rise of an error, else a drop."""
        return "drop" if self.higher_is_better else "rise"

    def text(self, value: float) -> str:
        """The value as the table shows it."""
        return f"{value:.{self.digits}f}{self.unit}"

    def drop_text(self, drop: float) -> str:
        """A loss as the table shows it."""
        return f"{drop + 0.0:+.{self.digits}f}{self.drop_unit}"

    def interval_text(self, low: float, high: float) -> str:
        """The interval of a loss as the table shows it."""
        if not math.isfinite(high - low):
            return "too few samples"
        return f"{low:+.{self.digits}f} to {high:+.{self.digits}f}{self.drop_unit}"


ACCURACY = "top1"
"""The metric of classifiers whose samples are right or wrong."""

_percent = partial(Metric, scale=100, unit=_PERCENT, digits=2, largest=100)
_pairs = partial(
    Metric,
    score=deferred(f"{_TASKS}.embedding", "kept"),
    gathered=deferred(f"{_TASKS}.embedding", "pairs_of"),
    units=lambda pairs: len(pairs.cosines),
    alone=lambda pairs: pairs.alone,
)
_boxes = partial(
    _percent,
    score=deferred(f"{_TASKS}.average_precision", "matches"),
    gathered=deferred(f"{_TASKS}.average_precision", "rankings"),
    units=lambda rankings: rankings.samples,
    undefined="no image has a box",
)

_NO_PIXEL = "no pixel counts, all are of the class to ignore"

METRICS: dict[str, Metric] = {
    "top1": _percent(
        "samples whose label has the largest logit, in percent",
        "top-1",
        ("classify", "text"),
        partial(_among_largest, count=1),
        column=7,
    ),
    "top5": _percent(
        "samples whose label has one of the five largest logits, in percent; of five classes or more",
        "top-5",
        ("classify", "text"),
        partial(_among_largest, count=5),
        least_classes=5,
        column=8,
    ),
    "map": _percent(
        "mean over the classes of the average precision of the samples' ranking, in percent",
        "mAP",
        ("multilabel",),
        deferred(f"{_TASKS}.multilabel", "ranking"),
        deferred(f"{_TASKS}.multilabel", "mean_average_precision"),
        undefined="no sample has any of the classes",
    ),
    "f1": _percent(
        "mean over the classes of the harmonic mean of precision and recall, in percent",
        "F1, macro",
        ("multilabel",),
        deferred(f"{_TASKS}.multilabel", "hits"),
        deferred(f"{_TASKS}.multilabel", "macro_f1"),
        undefined="no sample has any of the classes, and none is predicted",
    ),
    "mae": Metric(
        "mean absolute error, in the unit of the targets",
        "mean absolute error",
        ("regress",),
        deferred(f"{_TASKS}.regression", "absolute_error"),
        higher_is_better=False,
    ),
    "r2": Metric(
        "share of the targets' variance that the network explains, 1 at best; of several numbers, the "
        "mean of the columns' R2",
        "R2",
        ("regress",),
        deferred(f"{_TASKS}.regression", "moments"),
        deferred(f"{_TASKS}.regression", "r_squared"),
        undefined="the targets are all the same",
    ),
    "miou": _percent(
        "mean over the classes of intersection over union of all pixels, in percent",
        "mIoU",
        ("segment",),
        deferred(f"{_TASKS}.segmentation", "overlaps"),
        deferred(f"{_TASKS}.segmentation", "mean_iou"),
        undefined=_NO_PIXEL,
    ),
    "pixel_accuracy": _percent(
        "pixels of the right class, in percent",
        "pixel accuracy",
        ("segment",),
        deferred(f"{_TASKS}.segmentation", "right_pixels"),
        _share,
        undefined=_NO_PIXEL,
    ),
    "map50_95": _boxes(
        "COCO's mean average precision, the mean over overlaps of 50 to 95 %, in percent",
        "mAP 50-95",
        ("detect",),
        value=deferred(f"{_TASKS}.average_precision", "average_precision"),
    ),
    "map50": _boxes(
        "the same at an overlap of 50 %",
        "mAP 50",
        ("detect",),
        value=partial(deferred(f"{_TASKS}.average_precision", "average_precision"), ious=1),
    ),
    "psnr": Metric(
        "mean over the images of the peak signal-to-noise ratio, in dB; 100 where nothing differs",
        "PSNR",
        ("restore",),
        deferred(f"{_TASKS}.restoration", "psnr"),
        unit=" dB",
        digits=2,
    ),
    "ssim": Metric(
        "mean over the images of the structural similarity, 1 at best",
        "SSIM",
        ("restore",),
        deferred(f"{_TASKS}.restoration", "ssim"),
        largest=2,
        undefined="images are smaller than its window of 11 pixels",
    ),
    "spearman": _pairs(
        "rank correlation of the cosines of pairs with their scores, 1 at best",
        "Spearman",
        ("embed",),
        value=deferred(f"{_TASKS}.embedding", "spearman"),
        largest=2,
        needs="score",
        undefined="there are no pairs whose scores and cosines differ",
    ),
    "pair_cosine": _pairs(
        "mean cosine of pairs, or of each vector with the one it should be",
        "cosine of pairs",
        ("embed",),
        value=deferred(f"{_TASKS}.embedding", "mean_cosine"),
        largest=2,
        undefined="no pair is complete",
    ),
    "perplexity": Metric(
        "exponential of the mean cross-entropy of a token, 1 at best",
        "perplexity",
        ("language",),
        deferred(f"{_TASKS}.language", "surprise"),
        deferred(f"{_TASKS}.language", "perplexity"),
        undefined="no token counts",
        digits=3,
        higher_is_better=False,
    ),
    "cer": _percent(
        "wrong, missing and additional characters of a hundred, in percent",
        "character error rate",
        ("sequence",),
        deferred(f"{_TASKS}.sequence", "errors"),
        _share,
        undefined="every target is empty",
        higher_is_better=False,
    ),
}


def metrics_named(task: str) -> dict[str, Metric]:
    """The metrics of a key of ``TASKS`` by name, the main one first."""
    return {name: row for name, row in METRICS.items() if task in row.tasks}


def metrics_of(task: "TaskSpec") -> Mapping[str, Metric]:
    """The metrics of a task by name, the main one first; the user's own by the name of its function."""
    if not task.is_own:
        return metrics_named(task.name)
    return {task.text.rpartition(":")[2]: own_metric(task)}


def own_metric(task: "TaskSpec") -> Metric:
    """The metric that ``FILE.py:CALLABLE`` is, as it describes itself."""
    function = task.function

    def score(outputs: Any, targets: Any) -> "Tensor":
        from modelopt_cli.data.targets import target_count
        from modelopt_cli.tasks.own import scores

        return scores(function, outputs, targets, target_count(targets), task.text)

    name = task.text.rpartition(":")[2]
    row = Metric(f"mean of {task.text}", name, (), score)
    said = {
        key: getattr(function, key)
        for key in ("higher_is_better", "unit", "digits")
        if hasattr(function, key)
    }
    return replace(row, **said)
