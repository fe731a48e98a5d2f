"""The network, the data, and the shape of a sample."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides, parse_shape
from modelopt_cli.program.input_spec import InputType
from modelopt_cli.settings import CALIBRATION, Config, Setting
from modelopt_cli.tasks import TASKS, parse_task_text

Shape = tuple[tuple[int, ...], InputType]

_TITLE = PreprocessOverrides.title

Arch = Annotated[
    str | None,
    Setting(
        "Architecture: torchvision:NAME, timm:NAME, builtin:NAME, FILE.py:CALLABLE or "
        "package.module:CALLABLE, with ?num_classes=10 and the like.",
        metavar="SPEC",
        default="recognised from the checkpoint",
        title=_TITLE,
    ),
]
InputShape = Annotated[
    Shape | None,
    Setting(
        "Shape of one sample, without the batch: an image's, or 3x8x56x56, 128:int64 and the like.",
        metavar="CxHxW|DxDx...[:TYPE]",
        parse=parse_shape,
        title=_TITLE,
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


@dataclass(frozen=True)
class NetworkOptions(Config, title=_TITLE):
    """The network, and the data to evaluate it on."""

    arch: Arch = None
    data: Annotated[
        str | None,
        Setting(
            "Data to evaluate on: DIR (one folder for each class), csv:FILE, tar:PATTERN, parquet:PATTERN, "
            "idx:DIR, npz:FILE, torchvision:NAME@ROOT, FILE.py:CALLABLE, digits or synthetic:3x224x224.",
            metavar="SPEC",
            shared=True,
        ),
    ] = None
    input_shape: InputShape = None
    task: Annotated[
        str | None,
        Setting(
            f"Task of the network: {', '.join(TASKS)}, with ?key=value for its options.",
            metavar="TASK",
            parse=parse_task_text,
            default="what the file, the architecture or the data says, else classify",
        ),
    ] = None
    output_name: Annotated[
        str | None,
        Setting(
            "Output that is judged and learned, of a network with several.",
            metavar="NAME",
            default="logits, the only one, or the first",
            advanced=True,
        ),
    ] = None


def with_shape(reader: Reader, image: PreprocessOverrides, shape: Shape | None) -> PreprocessOverrides:
    """The preprocessing with what ``--input-shape`` says of samples; an image's is its size and channels."""
    if shape is None:
        return image
    sizes, dtype = shape
    for option, value in (("--input-size", image.input_size), ("--channels", image.channels)):
        reader.check(value is None, option, "is a part of --input-shape; give one of the two")
    if dtype == "float32" and len(sizes) == 3 and sizes[0] in (1, 3):
        return image if reader.wrong else replace(image, input_size=sizes[1:], channels=sizes[0])
    for name in ("resize", "crop", "interpolation", "mean", "std"):
        fine = getattr(image, name) is None
        reader.check(fine, f"--{name}", "is for images, which this is no shape of")
    return replace(image, shape=sizes, dtype=dtype)
