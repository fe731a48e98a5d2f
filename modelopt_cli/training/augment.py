"""Augmentation of training images. Its numbers depend on seed, variant and index of a sample alone.

The transforms are those of ``torchvision.transforms.v2``. Where samples are tensors, a whole batch is
transformed at once, every sample with parameters of its own, to what v2 gives for one sample at a time.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from modelopt_cli.data import Data
from modelopt_cli.data.moving import crop, flip, resize
from modelopt_cli.data.preprocess import ImageTransform
from modelopt_cli.errors import UsageError
from modelopt_cli.program.input_batch import Inputs, each_of, tensors_of
from modelopt_cli.settings import option
from modelopt_cli.training.catalog import AUGMENTATIONS, Augmentation

_MIRRORED = 0.5
"""Fraction of the samples that are mirrored."""


class BatchAugmentation(Protocol):
    """Acts on preprocessed samples."""

    @property
    def draws(self) -> int:
        """Number of random numbers that each sample takes."""

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Float ``(N, C, H, W)`` to the same shape; ``uniform`` is float64 ``(N, draws)`` in 0 to below 1."""


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
    _require_still(name, data)
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
    _require_still(name, data)
    if data.transform is None:
        raise UsageError(
            f"{name} needs images to cut from, and these samples are ready tensors",
            where=option("augment"),
            hint=_usable(lambda row: row.on_image is None),
        )
    transform: ImageTransform = make(data.transform.preprocess, data.input.shape[1:])
    return transform


def _require_still(name: str, data: Data) -> None:
    """Refuse to move pictures whose targets lie in them and would stay where they are."""
    if data.gives_targets and data.targets.in_picture:
        raise UsageError(
            f"{name} moves pictures, and these targets lie in them",
            where=option("augment"),
            hint=_usable(lambda row: not row.is_random),
        )


def _usable(fits: Callable[[Augmentation], bool]) -> str:
    """Hint at the augmentations that would do."""
    return f"use {option('augment')} {' or '.join(name for name, row in AUGMENTATIONS.items() if fits(row))}"


@dataclass(frozen=True, eq=False)
class CropAndFlip:
    """Random crop after padding, then a horizontal flip of every second sample.

    ``v2.RandomCrop(size, padding=size // 8)`` and ``v2.RandomHorizontalFlip()``: 4 pixels for CIFAR's 32.

    Attributes:
        fill: ``(C, 1, 1)``, what black is after normalisation.
    """

    fill: Tensor
    draws: int = 3

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """See :class:`BatchAugmentation`."""
        count, channels, height, width = images.shape
        edge = min(height, width) // 8
        padded = self.fill.expand(count, channels, height + 2 * edge, width + 2 * edge).clone()
        padded[:, :, edge : edge + height, edge : edge + width] = images
        top, left = (uniform[:, :2] * (2 * edge + 1)).long().unbind(1)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        cut = windows[torch.arange(count), :, top, left]
        return torch.where(uniform[:, 2].view(-1, 1, 1, 1) < _MIRRORED, cut.flip(3), cut)


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

    What comes from outside the image is ``fill``, as where v2 moves an image whose ``fill`` is 0. (v2's own
    filling with another value weighs the image twice where it blends into it.)

    Args:
        images: float ``(N, C, H, W)``.
        angle: degrees, clockwise, ``(N,)``.
        right: pixels, ``(N,)``.
        down: pixels, ``(N,)``.
        scale: above 0, ``(N,)``.
        fill: ``(C, 1, 1)``.
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
    moved = F.grid_sample(images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
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


def draw_mixup(alpha: float, samples: int, seed: int, step: int) -> tuple[float, Tensor]:
    """Fraction of a sample that stays, from Beta(alpha, alpha), and the partner of every sample.

    H. Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
    """
    generator = np.random.default_rng((seed, step))
    return float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(samples))


def mix(inputs: Inputs, labels: Tensor, classes: int, share: float, partner: Tensor) -> tuple[Inputs, Tensor]:
    """Inputs, and the probabilities ``(N, classes)`` that are their targets, both mixed alike.

    Args:
        inputs: a batch of floats.
        labels: ``(N,)`` int64.
        classes: number of classes.
        share: fraction of a sample itself; the rest is its partner's.
        partner: ``(N,)`` int64, a permutation.

    Raises:
        UsageError: an input is of integers.
    """
    partner = partner.to(labels.device)
    if not all(tensor.is_floating_point() for tensor in tensors_of(inputs)):
        hint = "leave it out: integers cannot be mixed"
        raise UsageError("an input of the network is of integers", where=option("mixup"), hint=hint)
    mixed = each_of(inputs, lambda tensor: torch.lerp(tensor[partner], tensor, share))
    targets = F.one_hot(labels, classes).to(tensors_of(mixed)[0].dtype)
    return mixed, torch.lerp(targets[partner], targets, share)


def uniform(seed: int, variant: int, indices: NDArray[np.int64], draws: int) -> Tensor:
    """Random numbers for samples, by index: float64 ``(N, draws)`` in 0 to below 1."""
    place = (indices[:, None] * draws + np.arange(draws)).astype(np.uint64)
    return torch.from_numpy((splitmix64(_key(seed, variant), place) >> np.uint64(11)) * 2.0**-53)


@contextlib.contextmanager
def seeded(seed: int, variant: int, index: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python for a sample, inside the context."""
    number = int(splitmix64(_key(seed, variant), np.array([index], dtype=np.uint64))[0])
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


def splitmix64(key: NDArray[np.uint64], place: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64, whose sequence can be entered at any place: integer arithmetic alone.

    G. Steele, D. Lea and C. Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.

    Args:
        key: the seed, of shape ``(1,)``.
        place: in the sequence, from 0.
    """
    mixed: NDArray[np.uint64] = key + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _key(seed: int, variant: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence([seed % 2**64, variant]).generate_state(1, np.uint64).astype(np.uint64)
