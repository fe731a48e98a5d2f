"""A class for each pixel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from modelopt_cli.data.decode import ImageFile
from modelopt_cli.data.moving import OUTSIDE, Motion
from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets, indices_hint
from modelopt_cli.errors import DataError
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.tasks.draws import Counts, Values, nan_mean, sums
from modelopt_cli.tasks.regression import stacked
from modelopt_cli.tasks.task import Misfit
from modelopt_cli.tasks.task_output import finite, require

IGNORED = OUTSIDE
"""Class of places that do not count, as torch's cross-entropy knows it."""
_INDEXED = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of images with one integer for each pixel."""
_MOST = 1 << 15
"""Number of classes that there is room for."""
_RESIZED = {3: "linear", 4: "bilinear", 5: "trilinear"}


class MaskTargets(TargetFormat):
    """A class for each pixel, int64 ``(N, H, W)``, ``IGNORED`` where there is none.

    Args:
        ignore: class id in the data of pixels that do not count.
    """

    def __init__(self, ignore: int) -> None:
        self._ignore = ignore

    def place(self, raw: RawTarget, picture: Image.Image) -> tv_tensors.Mask:
        """The mask of a picture; see :class:`TargetFormat`."""
        mask = _class_ids(raw)
        _require_size(mask, (picture.height, picture.width))
        return tv_tensors.Mask(mask)

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Tensor:
        """The mask of one sample; see :class:`TargetFormat`."""
        mask = _class_ids(raw)
        size = _image_size(inputs, mask.dim())
        if size is not None:
            _require_size(mask, size)
        mask = mask.masked_fill(mask == self._ignore, IGNORED)
        unknown = (mask != IGNORED) & ((mask < 0) | (mask >= (classes or _MOST)))
        if bool(unknown.any()):
            allowed = f"0..{(classes or _MOST) - 1}"
            class_ = int(mask[unknown][0])
            hint = f"{self._ignore} marks what is ignored; {indices_hint(class_, classes=classes)}"
            raise DataError(f"mask holds class {class_}, outside {allowed}", hint=hint)
        return mask.to(torch.int16)

    def moved(self, targets: Targets, motion: Motion) -> Targets:
        """The masks of moved pictures; see :class:`TargetFormat`."""
        assert isinstance(targets, Tensor)
        return motion.masks(targets)

    def collate(self, targets: Sequence[Tensor]) -> Tensor:
        """Masks ``(N, H, W)``, int64."""
        return stacked(targets).long()


def _class_ids(raw: RawTarget) -> Tensor:
    """Class ids of a mask as a tensor or an image, int32."""
    image = raw.decode() if isinstance(raw, ImageFile) else raw
    if isinstance(image, Image.Image):
        where = raw.path if isinstance(raw, ImageFile) else None
        if image.mode not in _INDEXED:
            hint = "save class ids, as a grey or a palette image"
            raise DataError(
                f"mask has mode {image.mode}, and not one value for each pixel", where=where, hint=hint
            )
        if image.format == "JPEG":
            raise DataError("mask is a JPEG, which changes class ids", where=where, hint="save it as PNG")
        pixels = np.asarray(image).astype(np.int32)
        return torch.from_numpy(raw.classes(pixels) if isinstance(raw, ImageFile) else pixels)
    if not isinstance(image, Tensor) or image.is_floating_point():
        raise DataError("target is not a mask of class ids", hint="give one integer for each pixel")
    mask = image.squeeze(0) if image.dim() > 2 and len(image) == 1 else image
    return mask.to(torch.int32)


def _require_size(mask: Tensor, size: tuple[int, ...]) -> None:
    if tuple(mask.shape) != size:
        raise DataError(f"mask is {_times(mask.shape)}, the image {_times(size)}")


def targets(names: tuple[str, ...] | None = None, ignore: int = 255) -> MaskTargets:
    """The format of the targets."""
    return MaskTargets(ignore)


class Pixels(NamedTuple):
    """Class of each pixel.

    Attributes:
        ids: int64, in the size of the masks.
        classes: number of the network's classes.
    """

    ids: Tensor
    classes: int


def judged(logits: Any, masks: Targets, inputs: Any, ignore: int = 255) -> Pixels:
    """The class of each pixel.

    Logits of another size are resized to the masks' first, as transformers' and torchvision's references do.
    A single logit is that of class 1 against class 0.

    Raises:
        InputError: the network returns no class for each pixel, or NaN.
        Misfit: a mask holds a class that the network does not have.
    """
    assert isinstance(masks, Tensor)
    resized = place_logits(logits, masks)
    check_places(masks, resized.shape[1], "mask")
    return Pixels(resized.argmax(1), resized.shape[1])


def check_places(targets: Tensor, classes: int, name: str) -> None:
    """Refuse targets ``(N, ...)`` with a class that a network does not have; raises Misfit."""
    outside = (targets >= classes).flatten(1).any(1).nonzero()
    if outside.numel():
        place = int(outside[0])
        raise Misfit(
            place,
            f"{name} holds class {int(targets[place].max())}, which is not among the network's {classes}",
            indices_hint(int(targets[place].max()), classes=classes),
        )


def place_logits(logits: Any, masks: Targets) -> Tensor:
    """Logits ``(N, C, H, W)`` in the size of the masks, float32; raises InputError where they are none."""
    ready = isinstance(masks, Tensor) and masks.dim() > 1
    fits = ready and isinstance(logits, Tensor) and logits.dim() == masks.dim() + 1  # type: ignore[union-attr]
    fits = fits and len(logits) == len(masks)
    require(fits, logits, len(masks), "a segmentation network", "classes, height, width", "give one")
    assert isinstance(masks, Tensor)
    checked = finite(logits)
    if checked.shape[2:] != masks.shape[1:]:
        checked = F.interpolate(checked, masks.shape[1:], mode=_RESIZED[checked.dim()], align_corners=False)
    return checked if checked.shape[1] > 1 else torch.cat([torch.zeros_like(checked), checked], 1)


def row_labels(masks: Tensor, logits: Tensor) -> Tensor:
    """The class of each pixel of logits ``(N, C, ...)``; masks of another size are resized to the nearest."""
    if masks.shape[1:] != logits.shape[2:]:
        resized = F.interpolate(masks.unsqueeze(1).double(), logits.shape[2:], mode="nearest")
        masks = resized.squeeze(1).long()
    return masks.flatten()


def overlaps(predicted: Pixels, masks: Tensor) -> Tensor:
    """Pixels of each sample and class in common, as predicted, and in truth: ``(N, 3, C)``, float32."""
    ids, classes = predicted
    valid = masks != IGNORED
    rows = [
        torch.stack([_histogram(part, classes) for part in (t[v & (p == t)], p[v], t[v])])
        for p, t, v in zip(ids, masks, valid, strict=True)
    ]
    return torch.stack(rows)


def _histogram(ids: Tensor, classes: int) -> Tensor:
    return torch.bincount(ids, minlength=classes).float()


def mean_iou(kept: NDArray[np.float32], counts: Counts) -> Values:
    """Mean over the classes of intersection over union of all pixels, 0 to 1; of classes that occur.

    M. Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2015, section 4.3.
    """
    both, predicted, actual = sums(kept, counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = both / (predicted + actual - both)
    return nan_mean(list(each.T))


def right_pixels(predicted: Pixels, masks: Tensor) -> Tensor:
    """Pixels of each sample with the right class, and all that count, ``(N, 2)``."""
    valid = (masks != IGNORED).flatten(1)
    right = (predicted.ids == masks).flatten(1) & valid
    return torch.stack([right.sum(1), valid.sum(1)], 1).double()


def _image_size(inputs: Any, dimensions: int) -> tuple[int, ...] | None:
    """Size of the image that a mask of so many dimensions belongs to; None where there is no such input."""
    pictures = (t for t in flatten(inputs).values() if t.dim() == dimensions + 1 and t.is_floating_point())
    picture = next(pictures, None)
    return None if picture is None else tuple(picture.shape[1:])


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
