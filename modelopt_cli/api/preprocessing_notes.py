"""Notes on the preprocessing in force, and where it comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelopt_cli.checkpoint import Opened, resolve
from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.program import InputSpec
from modelopt_cli.program.input_spec import INPUT_TYPE
from modelopt_cli.settings import option

_NOTHING = PreprocessOverrides()
PREPROCESSING = "preprocessing"
"""Key in the history of a preprocessing that nobody gave or recorded."""


def preprocessing_options() -> str:
    """The options of preprocessing that are easily mistaken, for a message."""
    return ", ".join(map(option, ("input_size", "resize", "crop", "mean", "std")))


def describe_input(spec: InputSpec) -> str:
    """Shape and preprocessing as one line; of several inputs their names, shapes and types."""
    shape = "x".join(map(str, spec.shape))
    if spec.others:
        return ", ".join(f"{each.name} {_shape_and_type(each)}" for each in spec.tensors)
    preprocess = spec.preprocess
    if preprocess is None:
        return shape
    steps = [f"crop {preprocess.crop:g} of the short side"] if isinstance(preprocess.crop, float) else []
    if preprocess.resize is not None:
        size = (
            preprocess.resize if isinstance(preprocess.resize, int) else "x".join(map(str, preprocess.resize))
        )
        steps.append(f"resize {size} {preprocess.interpolation}")
    if isinstance(preprocess.crop, int):
        steps.append(f"crop {preprocess.crop}")
    mean, std = (",".join(f"{value:g}" for value in values) for values in (preprocess.mean, preprocess.std))
    return ", ".join([shape, *steps, f"mean {mean}", f"std {std}"])


def _shape_and_type(spec: InputSpec) -> str:
    shape = "x".join(map(str, spec.shape)) or "scalar"
    return shape if spec.dtype == INPUT_TYPE else f"{shape}:{spec.dtype}"


def published_for(opened: Opened, preprocessing: PreprocessOverrides | None = None) -> str | None:
    """The architecture from whose publication the input is taken, all or what was not given, or None."""
    implied = _implied_by(opened, preprocessing)
    return implied.spec if implied is not None and implied.published else None


def _implied_by(opened: Opened, preprocessing: PreprocessOverrides | None) -> Architecture | None:
    """The architecture that says what the input is, where the file does not."""
    architecture = opened.architecture
    if opened.is_artifact or architecture is None:
        return None
    implied = resolve(architecture.spec).input
    return architecture if implied is not None and (preprocessing or architecture.input == implied) else None


def origin(
    opened: Opened, preprocessing: PreprocessOverrides | None, recorded_in: str | Path | None = None
) -> str:
    """The source of the input: the user, the file, a publication, an architecture, another file or the data.

    Args:
        opened: the model whose input it is.
        preprocessing: what the user said.
        recorded_in: the other file whose record was taken where nothing else says it, if there is one.
    """
    names = [name for name, value in vars(preprocessing or _NOTHING).items() if value is not None]
    if "sample" in names:
        return f"{option('input_shape')} given"
    options = [option(name) for name in names]
    base = _unless_given(opened, preprocessing, recorded_in)
    return f"{', '.join(options)} given, the rest {base}" if options else base


def _unless_given(
    opened: Opened, preprocessing: PreprocessOverrides | None, recorded_in: str | Path | None
) -> str:
    if opened.is_artifact:
        history = opened.program.history if opened.program else ()
        assumed = next(filter(None, map(_assumed, history)), None)
        return f"recorded, where it was assumed as {assumed}" if assumed else "recorded"
    implied = _implied_by(opened, preprocessing)
    if implied is None and recorded_in is not None:
        return f"recorded in {recorded_in}"
    if implied is None and opened.program is not None and opened.architecture is None:
        return "of the exported graph"
    if implied is None:
        return "by default" if preprocessing else "of the data"
    return implied.source_of_input


def _assumed(entry: Mapping[str, Any]) -> str | None:
    assumed = entry.get(PREPROCESSING)
    return assumed if isinstance(assumed, str) else None


def input_history(opened: Opened, preprocessing: PreprocessOverrides | None) -> dict[str, str]:
    """Entry in the history on a preprocessing that nobody gave or recorded; empty where there is none."""
    spec = published_for(opened, preprocessing)
    return {} if spec is None else {PREPROCESSING: f"published for {spec}"}


def assumptions(opened: Opened, preprocessing: PreprocessOverrides | None) -> list[str]:
    """Lines on what was assumed of a checkpoint's input because its file does not say.

    A fresh network has been trained with no other, so of it only what was published is said.
    """
    architecture, trained = _implied_by(opened, preprocessing), bool(opened.source_sha256)
    if architecture is None or architecture.input is None or not (trained or architecture.published):
        return []
    lines = [f"input {describe_input(architecture.input)} ({origin(opened, preprocessing)})"]
    classes, usual = architecture.num_classes, architecture.published_classes
    if trained and architecture.published and classes not in (None, usual):
        lines.append(
            f"its {classes} classes are not the {usual} it was published with: "
            f"make sure that {preprocessing_options()} are as in its training"
        )
    return [*lines, *architecture.assumed]
