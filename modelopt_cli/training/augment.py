"""Augmentation of training images. Its numbers depend on seed, variant and index of a sample alone.

The transforms are those of ``torchvision.transforms.v2``. Where samples are tensors, a whole batch is
transformed at once, every sample with parameters of its own, to what v2 gives for one sample at a time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as VF

from modelopt_cli.data import Data
from modelopt_cli.data.moving import OUTSIDE, Motion, crop, flip, resize
from modelopt_cli.data.preprocess import ImageTransform
from modelopt_cli.errors import UsageError
from modelopt_cli.settings import option
from modelopt_cli.training.catalog import AUGMENTATIONS, Augmentation

_MIRRORED = 0.5
"""Fraction of the samples that are mirrored."""


@dataclass(frozen=True, eq=False)
class BatchAugmentation(ABC):
    """Random movement of preprocessed samples.

    Attributes:
        draws: number of random numbers that each sample takes.
        fill: ``(C, 1, 1)``, what black is after normalisation.
    """

    draws: ClassVar[int]
    fill: Tensor

    @abstractmethod
    def __call__(self, images: Tensor, uniform: Tensor, *, nearest: bool = False) -> Tensor:
        """Images of the same shape, moved.

        Args:
            images: float ``(N, C, H, W)``.
            uniform: float64 ``(N, draws)`` in 0 to below 1.
            nearest: True if every pixel is to be one of the image, as those of a mask are.
        """

    @abstractmethod
    def boxes(self, boxes: tv_tensors.BoundingBoxes, uniform: Tensor) -> tv_tensors.BoundingBoxes:
        """The boxes of a picture that was moved by these numbers, ``(draws,)``."""


@dataclass(frozen=True, eq=False)
class Moved(Motion):
    """Movement of a batch by the random numbers of each sample, ``(N, draws)``."""

    augmentation: BatchAugmentation
    uniform: Tensor
    size: tuple[int, int]

    def pictures(self, images: Tensor) -> Tensor:
        """See :class:`Motion`."""
        return self._filled(0)(images, self.uniform)

    def masks(self, masks: Tensor) -> Tensor:
        """See :class:`Motion`."""
        moved = self._filled(OUTSIDE)(masks.unsqueeze(1).float(), self.uniform, nearest=True)
        return moved.squeeze(1).to(masks.dtype)

    def boxes(self, place: int, boxes: tv_tensors.BoundingBoxes) -> tv_tensors.BoundingBoxes:
        """See :class:`Motion`."""
        return self.augmentation.boxes(boxes, self.uniform[place])

    def _filled(self, value: float) -> BatchAugmentation:
        return replace(self.augmentation, fill=torch.full((1, 1, 1), float(value)))


def batch_augmentation(name: str, data: Data) -> BatchAugmentation | None:
    """Augmentation of samples that are tensors already, or None.

    Args:
        name: a key of ``AUGMENTATIONS``.
        data: the samples.

    Raises:
        UsageError: the samples are no images, or have several inputs.
    """
    make = AUGMENTATIONS[name].on_samples
    if make is None:
        return None
    shape, preprocess = data.input.shape, data.input.preprocess
    if len(shape) != 3 or data.input.others:
        sizes = ("x".join(map(str, each.shape)) or "a scalar" for each in data.input.tensors)
        form = " and ".join(sizes)
        raise UsageError(
            f"{name} augments images, and samples are {form}",
            where=option("augment"),
            hint=_usable(lambda row: not row.is_random),
        )
    fill = torch.zeros(shape[0])
    if preprocess is not None:
        fill = -torch.tensor(preprocess.mean) / torch.tensor(preprocess.std)
    augmentation: BatchAugmentation = make(fill.view(-1, 1, 1))
    return augmentation


def image_augmentation(name: str, data: Data) -> ImageTransform | None:
    """Random preprocessing of an image in place of the data's own, or None.

    Args:
        name: a key of ``AUGMENTATIONS``.
        data: the samples.

    Raises:
        UsageError: the data does not come as images.
    """
    make = AUGMENTATIONS[name].on_image
    if make is None:
        return None
    if data.transform is None:
        raise UsageError(
            f"{name} needs images to cut from, and these samples are ready tensors",
            where=option("augment"),
            hint=_usable(lambda row: row.on_image is None),
        )
    transform: ImageTransform = make(data.transform.preprocess, data.input.shape[1:])
    return transform


def _usable(fits: Callable[[Augmentation], bool]) -> str:
    """Hint at the augmentations that would do."""
    return f"use {option('augment')} {' or '.join(name for name, row in AUGMENTATIONS.items() if fits(row))}"


@dataclass(frozen=True, eq=False)
class CropAndFlip(BatchAugmentation):
    """Random crop after padding, then a horizontal flip of every second sample.

    ``v2.RandomCrop(size, padding=size // 8)`` and ``v2.RandomHorizontalFlip()``: 4 pixels for CIFAR's 32.
    """

    draws = 3

    def __call__(self, images: Tensor, uniform: Tensor, *, nearest: bool = False) -> Tensor:
        """See :class:`BatchAugmentation`."""
        count, channels, height, width = images.shape
        edge = _edge(height, width)
        padded = self.fill.expand(count, channels, height + 2 * edge, width + 2 * edge).clone()
        padded[:, :, edge : edge + height, edge : edge + width] = images
        top, left = _corner(uniform, edge).unbind(1)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        cut = windows[torch.arange(count), :, top, left]
        return torch.where(uniform[:, 2].view(-1, 1, 1, 1) < _MIRRORED, cut.flip(3), cut)

    def boxes(self, boxes: tv_tensors.BoundingBoxes, uniform: Tensor) -> tv_tensors.BoundingBoxes:
        """See :class:`BatchAugmentation`."""
        height, width = boxes.canvas_size
        edge = _edge(height, width)
        top, left = _corner(uniform, edge).tolist()
        cut = crop(boxes, top - edge, left - edge, height, width)
        return flip(cut) if uniform[2] < _MIRRORED else cut


def _edge(height: int, width: int) -> int:
    """Pixels of padding."""
    return min(height, width) // 8


def _corner(uniform: Tensor, edge: int) -> Tensor:
    """Top and left of the crop in the padded image."""
    return (uniform[..., :2] * (2 * edge + 1)).long()


@dataclass(frozen=True, eq=False)
class Affine(BatchAugmentation):
    """A small rotation, shift and change of scale.

    ``v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=BILINEAR)``.
    """

    draws = 4
    degrees: float = 10.0
    shift: float = 0.1
    zoom: float = 0.1

    def __call__(self, images: Tensor, uniform: Tensor, *, nearest: bool = False) -> Tensor:
        """See :class:`BatchAugmentation`."""
        height, width = images.shape[-2:]
        return affine(images, *self.drawn(uniform, height, width), self.fill, nearest=nearest)

    def boxes(self, boxes: tv_tensors.BoundingBoxes, uniform: Tensor) -> tv_tensors.BoundingBoxes:
        """See :class:`BatchAugmentation`; each becomes the one around it when it was turned."""
        drawn = self.drawn(uniform, *boxes.canvas_size)
        angle, right, down, scale = (each.item() for each in drawn)
        moved: tv_tensors.BoundingBoxes = VF.affine(
            boxes, angle=angle, translate=[right, down], scale=scale, shear=[0.0, 0.0]
        )
        return moved

    def drawn(self, uniform: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Angle in degrees, shift to the right and down in pixels, and scale."""
        angle, right, down, scale = (2 * uniform - 1).unbind(-1)
        shifts = (right * self.shift * width).round(), (down * self.shift * height).round()
        return angle * self.degrees, *shifts, 1 + scale * self.zoom


