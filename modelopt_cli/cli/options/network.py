"""The network, the data, and the shape of a sample."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from modelopt_cli.cli.completion import architectures
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides, parse_inputs
from modelopt_cli.data.data_kinds import FORMS
from modelopt_cli.option_names import flag_of
from modelopt_cli.settings import CALIBRATION, Config, Setting
from modelopt_cli.tasks import TASKS, parse_task_text

_TITLE = PreprocessOverrides.title

Arch = Annotated[
    str | None,
    Setting(
        "Architecture: torchvision:NAME, timm:NAME, builtin:NAME, hf:FOLDER, FILE.py:CALLABLE or "
        "package.module:CALLABLE, with ?num_classes=10 and the like.",
        metavar="SPEC",
        default="recognised from the checkpoint",
        suggest=architectures,
        title=_TITLE,
    ),
]
InputShape = Annotated[
    tuple[str, ...],
    Setting(
        "Shape of one sample, without the batch: an image's, or 3x8x56x56, 128:int64 and the like; of "
        "several inputs image=3x64x64,ids=77:int64. May be repeated.",
        metavar="[NAME=]CxHxW|DxDx...[:TYPE]",
        title=_TITLE,
    ),
]
_calibration = partial(
    Setting,
    "Data to calibrate on, in any form that --data takes, or none: samples learned from batch norms.",
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
            f"Data to evaluate on: {FORMS}.",
            metavar="SPEC",
            shared=True,
        ),
    ] = None
    input_shape: InputShape = ()
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


def with_shape(reader: Reader, image: PreprocessOverrides, shapes: tuple[str, ...]) -> PreprocessOverrides:
    """The preprocessing with what ``--input-shape`` says of samples."""
    if not shapes:
        return image
    try:
        sample = parse_inputs(shapes)
    except ValueError as error:
        reader.check(False, "--input-shape", str(error))
        return image
    conflicts = list(image.conflicts_with(sample))
    for name, problem in conflicts:
        reader.check(False, flag_of(name), problem)
    return image if conflicts else image.with_shape(sample)
