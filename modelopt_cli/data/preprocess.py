"""Merge what is known about an input's preprocessing, and apply it to an image."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from modelopt_cli.data.config import PreprocessOverrides, Size
from modelopt_cli.data.moving import crop, resize
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.program.input_spec import InputSpec, Preprocess
from modelopt_cli.settings import option


def resolve_preprocess(
    recorded: InputSpec | None, overrides: PreprocessOverrides, native_channels: int = 3
) -> tuple[Preprocess, tuple[int, ...] | None]:
    """Merge in this order: the user's word, what the network says, what the images are.

    With neither of the first two, an image keeps its size and channels and is scaled to 0..1. Where only the
    network's shape is known, the whole image is resized to exactly that.

    Returns:
        The preprocessing, and the sample shape it gives, or None where that depends on the image.

    Raises:
        UsageError: the overrides contradict each other or the network.
        DataError: the network's input is not an image.
    """
    base = recorded.preprocess if recorded else None
    shape = recorded.shape if recorded else None
    if shape is not None and (len(shape) != 3 or (base is None and shape[0] not in (1, 3))):
        wanted = "x".join(map(str, shape))
        raise DataError(
            f"the network takes inputs of shape {wanted}, not images",
            hint="give ready tensors with npz:FILE (float) or FILE.py:CALLABLE",
        )
    target = overrides.size or ((shape[1], shape[2]) if shape else None)
    channels = overrides.channels or (base.channels if base else shape[0] if shape else native_channels)
    resize, crop = _geometry(base, overrides, target)
    merged = Preprocess(
        resize=resize,
        crop=crop,
        interpolation=overrides.interpolation or (base.interpolation if base else "bilinear"),
        mean=_per_channel("mean", overrides.mean, base.mean if base else (0.0,), channels),
        std=_per_channel("std", overrides.std, base.std if base else (1.0,), channels),
        channels=channels,
    )
    size = _output_size(merged) or target
    if overrides.size and size != overrides.size:
        got, want = ("x".join(map(str, s)) for s in (size or (0, 0), overrides.size))
        raise UsageError(
            f"{option('resize')} and {option('crop')} give {got}, not {want}", where=option("input_size")
        )
    return merged, (channels, *size) if size else None


def _geometry(
    base: Preprocess | None, overrides: PreprocessOverrides, target: Size | None
) -> tuple[int | Size | None, int | float | None]:
    """Resize and crop. A stated input size is reached exactly, by whichever of the two was left open."""
    if overrides.resize is None and overrides.crop is None:
        if base is not None and overrides.size is None:
            return base.resize, base.crop
        return target, None
    recorded = base if overrides.size is None else None
    resize, crop = overrides.resize, overrides.crop
    if resize is None:
        if recorded is not None:
            resize = recorded.resize
        elif isinstance(crop, float):
            resize = target
    elif crop is None:
        if recorded is not None:
            crop = recorded.crop
        elif isinstance(resize, int) and target and target[0] == target[1]:
            crop = target[0]
    return resize, crop


def _output_size(preprocess: Preprocess) -> Size | None:
    if isinstance(preprocess.crop, int):
        return preprocess.crop, preprocess.crop
    return preprocess.resize if isinstance(preprocess.resize, tuple) else None


def _per_channel(
    name: str, override: tuple[float, ...] | None, known: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    values = tuple(float(v) for v in (known if override is None else override))
    if len(values) == channels:
        return values
    if values and len(set(values)) == 1:
        return values[:1] * channels
    raise UsageError(
        f"{len(values)} values for {channels} channel(s)", where=option(name), hint="give one per channel"
    )


@dataclass(frozen=True)
class ImageTransform:
    """``Preprocess`` as a function from an 8-bit PIL image to a float tensor ``(C, H, W)``.

    Cropping and resizing are torchvision's on the PIL image (antialiased by PIL), as in torchvision's own
    presets, whose results it reproduces bit by bit. A target that lies in the image is moved along.
    """

    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        """The image alone."""
        return self.pair(image, None)[0]

    def pair(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        """The image, and what of its target lies in it cut and resized with it; see ``data.moving``."""
        p = self.preprocess
        image, moved = self.cut(_convert(image, "L" if p.channels == 1 else "RGB"), target)
        scaled: Tensor = F.convert_image_dtype(F.pil_to_tensor(image), torch.float)
        if any(p.mean) or any(v != 1.0 for v in p.std):
            scaled = F.normalize(scaled, mean=list(p.mean), std=list(p.std))
        return scaled, moved

    def cut(self, image: Image.Image, target: Any) -> tuple[Image.Image, Any]:
        """The part of the image that the network sees, at the size it sees it; of its target the same."""
        p = self.preprocess
        if isinstance(p.crop, float):
            image, target = _centre(image, target, max(1, int(p.crop * min(image.size))))
        if p.resize is not None:
            size, mode = (
                [p.resize] if isinstance(p.resize, int) else list(p.resize),
                InterpolationMode(p.interpolation),
            )
            image = F.resize(image, size, interpolation=mode, antialias=True)
            target = resize(target, image.height, image.width, mode)
        return _centre(image, target, p.crop) if isinstance(p.crop, int) else (image, target)


def _centre(image: Image.Image, target: Any, side: int) -> tuple[Image.Image, Any]:
    """The square in the middle, as torchvision's ``center_crop`` rounds its place."""
    width, height = image.size
    top, left = (-((side - n) // 2) if side > n else round((n - side) / 2) for n in (height, width))
    return crop(image, top, left, side, side), crop(target, top, left, side, side)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    # Pillow clips 16-bit and float images to 255 when it converts them: white squares, and no error.
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"images with mode {image.mode} are not 8-bit", hint="convert them to 8 bits per channel"
        )
    return image if image.mode == mode else image.convert(mode)