def affine(
    images: Tensor,
    angle: Tensor,
    right: Tensor,
    down: Tensor,
    scale: Tensor,
    fill: Tensor,
    *,
    nearest: bool = False,
) -> Tensor:
    """``v2.functional.affine`` for a batch with parameters for each sample, bilinear or by the nearest pixel.

    What comes from outside the image is ``fill``, as where v2 moves an image whose ``fill`` is 0. (v2's own
    filling with another value weighs the image twice where it blends into it.)

    Args:
        images: float ``(N, C, H, W)``.
        angle: degrees, clockwise, ``(N,)``.
        right: pixels, ``(N,)``.
        down: pixels, ``(N,)``.
        scale: above 0, ``(N,)``.
        fill: ``(C, 1, 1)``.
        nearest: True for the nearest pixel.
    """
    height, width = images.shape[-2:]
    turn = angle * (math.pi / 180)
    cosine, sine = turn.cos() / scale, turn.sin() / scale
    cosine, sine, right, down = (each.to(images.dtype).view(-1, 1, 1) for each in (cosine, sine, right, down))
    # Where each pixel of the result came from: about the centre, in pixels, before it was shifted.
    x = torch.arange(width).sub((width - 1) / 2) - right
    y = torch.arange(height).sub((height - 1) / 2).unsqueeze(1) - down
    # grid_sample measures in half widths and heights.
    grid = torch.stack([(cosine * x + sine * y) / (width / 2), (cosine * y - sine * x) / (height / 2)], 3)
    mode = "nearest" if nearest else "bilinear"
    moved = F.grid_sample(images - fill, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return moved + fill


@dataclass(frozen=True)
class RandomResizedCrop(ImageTransform):
    """A part of the undecoded image, of random place, size and shape, resized; then a flip half the time.

    C. Szegedy et al., Going Deeper with Convolutions, CVPR 2015. Draws from torch's global generator.
    """

    size: tuple[int, ...] = ()

    def cut(self, image: Image.Image, target: Any) -> tuple[Image.Image, Any]:
        """Crop in place of the resize and centre crop of evaluation."""
        place = self._crop.make_params([image])
        place = tuple(place[key] for key in ("top", "left", "height", "width"))
        mode, (height, width) = InterpolationMode(self.preprocess.interpolation), self.size
        image, target = (resize(crop(each, *place), height, width, mode) for each in (image, target))
        return (flip(image), flip(target)) if torch.rand(1) < _MIRRORED else (image, target)

    @cached_property
    def _crop(self) -> v2.RandomResizedCrop:
        return v2.RandomResizedCrop(list(self.size))
