"""Images from images: denoised, demosaicked, enlarged."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.functional import pil_to_tensor

from modelopt_cli.data.decode import GREY, ImageFile
from modelopt_cli.data.moving import Motion, Scaled
from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.settings import option
from modelopt_cli.tasks.regression import finite_target, stacked
from modelopt_cli.tasks.task import Misfit
from modelopt_cli.tasks.task_output import finite, require

BEST_DB = 100.0
"""Peak signal-to-noise of equal images, in dB."""
_OVERSHOOT = 1.25
"""How far above the peak a target may be: where an image was resized bicubically, edges reach over it."""
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


class ImageTargets(TargetFormat):
    """Images, float32 ``(N, C, H, W)``.

    Args:
        peak: the largest value that an image may have.
    """

    def __init__(self, peak: float) -> None:
        self._peak = peak

    def place(self, raw: RawTarget, picture: Image.Image) -> Scaled:
        """The image that belongs to a picture, as large or an integer multiple; see the base class."""
        image = self._image(raw)
        height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[1:]
        factor = width // picture.width
        if not factor or (width, height) != (factor * picture.width, factor * picture.height):
            raise DataError(
                f"target is {height}x{width}, the image {picture.height}x{picture.width}",
                hint="give targets as large, or an integer multiple",
            )
        return Scaled(image, factor)

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Tensor:
        """The image of one sample; see :class:`TargetFormat`."""
        image = self._image(raw.image if isinstance(raw, Scaled) else raw)
        if isinstance(image, Image.Image):
            scaled: Tensor = pil_to_tensor(image).float() * (self._peak / 255)
            return scaled
        largest = float(image.max()) if image.numel() else 0.0
        if largest > self._peak * _OVERSHOOT:
            task = option("task", "restore?peak=VALUE")
            raise DataError(
                f"target holds {largest:g}, above the peak of {self._peak:g}",
                hint=f"say with {task} what the largest value is",
            )
        plain: Tensor = image.as_subclass(Tensor)
        return plain

    def _image(self, raw: Any) -> Image.Image | tv_tensors.Image:
        """An image of 8 bits, grey or RGB; one of 16 bits, or floats, as floats ``(C, H, W)``."""
        image = raw.decode() if isinstance(raw, ImageFile) else raw
        if isinstance(image, Image.Image):
            if image.mode.startswith("I"):
                values = torch.from_numpy(np.asarray(image).astype(np.float32))
                return tv_tensors.Image(values.unsqueeze(0) * (self._peak / 65535))
            mode = "L" if image.mode in GREY else "RGB"
            return image if image.mode == mode else image.convert(mode)
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise DataError("target is not an image of channels, height and width")
        if not image.is_floating_point():
            raise DataError(f"target is {str(image.dtype).removeprefix('torch.')}", hint="give floats")
        return tv_tensors.Image(finite_target(image.float()))

    def moved(self, targets: Targets, motion: Motion) -> Targets:
        """The images of moved pictures; see :class:`TargetFormat`."""
        assert isinstance(targets, Tensor)
        if targets.shape[2:] != motion.size:
            sizes = ("x".join(map(str, size)) for size in (targets.shape[2:], motion.size))
            raise UsageError(
                "targets are {}, the pictures {}".format(*sizes), where=option("augment"), hint="leave it out"
            )
        return motion.pictures(targets)

    def collate(self, targets: Sequence[Tensor]) -> Tensor:
        """Images ``(N, C, H, W)``."""
        return stacked(targets)


class Restored(NamedTuple):
    """Images that a network made.

    Attributes:
        images: ``(N, C, H, W)``, float32.
        peak: the largest value that an image may have.
    """

    images: Tensor
    peak: float


def targets(names: tuple[str, ...] | None = None, peak: float = 1.0) -> ImageTargets:
    """The format of the targets."""
    return ImageTargets(peak)


def judged(output: Any, images: Targets, inputs: Any, peak: float = 1.0) -> Restored:
    """The network's images.

    Raises:
        InputError: it returns none, or NaN.
        Misfit: they are larger than the targets, or of other channels.
    """
    fits = isinstance(output, Tensor) and output.dim() == 4 and len(output) == len(images)
    require(fits, output, len(images), "a network for images", "channels, height, width", "give one")
    if not isinstance(images, Tensor) or middle(images, output) is None:
        shape = tuple(images.shape[1:]) if isinstance(images, Tensor) else "no image"
        raise Misfit(0, f"target is {shape}, the network returns {tuple(output.shape[1:])}")
    return Restored(finite(output), float(peak))


def middle(images: Tensor, output: Tensor) -> Tensor | None:
    """The part of images that a network whose convolutions lose the border returns; None for other sizes.

    Args:
        images: ``(N, C, H, W)``.
        output: ``(N, C, h, w)``, as large or smaller by as much on both sides.
    """
    lost = [large - small for large, small in zip(images.shape[2:], output.shape[2:], strict=True)]
    if images.shape[1] != output.shape[1] or any(each < 0 or each % 2 for each in lost):
        return None
    top, left = (each // 2 for each in lost)
    return images[:, :, top : top + output.shape[2], left : left + output.shape[3]]


def _compared(restored: Restored, images: Tensor) -> tuple[Tensor, Tensor]:
    kept = middle(images, restored.images)
    assert kept is not None
    return restored.images.double() / restored.peak, kept.double() / restored.peak


def psnr(restored: Restored, images: Tensor) -> Tensor:
    """Peak signal-to-noise of each image in dB, ``(N,)``: ``10 log10(peak^2 / mean squared error)``."""
    ours, theirs = _compared(restored, images)
    error = (ours - theirs).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=BEST_DB)


def ssim(restored: Restored, images: Tensor) -> Tensor:
    """Structural similarity of each image, ``(N,)``, at most 1; NaN of an image smaller than its window.

    With a Gaussian window of 11 pixels and standard deviation 1.5, where it lies inside the image: Z. Wang et
    al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE Transactions on Image
    Processing 13:600, 2004, section III.
    """
    ours, theirs = _compared(restored, images)
    if min(ours.shape[2:]) < _WINDOW:
        return torch.full((len(ours),), torch.nan, dtype=torch.float64)
    place = torch.arange(_WINDOW, dtype=torch.float64, device=ours.device) - _WINDOW // 2
    line = torch.exp(-place.square() / (2 * _SIGMA**2))
    line = line / line.sum()

    def smoothed(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1).unsqueeze(1)
        flat = F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return flat.view(*x.shape[:2], *flat.shape[2:])

    a, b = smoothed(ours), smoothed(theirs)
    aa, bb, ab = (
        smoothed(ours * ours) - a * a,
        smoothed(theirs * theirs) - b * b,
        smoothed(ours * theirs) - a * b,
    )
    likeness = (2 * a * b + _K1**2) * (2 * ab + _K2**2)
    return (likeness / ((a * a + b * b + _K1**2) * (aa + bb + _K2**2))).flatten(1).mean(1)
