"""Shape, type and preprocessing of a Program's input."""

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["nearest", "bilinear", "bicubic"]
INPUT_NAME = "x"
"""Name of an input that has no other."""
InputType = Literal["float32", "int64", "int32", "uint8", "bool"]


def place_names(count: int) -> tuple[str, ...]:
    """Names of so many inputs that are known by their place alone: x, x1, x2."""
    return (INPUT_NAME, *(f"{INPUT_NAME}{place}" for place in range(1, count)))


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
    """Shape, element type and preprocessing of one sample, and of a network's further inputs.

    Attributes:
        shape: without the batch dimension, e.g. ``(3, 224, 224)``.
        preprocess: how an image becomes one; None where samples are no images.
        dtype: type of its elements.
        name: of the input, as the network's ``forward`` calls it.
        free: places in ``shape`` whose size may be another one, tried at two sizes.
        others: the network's further inputs, in order, which have none themselves.
    """

    shape: tuple[int, ...]
    preprocess: Preprocess | None = None
    dtype: InputType = "float32"
    name: str = INPUT_NAME
    free: tuple[int, ...] = ()
    others: tuple["InputSpec", ...] = ()

    @property
    def tensors(self) -> tuple["InputSpec", ...]:
        """All inputs, in order: this one and the others."""
        return (self, *self.others)
