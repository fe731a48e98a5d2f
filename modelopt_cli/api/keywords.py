"""Keyword arguments of the Python API: each with its type, one line of help, and what to give instead."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Annotated, Any

import torch
from torch import Tensor

from modelopt_cli.api.given_models import EXAMPLE_HINT, Model
from modelopt_cli.api.request import Note
from modelopt_cli.api.signatures import Instead
from modelopt_cli.artifact.coding import Code
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.measure import EvalOptions, Gates
from modelopt_cli.measure.evaluated_model import StageProgress
from modelopt_cli.tasks import TASKS

AnyPath = str | PathLike[str]
AnyDevice = str | torch.device
Output = AnyPath | None
ARCH = Instead(
    "name it in a text, such as 'torchvision:resnet18' or 'net.py:make', or hand in the network itself"
)
EXAMPLE = Instead(EXAMPLE_HINT)
TASK = Instead(f"name it in a text, one of {', '.join(TASKS)}")
SHAPE = Instead("give the shape of a sample, such as (3, 224, 224), or several by the inputs' names")
Batches = Any
"""A data spec, a Dataset, a DataLoader, or an iterable of batches; see ``data.in_memory.as_samples``."""


@dataclass(frozen=True)
class Given:
    """Keyword arguments of every verb."""

    data: Annotated[
        Batches,
        "Samples to evaluate on, not to train or choose by: batches (N, ...), a Dataset, a loader or a spec.",
    ] = None
    example_inputs: Annotated[
        Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None,
        "One batch (N, ...), or several by place or by name: what a module takes where no data say so.",
        EXAMPLE,
    ] = None
    input_shape: Annotated[
        tuple[Any, ...] | str | Mapping[str, Any] | None,
        "Shape of one sample, without the batch, such as (3, 224, 224); or of several inputs, by name.",
        SHAPE,
    ] = None
    arch: Annotated[str | None, "Architecture of a checkpoint that is not recognised.", ARCH] = None
    task: Annotated[str | None, "Task of the network, as on the command line.", TASK] = None
    output_name: Annotated[str | None, "Output that is judged and learned, of a network with several."] = None
    on_note: Annotated[Note | None, "Called with one line for each thing worth knowing."] = None
    progress: Annotated[StageProgress | None, "Called with the stage, what is done and the total."] = None


@dataclass(frozen=True)
class Writing:
    """Keyword arguments of verbs that make a network."""

    evaluate: Annotated[bool | None, "Measure the result; by default if there is an output or data."] = None
    code: Annotated[Code | None, "Coding of the file; by default the method's own."] = None
    force: Annotated[bool, "Replace an existing output."] = False
    dry_run: Annotated[bool, "Check everything and plan; train, write and measure nothing."] = False


@dataclass(frozen=True)
class Calibrating:
    """Keyword arguments of verbs that look at samples."""

    calibration: Annotated[Batches, "Samples to calibrate on; by default train, else data."] = None


@dataclass(frozen=True)
class Fitting:
    """Keyword arguments of verbs that train."""

    train: Annotated[Batches, "Labelled samples to train on, in any form of data."] = None
    val: Annotated[Batches, "Data by which the best weights are chosen; never the test data."] = None
    run_dir: Annotated[AnyPath | None, "Folder of the log and of the state of an interrupted run."] = None
    resume: Annotated[bool, "Go on with an interrupted run, or start if there is none."] = False
    tensorboard: Annotated[AnyPath | None, "Folder of a log for TensorBoard."] = None


@dataclass(frozen=True)
class Learning:
    """Keyword arguments of ``distill`` alone."""

    student: Annotated[Any, "Network that learns: a model, an architecture, width:F or depth:F."] = None
    student_arch: Annotated[str | None, "Architecture of a student's checkpoint.", ARCH] = None
    also: Annotated[Model | Iterable[Any], "More teachers: models, or pairs of a model and its weight."] = ()
    resize_for_teacher: Annotated[bool, "Resize images for a teacher of another input size."] = False
    compare_scratch: Annotated[bool, "Train the student without a teacher, too."] = False
    cache: Annotated[AnyPath | None, "Folder of the teachers' logits."] = None


MEASURING: dict[str, type[Any]] = {
    "options": EvalOptions,
    "gates": Gates,
    "preprocessing": PreprocessOverrides,
    "given": Given,
}
HIDDEN = ("sample", "judged", "baseline")
