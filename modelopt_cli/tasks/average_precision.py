"""Mean average precision of boxes, as COCO defines it.

T. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014. COCO's own ``pycocotools`` matches boxes;
precision is averaged here, since an interval takes it for other draws of images.
"""

import contextlib
import io
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.tasks.draws import Counts, Values, in_rows, nan_mean

MOST = 100
"""Detections of an image that count, those with the largest scores."""
IOUS = 10
"""Overlaps at which a box is right: 0.5, 0.55, ..., 0.95."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is averaged."""


class Detections(NamedTuple):
    """Boxes that a network has found in one image.

    Attributes:
        boxes: ``(K, 4)``: left, top, right, bottom in pixels of the input.
        scores: ``(K,)``.
        labels: ``(K,)``, int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def require_coco() -> Any:
    """COCO's own evaluation; raises EnvironmentFailure where it is not installed."""
    try:
        from pycocotools import coco, cocoeval
    except ImportError:
        raise EnvironmentFailure(
            "detections are measured with pycocotools, which is not installed",
            hint="pip install 'modelopt-cli[detect]'",
        ) from None
    return coco.COCO, cocoeval.COCOeval


class Match(NamedTuple):
    """Detections of a class in an image, by falling score.

    Attributes:
        scores: ``(D,)``.
        right: that they found a box, ``(IOUS, D)``.
        ignored: that they count as neither right nor wrong, ``(IOUS, D)``.
        boxes: number of boxes there were to find.
    """

    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    boxes: int


def matches(detections: list[Detections], wanted: list[dict[str, Tensor]]) -> list[dict[int, Match]]:
    """Match detections and boxes of each image, class by class, for average precision."""
    make, judge = require_coco()
    truth = [
        {"bbox": box, "category_id": label, "iscrowd": int(crowd)}
        for target in wanted
        for box, label, crowd in zip(*(_listed(target, key) for key in target), strict=True)
    ]
    places = [place for place, target in enumerate(wanted) for _ in range(len(target["labels"]))]
    guesses = [
        {"bbox": box, "category_id": label, "score": score}
        for each in detections
        for box, score, label in zip(
            _sides(each.boxes), each.scores.tolist(), each.labels.tolist(), strict=True
        )
    ]
    sources = [place for place, each in enumerate(detections) for _ in range(len(each.labels))]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        classes = sorted({entry["category_id"] for entry in (*truth, *guesses)})
        evaluation = judge(
            _indexed(make(), truth, places, len(wanted), classes),
            _indexed(make(), guesses, sources, len(wanted), classes),
            "bbox",
        )
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
    per_image: list[dict[int, Match]] = [{} for _ in wanted]
    for entry in evaluation.evalImgs:
        if entry is not None:
            per_image[entry["image_id"]][entry["category_id"]] = Match(
                np.asarray(entry["dtScores"], dtype=np.float64),
                np.asarray(entry["dtMatches"]) > 0,
                np.asarray(entry["dtIgnore"]).astype(bool),
                int(np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)),
            )
    return per_image


def _listed(target: dict[str, Tensor], key: str) -> list[Any]:
    return _sides(target[key]) if key == "boxes" else target[key].tolist()


def _sides(boxes: Tensor) -> list[list[float]]:
    """Left, top, width and height."""
    sides: list[list[float]] = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double().tolist()
    return sides


def _indexed(
    coco: Any, entries: list[dict[str, Any]], places: list[int], images: int, classes: list[int]
) -> Any:
    """COCO's index of these boxes."""
    for number, (entry, place) in enumerate(zip(entries, places, strict=True), 1):
        area = entry["bbox"][2] * entry["bbox"][3]
        entry |= {"id": number, "image_id": place, "area": area, "iscrowd": entry.get("iscrowd", 0)}
    coco.dataset = {
        "images": [{"id": place} for place in range(images)],
        "categories": [{"id": each} for each in classes],
        "annotations": entries,
    }
    coco.createIndex()
    return coco


class Ranking(NamedTuple):
    """The detections of a class in all images, by falling score.

    Attributes:
        images: that they are in, ``(D,)``.
        right: ``(IOUS, D)``.
        wrong: ``(IOUS, D)``.
        boxes: to find in each image, ``(N,)``.
    """

    images: NDArray[np.int64]
    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    boxes: NDArray[np.float64]


class Rankings(NamedTuple):
    """The detections of all classes that there is a box of.

    Attributes:
        classes: a ranking for each.
        samples: number of images.
    """

    classes: list[Ranking]
    samples: int


def rankings(per_image: list[dict[int, Match]]) -> Rankings:
    """The matches of all images, class by class."""
    classes = sorted({c for image in per_image for c, match in image.items() if match.boxes})
    return Rankings([_ranking(per_image, each) for each in classes], len(per_image))


def _ranking(per_image: list[dict[int, Match]], wanted: int) -> Ranking:
    present = [(place, image[wanted]) for place, image in enumerate(per_image) if wanted in image]
    boxes = np.zeros(len(per_image))
    boxes[[place for place, _ in present]] = [match.boxes for _, match in present]
    images = np.repeat([place for place, _ in present], [len(match.scores) for _, match in present])
    order = np.argsort(-np.concatenate([match.scores for _, match in present]), kind="stable")
    right = np.concatenate([match.right for _, match in present], 1)[:, order]
    ignored = np.concatenate([match.ignored for _, match in present], 1)[:, order]
    # What comes after the last right one lowers no precision that counts.
    end = int(np.flatnonzero((right & ~ignored).any(0)).max(initial=-1)) + 1
    right, ignored = right[:, :end], ignored[:, :end]
    return Ranking(images[order][:end], right & ~ignored, ~right & ~ignored, boxes)


def average_precision(kept: Rankings, counts: Counts, ious: int = IOUS) -> Values:
    """COCO's mean average precision over the classes and the first ``ious`` overlaps, 0 to 1.

    Of each class and overlap the mean, over ``RECALLS``, of the largest precision at that recall or more.

    Args:
        kept: what ``rankings`` returns.
        counts: of each image in each draw, ``(draws, N)``.
        ious: 1 for an overlap of 0.5 alone, ``IOUS`` for all of them.
    """
    if not kept.classes:
        return np.full(len(counts), np.nan)
    width = max(kept.samples, *(len(each.images) for each in kept.classes))
    return in_rows(
        counts, width, lambda some: nan_mean([_of_class(each, some, ious) for each in kept.classes])
    )


def _of_class(ranking: Ranking, counts: Counts, ious: int) -> Values:
    picked = counts[:, ranking.images]
    boxes = counts @ ranking.boxes
    total = np.zeros(len(counts))
    for right, wrong in zip(ranking.right[:ious], ranking.wrong[:ious], strict=True):
        places = np.flatnonzero(right)
        if places.size:
            hits = picked[:, places].cumsum(1)
            missed = (picked * wrong).cumsum(1)[:, places]
            total += _interpolated(hits, missed, boxes)
    with np.errstate(invalid="ignore"):
        return np.where(boxes > 0, total / ious, np.nan)


def _interpolated(hits: Counts, missed: Counts, boxes: Values) -> Values:
    """Average precision from the right and the wrong ones up to each right one, ``(draws, places)``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / boxes[:, None]
        precision = hits / (hits + missed + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    reached = np.searchsorted(RECALLS, recall.ravel(), side="right").reshape(recall.shape)
    return (np.diff(reached, axis=1, prepend=0) * best).sum(1) / len(RECALLS)  # type: ignore[no-any-return]
