"""Which network it is, which data to use, and how an image becomes its input."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, cast, get_args

import typer

from modelopt_cli.cli.values import (
    InputType,
    Reader,
    parse_choice,
    parse_crop,
    parse_floats,
    parse_resize,
    parse_shape,
    parse_size,
)
from modelopt_cli.settings import CALIBRATION, Setting

Interpolation = Literal["nearest", "bilinear", "bicubic"]

_input = partial(typer.Option, rich_help_panel="Network and data")

Arch = Annotated[
    str | None,
    _input(
        metavar="SPEC",
        help="torchvision:NAME, timm:NAME, builtin:NAME, FILE.py:CALLABLE or package.module:CALLABLE, "
        "with ?num_classes=10 and the like; left out, it is recognised from the checkpoint.",
    ),
]
_calibration = partial(
    Setting,
    "Data to calibrate on, in any form that --data takes.",
    metavar="SPEC",
    older=("--calib",),
    title=CALIBRATION,
)
Calibration = Annotated[str | None, _calibration(default="that of --data")]
CalibrationOrTrain = Annotated[str | None, _calibration(default="that of --train, else of --data")]
InputSize = Annotated[
    str | None, _input(metavar="N|HxW", help="Height and width of the network's input, in pixels.")
]
InputShape = Annotated[
    str | None,
    _input(
        metavar="CxHxW|DxDx...[:TYPE]",
        help="Shape of one sample, without the batch: an image's, or 3x8x56x56, 128:int64 and the like.",
    ),
]
Channels = Annotated[str | None, _input(metavar="1|3", help="Grey or colour.")]


@dataclass(frozen=True)
class InputValues:
    """What was said about the input on the command line; None where nothing was.

    The fields are those of ``data.PreprocessOverrides``, which cannot be imported without torch.
    """

    input_size: tuple[int, int] | None
    resize: int | tuple[int, int] | None
    crop: int | float | None
    interpolation: Interpolation | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channels: int | None
    shape: tuple[int, ...] | None = None
    dtype: InputType | None = None

    def given(self) -> dict[str, Any]:
        """Only what was said, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class NetworkOptions:
    """Which network it is, which data to use, and how an image becomes its input."""

    arch: Arch = None
    data: Annotated[
        str | None,
        _input(
            metavar="SPEC",
            help="DIR (one folder for each class), csv:FILE, tar:PATTERN, parquet:PATTERN, idx:DIR, "
            "npz:FILE, torchvision:NAME@ROOT, FILE.py:CALLABLE, digits or synthetic:3x224x224.",
        ),
    ] = None
    input_size: InputSize = None
    resize: Annotated[
        str | None,
        _input(metavar="N|HxW", help="Resize images to this short side, or to exactly this size."),
    ] = None
    crop: Annotated[
        str | None,
        _input(metavar="N|FRACTION", help="Crop the centre: pixels after resizing, or a fraction before it."),
    ] = None
    interpolation: Annotated[
        str | None,
        _input(metavar="|".join(get_args(Interpolation)), help="How to resample."),
    ] = None
    mean: Annotated[
        str | None,
        _input(metavar="X,X,X", help="Subtract this from each channel, on the scale 0..1."),
    ] = None
    std: Annotated[
        str | None,
        _input(metavar="X,X,X", help="Then divide each channel by this."),
    ] = None
    channels: Channels = None
    input_shape: InputShape = None

    def read(self, reader: Reader) -> InputValues:
        """The typed values of the options about samples; an image's shape is its size and its channels."""
        image = self._read_image(reader)
        found = reader.read("--input-shape", self.input_shape, parse_shape)
        if found is None:
            return image
        shape, dtype = found
        for option, value in (("--input-size", self.input_size), ("--channels", self.channels)):
            reader.check(value is None, option, "is a part of --input-shape; give one of the two")
        if dtype == "float32" and len(shape) == 3 and shape[0] in (1, 3):
            return replace(image, input_size=shape[1:], channels=shape[0])
        for option in ("resize", "crop", "interpolation", "mean", "std"):
            reader.check(
                getattr(self, option) is None, f"--{option}", "is for images, which this is no shape of"
            )
        return replace(image, shape=shape, dtype=dtype)

    def _read_image(self, reader: Reader) -> InputValues:
        channels = reader.read("--channels", self.channels, lambda text: parse_choice(text, ("1", "3")))
        values = InputValues(
            input_size=reader.read("--input-size", self.input_size, parse_size),
            resize=reader.read("--resize", self.resize, parse_resize),
            crop=reader.read("--crop", self.crop, parse_crop),
            interpolation=reader.read("--interpolation", self.interpolation, _interpolation),
            mean=reader.read("--mean", self.mean, parse_floats),
            std=reader.read("--std", self.std, parse_floats),
            channels=int(channels) if channels else None,
        )
        reader.check(min(values.std or (1,)) > 0, "--std", "every number must be above 0")
        for option, numbers in (("--mean", values.mean), ("--std", values.std)):
            fits = len(numbers or (0,)) in (1, values.channels or len(numbers or ()))
            reader.check(fits, option, f"{len(numbers or ())} numbers for {values.channels} channels")
        return values


def _interpolation(text: str) -> Interpolation:
    return cast(Interpolation, parse_choice(text, get_args(Interpolation)))
