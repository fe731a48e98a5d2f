"""Preprocessing that the user asks for, in place of what the network or the data imply."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, get_args

from modelopt_cli.program.input_spec import (
    INPUT_NAME,
    INPUT_TYPE,
    InputSpec,
    InputType,
    Interpolation,
    place_names,
)
from modelopt_cli.settings import Config, Setting, fraction, not_one_of, option

Size = tuple[int, int]
_TITLE = "Network and data"

INTERPOLATIONS: dict[str, str] = {
    "nearest": "the nearest pixel",
    "bilinear": "a weighted mean of four pixels",
    "bicubic": "a weighted mean of sixteen pixels",
}


def parse_size(text: str) -> tuple[int, int]:
    """``224`` or ``192x256`` as (height, width) in pixels."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"'{text}' is neither N nor HEIGHTxWIDTH in pixels")
    return int(match[1]), int(match[2] or match[1])


def parse_inputs(texts: Sequence[str]) -> InputSpec:
    """Read the description of a sample: ``3x8x56x56``, ``128:int64`` or ``image=3x64x64,mask=77:int64``.

    Args:
        texts: each of one input or of several with commas between; ``scalar`` is the shape of a number.

    Raises:
        ValueError: says which of them is wrong.
    """
    given = [part for text in texts for part in text.split(",")]
    inputs = [_parse_input(part, name) for part, name in zip(given, place_names(len(given)), strict=True)]
    names = [each.name for each in inputs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"there are two inputs {twice!r}")
    return replace(inputs[0], others=tuple(inputs[1:]))


def _parse_input(text: str, name: str) -> InputSpec:
    size = r"[1-9]\d{0,5}"
    match = re.fullmatch(
        rf"(?:([A-Za-z_]\w*)=)?(scalar|{size}(?:x{size}){{0,7}})(?::(\w+))?", text.strip(), re.ASCII
    )
    if match is None:
        raise ValueError(
            f"'{text}' is not the shape of a sample, such as 3x224x224, 128:int64 or mask=77:int64"
        )
    shape = () if match[2] == "scalar" else tuple(map(int, match[2].split("x")))
    return InputSpec(shape, dtype=_input_type(match[3] or INPUT_TYPE), name=match[1] or name)


def as_image(spec: InputSpec) -> tuple[Size, int] | None:
    """Size and channels of the image that a network's one input may be; None where it is none."""
    grey_or_colour = len(spec.shape) == 3 and spec.shape[0] in (1, 3)
    if spec.others or spec.name != INPUT_NAME or spec.dtype != INPUT_TYPE or not grey_or_colour:
        return None
    return (spec.shape[1], spec.shape[2]), spec.shape[0]


def parse_resize(text: str) -> int | tuple[int, int]:
    """``256``, the short side, or ``192x256``, exactly that height and width."""
    height, width = parse_size(text)
    return (height, width) if "x" in text else height


def parse_crop(text: str) -> int | float:
    """``224`` in pixels, or ``0.875`` or ``87.5%``, a fraction of the short side."""
    if re.fullmatch(r"[1-9]\d{0,4}", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"0?\.\d+|[\d.]+%", text, re.ASCII) and 0 < fraction(text) < 1:
        return fraction(text)
    raise ValueError(f"'{text}' is neither a number of pixels nor a fraction between 0 and 1")


def parse_floats(text: str) -> tuple[float, ...]:
    """``0.485,0.456,0.406``: one number for each channel."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"'{text}' is not a list of numbers such as 0.485,0.456,0.406")
    return values


def parse_channels(text: str) -> int:
    """``1`` (grey) or ``3`` (RGB)."""
    if text not in ("1", "3"):
        raise ValueError(not_one_of(text, ("1", "3")))
    return int(text)


def _input_type(text: str) -> InputType:
    for known in get_args(InputType):
        if known == text:
            return known  # type: ignore[no-any-return]
    raise ValueError(not_one_of(text, get_args(InputType)))


InputSize = Annotated[
    int | Size | None,
    Setting(
        "Height and width of the network's input, in pixels.", metavar="N|HxW", parse=parse_size, title=_TITLE
    ),
]
Channels = Annotated[
    int | None,
    Setting("Channels of an image: 1 (grey) or 3 (RGB).", metavar="1|3", parse=parse_channels, title=_TITLE),
]


@dataclass(frozen=True)
class PreprocessOverrides(Config, title=_TITLE):
    """Preprocessing that the user asks for; None leaves it to the network and the data.

    Attributes:
        sample: what one is, where samples are no images; then nothing else is given.
    """

    input_size: InputSize = None
    resize: Annotated[
        int | Size | None,
        Setting(
            "Size that images are resized to: the short side, or exactly height and width.",
            metavar="N|HxW",
            parse=parse_resize,
        ),
    ] = None
    crop: Annotated[
        int | float | None,
        Setting(
            "Part of the centre that is kept: pixels after resizing, or a fraction before it.",
            metavar="N|FRACTION",
            parse=parse_crop,
        ),
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        Setting(
            "Mean of each channel, on the scale 0..1; it is subtracted.",
            metavar="X,X,X",
            parse=parse_floats,
            advanced=True,
        ),
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        Setting(
            "Standard deviation of each channel, which is divided by it.",
            metavar="X,X,X",
            parse=parse_floats,
            advanced=True,
        ),
    ] = None
    channels: Channels = None
    interpolation: Annotated[
        Interpolation | None,
        Setting("Interpolation of the resize.", choices=INTERPOLATIONS, advanced=True),
    ] = None
    sample: InputSpec | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    @property
    def size(self) -> Size | None:
        """``input_size`` as height and width."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    def with_shape(self, sample: InputSpec) -> "PreprocessOverrides":
        """The same with the shape of a sample; that of an image is its size and its channels."""
        if (form := as_image(sample)) is None:
            return replace(self, sample=sample)
        size, channels = form
        return replace(self, input_size=size, channels=channels)

    def conflicts_with(self, sample: InputSpec) -> Iterator[tuple[str, str]]:
        """Settings that may not be given next to the shape of a sample, each with the reason."""
        for field in fields(self):
            if getattr(self, field.name) is None:
                continue
            if field.name in ("input_size", "channels"):
                yield field.name, f"is a part of {option('input_shape')}; give one of the two"
            elif as_image(sample) is None:
                yield field.name, "is for images, which this is no shape of"

    def conflicts(self) -> Iterator[str]:
        """Values that no image could be processed with."""
        for name in ("input_size", "resize"):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple) else (value,)
            if value is not None and min(sides) <= 0:
                yield f"{option(name)}: {value!r} is not a size in pixels"
        in_pixels = isinstance(self.crop, int)
        if self.crop is not None and not (self.crop > 0 if in_pixels else 0 < self.crop < 1):
            yield f"{option('crop')}: {self.crop!r} is neither pixels nor a fraction below 1"
        if self.channels not in (None, 1, 3):
            yield f"{option('channels')}: {self.channels!r} channels: images are grey (1) or RGB (3)"
        for name in ("mean", "std"):
            values = getattr(self, name) or ()
            if not all(map(math.isfinite, values)):
                yield f"{option(name)}: every number must be finite"
            if values and len(values) not in (1, self.channels or len(values)):
                yield f"{option(name)}: {len(values)} numbers for {self.channels} channels"
        if min(self.std or (1,)) <= 0:
            yield f"{option('std')}: every number must be above 0"
