"""Boxes around things, each with a class and a score: targets, and outputs of detectors in any known form."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from modelopt_cli.data.class_names import class_key, places_of
from modelopt_cli.data.moving import Motion, visible
from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets, indices_hint
from modelopt_cli.errors import DataError, InputError
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.settings import did_you_mean
from modelopt_cli.tasks.average_precision import Detections, require_coco
from modelopt_cli.tasks.regression import finite_target
from modelopt_cli.tasks.task_output import form_of
from modelopt_cli.text import short

_OUTSIDE = 1.0
"""Pixels that a box may reach over the image, for rounding."""


class BoxTargets(TargetFormat):
    """Boxes of each image: a list of dictionaries, one for each sample.

    ``boxes`` float32 ``(K, 4)``: left, top, right, bottom in pixels of the input; ``labels`` int64 ``(K,)``
    as the network numbers its classes; ``iscrowd`` bool ``(K,)``: groups, which need not be found. The data
    may have ``names`` of the classes, too: a network that has names takes its own numbers for them.

    Args:
        names: of the network's classes.
    """

    names = ("boxes", "labels", "iscrowd")

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self._places = places_of(names or ())

    def place(self, raw: RawTarget, picture: Image.Image) -> dict[str, Tensor]:
        """Boxes in pixels of a picture; see :class:`TargetFormat`."""
        size = picture.height, picture.width
        target = self._read(raw, size)
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        return {**target, "boxes": F.clamp_bounding_boxes(boxes)}

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> dict[str, Tensor]:
        """The boxes of one sample; see :class:`TargetFormat`. What was cropped away is left out."""
        if isinstance(raw, Mapping) and isinstance(raw.get("boxes"), tv_tensors.BoundingBoxes):
            target = visible({**raw, "boxes": raw["boxes"].as_subclass(Tensor)})
        else:
            target = self._read(raw, _image_size(inputs))
        _require_classes(target["labels"], classes)
        return target

    def _read(self, raw: RawTarget, size: tuple[int, int] | None) -> dict[str, Tensor]:
        """Boxes in an image of this height and width."""
        if not isinstance(raw, Mapping) or "boxes" not in raw or not {"labels", "names"} & raw.keys():
            raise DataError("target is not a dictionary of boxes and labels")
        boxes = finite_target(torch.as_tensor(raw["boxes"]).float().reshape(-1, 4))
        labels = torch.as_tensor(self._labels(raw)).reshape(-1)
        crowd = torch.as_tensor(raw.get("iscrowd", torch.zeros(len(boxes)))).reshape(-1).bool()
        if len(labels) != len(boxes) or len(crowd) != len(boxes):
            raise DataError(f"target has {len(boxes)} boxes and {len(labels)} labels")
        if labels.numel() and labels.is_floating_point():
            raise DataError("labels of boxes are no integers")
        _require_inside(boxes, size)
        return {"boxes": boxes, "labels": labels.long(), "iscrowd": crowd}

    def moved(self, targets: Targets, motion: Motion) -> Targets:
        """The boxes in moved pictures; see :class:`TargetFormat`."""
        assert isinstance(targets, list)
        return [motion.target(place, target) for place, target in enumerate(targets)]

    def collate(self, targets: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A list of the targets."""
        return list(targets)

    def _labels(self, target: Mapping[str, Any]) -> Any:
        """The classes by number, from their names where the network and the data have some."""
        names = target.get("names", ())
        if "labels" in target and not (self._places and "names" in target):
            return target["labels"]
        if not self._places:
            raise DataError("boxes have names of classes, the network has none", hint="give their numbers")
        for name in names:
            if class_key(name) not in self._places:
                hint = (
                    did_you_mean(name, self._places)
                    or "coco:FILE@DIR?labels=ids takes the numbers of the file"
                )
                raise DataError(f"the network has no class {short(name)!r}", hint=hint)
        return torch.tensor([self._places[class_key(name)] for name in names], dtype=torch.int64)


def _require_classes(labels: Tensor, classes: int | None) -> None:
    wrong = (labels < 0) | (False if classes is None else labels >= classes)
    if bool(wrong.any()):
        known, first = "below 0" if classes is None else f"outside 0..{classes - 1}", int(labels[wrong][0])
        raise DataError(f"class id {first} is {known}", hint=indices_hint(first, classes=classes))


def _require_inside(boxes: Tensor, size: tuple[int, int] | None) -> None:
    for box in boxes[(boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])]:
        raise DataError(
            f"box {_corners(box)} has no width or no height", hint="give left, top, right, bottom"
        )
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


def to_find(boxes: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Boxes that a network is to learn: groups are left out."""
    return [{name: each[~target["iscrowd"]] for name, each in target.items()} for target in boxes]


def targets(names: tuple[str, ...] | None = None) -> BoxTargets:
    """The format of the targets."""
    return BoxTargets(names)


def judged(outputs: Any, boxes: Targets, inputs: Any) -> list[Detections]:
    """Detections in each image.

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
