"""Boxes around things, each with a class and a score.

Metrics are those of COCO (T. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014): its own
``pycocotools`` matches boxes; precision is averaged here, since an interval takes it for other draws of
images.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets
from modelopt_cli.errors import DataError, EnvironmentFailure, InputError
from modelopt_cli.program.outputs import flatten
from modelopt_cli.tasks.draws import Counts, Values, in_rows, nan_mean
from modelopt_cli.tasks.outputs import form_of
from modelopt_cli.tasks.regression import finite_target

MOST = 100
"""Detections of an image that count, those with the largest scores."""
IOUS = 10
"""Overlaps at which a box is right: 0.5, 0.55, ..., 0.95."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is averaged."""
_OUTSIDE = 1.0
"""Pixels that a box may reach over the image, for rounding."""


class BoxTargets(TargetFormat):
    """Boxes of each image: a list of dictionaries, one for each sample.

    ``boxes`` float32 ``(K, 4)``: left, top, right, bottom in pixels of the input; ``labels`` int64 ``(K,)``
    as the network numbers its classes; ``iscrowd`` bool ``(K,)``: groups, which need not be found.
    """

    in_picture = True

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> dict[str, Tensor]:
        """The boxes of one sample; see :class:`TargetFormat`."""
        if not isinstance(raw, Mapping) or "boxes" not in raw or "labels" not in raw:
            raise DataError("target is not a dictionary of boxes and labels")
        boxes = finite_target(torch.as_tensor(raw["boxes"]).float().reshape(-1, 4))
        labels = torch.as_tensor(raw["labels"]).reshape(-1)
        crowd = torch.as_tensor(raw.get("iscrowd", torch.zeros(len(boxes)))).reshape(-1).bool()
        if len(labels) != len(boxes) or len(crowd) != len(boxes):
            raise DataError(f"target has {len(boxes)} boxes and {len(labels)} labels")
        _require_classes(labels, classes)
        _require_inside(boxes, inputs)
        return {"boxes": boxes, "labels": labels.long(), "iscrowd": crowd}

    def collate(self, targets: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A list of the targets."""
        return list(targets)


def _require_classes(labels: Tensor, classes: int | None) -> None:
    if labels.numel() and labels.is_floating_point():
        raise DataError("labels of boxes are no whole numbers")
    wrong = (labels < 0) | (False if classes is None else labels >= classes)
    if bool(wrong.any()):
        known = "0 and up" if classes is None else f"0..{classes - 1}"
        raise DataError(f"class id {int(labels[wrong][0])} is outside {known}")


def _require_inside(boxes: Tensor, inputs: Any) -> None:
    for box in boxes[(boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])]:
        raise DataError(
            f"box {_corners(box)} has no width or no height", hint="give left, top, right, bottom"
        )
    size = _image_size(inputs)
    if size is None:
        return
    height, width = size
    limits = torch.tensor([width, height, width, height]) + _OUTSIDE
    for box in boxes[((boxes < -_OUTSIDE) | (boxes > limits)).any(1)]:
        raise DataError(f"box {_corners(box)} reaches outside the image, {width}x{height} pixels")


def _corners(box: Tensor) -> str:
    return ", ".join(f"{side:g}" for side in box.tolist())


def _image_size(inputs: Any) -> tuple[int, int] | None:
    """Height and width of a sample's image; None where there is none."""
    picture = next((t for t in flatten(inputs).values() if t.dim() == 3), None)
    return None if picture is None else (picture.shape[1], picture.shape[2])


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


def targets(names: tuple[str, ...] | None = None) -> BoxTargets:
    """The format of the targets."""
    return BoxTargets()


def judged(outputs: Any, boxes: Targets, inputs: Any) -> list[Detections]:
    """What a detector has found in each image.

    It may return, for each image, a dictionary of ``boxes``, ``scores`` and ``labels``, as torchvision's do;
    one dictionary of these for the batch, each ``(N, K, ...)``; or ``logits`` ``(N, K, classes + 1)`` and
    ``pred_boxes`` ``(N, K, 4)``, centre and size as shares of the image, as DETR does.

    Raises:
        InputError: it returns something else, or NaN.
    """
    require_coco()
    detections = [_finite(each) for each in _each(outputs, len(boxes), inputs)]
    if len(detections) != len(boxes):
        raise InputError(f"returned boxes of {len(detections)} images for {len(boxes)} samples")
    return detections


def _each(outputs: Any, samples: int, inputs: Any) -> Iterator[Detections]:
    """The detections of each image, in any form that is known."""
    if isinstance(outputs, Mapping) and {"logits", "pred_boxes"} <= outputs.keys():
        yield from _of_queries(outputs["logits"], outputs["pred_boxes"], inputs)
        return
    per_batch = isinstance(outputs, Mapping)
    images = [outputs] if per_batch else outputs if isinstance(outputs, list | tuple) else []
    wanted = set(Detections._fields)
    if not all(isinstance(image, Mapping) and wanted <= image.keys() for image in images) or not images:
        hint = "return boxes, scores and labels of each image"
        raise InputError(
            f"returned {form_of(outputs)} for {samples} samples where a detector does", hint=hint
        )
    for image in images:
        parts = [image[name] for name in Detections._fields]
        if per_batch:
            yield from map(Detections, *(list(part) for part in parts))
        else:
            yield Detections(*parts)


def _of_queries(logits: Tensor, centred: Tensor, inputs: Any) -> Iterator[Detections]:
    """Detections of a network that finds a set; its last class is that nothing is there."""
    picture = next((t for t in flatten(inputs).values() if t.dim() == 4), None)
    if picture is None:
        raise InputError("returned shares of an image, and there is no image among its inputs")
    height, width = picture.shape[2:]
    scores, labels = logits.softmax(2)[..., :-1].max(2)
    middle, size = centred[..., :2], centred[..., 2:]
    corners = torch.cat([middle - size / 2, middle + size / 2], 2)
    pixels = corners * corners.new_tensor([width, height, width, height])
    yield from map(Detections, pixels, scores, labels)


def _finite(detections: Detections) -> Detections:
    boxes, scores, labels = (part.detach().cpu() for part in detections)
    if torch.isnan(boxes).any() or torch.isnan(scores).any():
        raise InputError("the network's output is not a number (NaN)", hint="check its weights")
    return Detections(boxes.double().reshape(-1, 4), scores.double(), labels.long())


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
    """What average precision needs of each image: the matches of each class."""
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
