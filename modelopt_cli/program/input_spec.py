"""Shape, type and preprocessing of a Program's input."""

from dataclasses import dataclass, field, replace
from typing import Literal

from modelopt_cli.errors import UsageError
from modelopt_cli.option_types import require_declared

Interpolation = Literal["nearest", "bilinear", "bicubic"]
INPUT_NAME = "x"
"""Name of an input that has no other."""
InputType = Literal["float32", "int64", "int32", "uint8", "bool"]
INPUT_TYPE: InputType = "float32"
"""Type of an input of which nothing else is said; images have no other."""


def place_names(count: int) -> tuple[str, ...]:
    """Names of so many inputs that are known by their place alone: x, x1, x2."""
    return (INPUT_NAME, *(f"{INPUT_NAME}{place}" for place in range(1, count)))


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing that makes the network's float input of a decoded uint8 image.

    Applied in this order: convert to ``channels``; centre crop of ``crop`` times the short side if
    ``crop`` is a fraction; resize; centre crop of ``crop`` pixels if it is an integer;
    scale to 0..1; subtract ``mean`` and divide by ``std``, per channel.

    Attributes:
        resize: short side in pixels, or exact ``(height, width)``; None leaves the size alone.
        crop: pixels (int), or a fraction of the short side (float below 1), or None.
        interpolation: resampling used by ``resize``.
        mean: per channel, on the 0..1 scale.
        std: per channel, on the 0..1 scale.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        UsageError: a value is of another type, or none that an image could be processed with.

    Example:
        >>> mo.Preprocess(resize=256, crop=224, mean=(0.5,) * 3, std=(0.5,) * 3).crop
        224
    """

    resize: int | tuple[int, int] | None = None
    crop: int | float | None = None
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 3

    def __post_init__(self) -> None:
        require_declared(self)
        if self.channels not in (1, 3):
            raise UsageError(f"{self.channels} is neither 1 (grey) nor 3 (RGB)", where="channels")
        if min(self.std, default=0.0) <= 0:
            raise UsageError(f"{self.std} is not one number above 0 for each channel", where="std")


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
        below: integers are from 0 up to, not including, this one, as far as a network says so that looks
            them up; it follows from the network, and makes no difference between two inputs.

    Raises:
        UsageError: a value is of another type, or the shape has a size below 1.

    Example:
        >>> mo.InputSpec([3, 224, 224]).shape
        (3, 224, 224)
    """

    shape: tuple[int, ...]
    preprocess: Preprocess | None = None
    dtype: InputType = INPUT_TYPE
    name: str = INPUT_NAME
    free: tuple[int, ...] = ()
    others: tuple["InputSpec", ...] = ()
    below: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_declared(self)
        if min(self.shape, default=1) < 1:
            hint = "give the sizes of one sample without the batch, such as (3, 224, 224)"
            raise UsageError(f"{self.shape} is no shape of a sample", where="shape", hint=hint)

    @property
    def tensors(self) -> tuple["InputSpec", ...]:
        """All inputs, in order: this one and the others."""
        return (self, *self.others)

    def with_samples_of(self, other: "InputSpec") -> "InputSpec":
        """The same inputs, where samples look as ``other`` says: names and free sizes stay.

        Another number of inputs makes it ``other``.
        """
        if len(self.tensors) != len(other.tensors):
            return other
        by_name = {each.name: each for each in other.tensors}
        by_place = dict(zip((each.name for each in self.tensors), other.tensors, strict=True))
        given = by_name if by_name.keys() == by_place.keys() else by_place
        first, *others = (
            replace(given[own.name], name=own.name, free=own.free, others=(), below=own.below)
            for own in self.tensors
        )
        return replace(first, others=tuple(others))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """True if a sample of this input may have a shape: its own, but for the sizes that are free."""
        if len(shape) != len(self.shape):
            return False
        sizes = enumerate(zip(shape, self.shape, strict=True))
        return all(given == size or (place in self.free and given > 0) for place, (given, size) in sizes)
