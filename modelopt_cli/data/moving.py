"""Cropping, resizing and mirroring of what lies in a picture, along with the picture.

A target of a picture may be a ``torchvision.tv_tensors.Mask`` ``(H, W)``, ``BoundingBoxes``, a picture itself
(``Scaled``), or a dictionary of these. Anything else does not lie in the picture, and stays as it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

OUTSIDE = -100
"""Class in a mask of what lies outside the picture: torch's cross-entropy leaves it out."""

SLIVER = 0.01
"""Pixels that must be left of a box, each way, when it was cropped: less is rounding."""


@dataclass(frozen=True)
class Scaled:
    """A picture that belongs to another one, so many times as high and as wide.

    Attributes:
        image: 8-bit, or floats ``(C, H, W)``.
        factor: at least 1.
    """

    image: Image.Image | tv_tensors.Image
    factor: int = 1


class Motion(ABC):
    """Movement of the pictures of a batch, each its own.

    Attributes:
        size: height and width of the pictures.
    """

    size: tuple[int, int]

    @abstractmethod
    def pictures(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` of the pictures' size moved alike; what comes from outside is 0."""

    @abstractmethod
    def masks(self, masks: Tensor) -> Tensor:
        """Masks ``(N, H, W)`` of the pictures' size moved alike; what comes from outside is ``OUTSIDE``."""

    @abstractmethod
    def boxes(self, place: int, boxes: tv_tensors.BoundingBoxes) -> tv_tensors.BoundingBoxes:
        """The boxes in the picture at a place of the batch, as far as they stay in it."""

    def target(self, place: int, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Boxes ``(K, 4)`` and what else they have each; those that are moved out are left out."""
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=self.size)
        return visible({**target, "boxes": self.boxes(place, boxes).as_subclass(Tensor)})


def crop(picture: Any, top: int, left: int, height: int, width: int) -> Any:
    """The part from a pixel on, which may reach over the picture: there it is black."""
    if isinstance(picture, Scaled):
        place = (each * picture.factor for each in (top, left, height, width))
        return Scaled(crop(picture.image, *place), picture.factor)
    if isinstance(picture, tv_tensors.Mask):
        over = max(0, -top, -left, top + height - picture.shape[-2], left + width - picture.shape[-1])
        padded = F.pad(picture, [over], fill=OUTSIDE) if over else picture
        return F.crop(padded, top + over, left + over, height, width)
    return _each(picture, crop, F.crop, top, left, height, width)


def resize(picture: Any, height: int, width: int, mode: InterpolationMode) -> Any:
    """The same in another size; a mask by Pillow's nearest pixel, whatever the mode."""
    if isinstance(picture, Scaled):
        size = (height * picture.factor, width * picture.factor)
        return Scaled(resize(picture.image, *size, mode), picture.factor)
    if isinstance(picture, tv_tensors.Mask):
        image = Image.fromarray(picture.numpy().astype(np.int32))
        resized = _resized(image, height, width, InterpolationMode.NEAREST)
        return tv_tensors.Mask(torch.from_numpy(np.array(resized)))
    return _each(picture, resize, _resized, height, width, mode)


def flip(picture: Any) -> Any:
    """The mirror image, left for right."""
    if isinstance(picture, Scaled):
        return Scaled(flip(picture.image), picture.factor)
    return _each(picture, flip, F.horizontal_flip)


def visible(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Boxes of which something is left, with their labels and what else they have each."""
    boxes = target["boxes"]
    kept = (boxes[:, 2:] - boxes[:, :2] > SLIVER).all(1)
    return {name: each[kept] for name, each in target.items()}


def _each(value: Any, again: Any, change: Any, *place: Any) -> Any:
    """Change a picture or boxes, or each of those in a dictionary."""
    if isinstance(value, Mapping):
        return {name: again(part, *place) for name, part in value.items()}
    return change(value, *place) if isinstance(value, Image.Image | tv_tensors.TVTensor) else value


def _resized(picture: Any, height: int, width: int, mode: InterpolationMode) -> Any:
    return F.resize(picture, [height, width], interpolation=mode, antialias=True)
