"""Shape, type and preprocessing of a Program's input."""

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["nearest", "bilinear", "bicubic"]
InputType = Literal["float32", "int64", "int32", "uint8", "bool"]


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing that makes the network's float input of a decoded uint8 image.

    Applied in this order: convert to ``channels``; centre crop of ``crop`` times the short side if
    ``crop`` is a fraction; resize; centre crop of ``crop`` pixels if it is a whole number;
    scale to 0..1; subtract ``mean`` and divide by ``std``, per channel.

    Attributes:
        resize: short side in pixels, or exact ``(height, width)``; None leaves the size alone.
        crop: pixels (int), or a fraction of the short side (float below 1), or None.
        interpolation: resampling used by ``resize``.
        mean: per channel, on the 0..1 scale.
        std: per channel, on the 0..1 scale.
        channels: 1 (grey) or 3 (RGB).
    """

    resize: int | tuple[int, int] | None = None
    crop: int | float | None = None
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 3


@dataclass(frozen=True)
class InputSpec:
    """Shape, element type and preprocessing of one sample.

    Attributes:
        shape: without the batch dimension, e.g. ``(3, 224, 224)``.
        preprocess: how an image becomes one; None where samples are no images.
        dtype: type of its elements.
    """

    shape: tuple[int, ...]
    preprocess: Preprocess | None = None
    dtype: InputType = "float32"
