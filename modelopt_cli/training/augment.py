"""Augmentation by preset. What happens to a sample depends on the seed, the epoch and its index alone.

The transforms are those of ``torchvision.transforms.v2``. Where samples are tensors, a whole batch is
transformed at once, every sample with parameters of its own, to what v2 gives for one sample at a time.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from modelopt_cli.data import Data
from modelopt_cli.data.preprocess import MODES, ImageTransform
from modelopt_cli.errors import UsageError


class BatchAugmentation(Protocol):
    """Acts on preprocessed samples."""

    @property
    def draws(self) -> int:
        """How many random numbers each sample takes."""

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Float ``(N, C, H, W)`` to the same shape; ``uniform`` is float64 ``(N, draws)`` in 0 to below 1."""


def batch_augmentation(name: str, data: Data) -> BatchAugmentation | None:
    """What the preset does to samples that are tensors already, or None.

    Raises:
        UsageError: the samples are no images.
    """
    if name not in _PRESETS:
        return None
    shape, preprocess = data.input.shape, data.input.preprocess
    if len(shape) != 3:
        what = f"augments images, and samples are {'x'.join(map(str, shape)) or 'scalars'}"
        raise UsageError(f"{name} {what}", where="--augment", hint="use --augment none")
    fill = torch.zeros(shape[0])
    if preprocess is not None:
        fill = -torch.tensor(preprocess.mean) / torch.tensor(preprocess.std)
    return _PRESETS[name](fill.view(-1, 1, 1))


def image_augmentation(name: str, data: Data) -> ImageTransform | None:
    """What the preset does in place of the data's own preprocessing of an image, or None.

    Raises:
        UsageError: the data does not come as images.
    """
    if name != "imagenet":
        return None
    if data.transform is None:
        raise UsageError(
            "imagenet needs images to cut from, and these samples are ready tensors",
            where="--augment",
            hint="use --augment cifar or none",
        )
    return RandomResizedCrop(data.transform.preprocess, data.input.shape[1:])


@dataclass(frozen=True, eq=False)
class CropAndFlip:
    """Random crop after padding by 4 pixels, then a horizontal flip of every second sample.

    ``v2.RandomCrop(size, padding=4)`` and ``v2.RandomHorizontalFlip()``.

    Attributes:
        fill: ``(C, 1, 1)``, what black is after normalisation.
    """

    fill: Tensor
    padding: int = 4
    draws: int = 3

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """See :class:`BatchAugmentation`."""
        count, _, height, width = images.shape
        top, left = (uniform[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        rows = top[:, None] + torch.arange(height) - self.padding
        columns = left[:, None] + torch.arange(width) - self.padding
        flipped = uniform[:, 2, None] < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
        index = flat.view(count, 1, -1).expand(-1, images.shape[1], -1)
        moved = images.flatten(2).gather(2, index).view(images.shape)
        return torch.where(inside[:, None], moved, self.fill)


@dataclass(frozen=True, eq=False)
class Affine:
    """A small rotation, shift and change of scale.

    ``v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=BILINEAR)``.

    Attributes:
        fill: ``(C, 1, 1)``, what black is after normalisation.
    """

    fill: Tensor
    degrees: float = 10.0
    shift: float = 0.1
    zoom: float = 0.1
    draws: int = 4

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """See :class:`BatchAugmentation`."""
        angle, right, down, scale = (2 * uniform - 1).unbind(1)
        height, width = images.shape[-2:]
        return affine(
            images,
            angle * self.degrees,
            (right * self.shift * width).round(),
            (down * self.shift * height).round(),
            1 + scale * self.zoom,
            self.fill,
        )


def affine(images: Tensor, angle: Tensor, right: Tensor, down: Tensor, scale: Tensor, fill: Tensor) -> Tensor:
    """``v2.functional.affine`` with bilinear interpolation, for a batch with parameters for each sample.

    Args:
        images: float ``(N, C, H, W)``.
        angle: degrees, clockwise, ``(N,)``.
        right: pixels, ``(N,)``.
        down: pixels, ``(N,)``.
        scale: above 0, ``(N,)``.
        fill: ``(C, 1, 1)``.
    """
    height, width = images.shape[-2:]
    cosine, sine = (angle * (math.pi / 180)).cos() / scale, (angle * (math.pi / 180)).sin() / scale
    # From a place in the result to the place it came from, about the centre, in pixels ...
    rows = torch.stack(
        [cosine, sine, -cosine * right - sine * down, -sine, cosine, sine * right - cosine * down], 1
    ).view(-1, 2, 3)
    # ... and in the units of grid_sample, where an image is 2 wide and 2 high.
    sides = torch.tensor([width / 2, height / 2, 1.0], dtype=rows.dtype)
    theta = (rows * sides / sides[:2, None]).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    masked = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    sampled = F.grid_sample(masked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (sampled[:, :-1] - fill) * sampled[:, -1:] + fill


@dataclass(frozen=True)
class RandomResizedCrop(ImageTransform):
    """A part of the undecoded image, of random place, size and shape, resized; then a flip half the time.

    C. Szegedy et al., Going Deeper with Convolutions, CVPR 2015. Draws from torch's global generator.
    """

    size: tuple[int, ...] = ()

    def cut(self, image: Image.Image) -> Image.Image:
        """In place of the resize and centre crop of evaluation."""
        cut: Image.Image = self._transform(image)
        return cut

    @cached_property
    def _transform(self) -> v2.Transform:
        mode = MODES[self.preprocess.interpolation]
        crop = v2.RandomResizedCrop(list(self.size), interpolation=mode, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])


_PRESETS: dict[str, Callable[[Tensor], BatchAugmentation]] = {"mnist": Affine, "cifar": CropAndFlip}


def uniform(seed: int, epoch: int, indices: NDArray[np.int64], draws: int) -> Tensor:
    """Random numbers for samples, by index: float64 ``(N, draws)`` in 0 to below 1.

    SplitMix64 (G. Steele, D. Lea and C. Flood, OOPSLA 2014), entered at any place: integer arithmetic alone.
    """
    place = (indices[:, None] * draws + np.arange(1, draws + 1)).astype(np.uint64)
    return torch.from_numpy((_mixed(seed, epoch, place) >> np.uint64(11)) * 2.0**-53)


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Here the global generators of torch, NumPy and Python give numbers that belong to the sample."""
    number = int(_mixed(seed, epoch, np.array([index], dtype=np.uint64))[0])
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _mixed(seed: int, epoch: int, place: NDArray[np.uint64]) -> NDArray[np.uint64]:
    key = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1, np.uint64)
    mixed: NDArray[np.uint64] = key + place * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
