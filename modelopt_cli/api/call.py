"""One call of the Python API: what was given, in the form that commands take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from modelopt_cli import artifact
from modelopt_cli.api.given_models import Example, Workspace, example_like
from modelopt_cli.api.keywords import SHAPE, AnyPath, Batches, Given, Writing
from modelopt_cli.api.opening import overridden, untraced_note
from modelopt_cli.api.pipeline import execute
from modelopt_cli.api.request import Request, TrainingRequest
from modelopt_cli.api.result import Result
from modelopt_cli.api.shape_of_sounds import input_that_runs
from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.artifact.reader import open_artifact, program_in, tensors_in
from modelopt_cli.checkpoint import open_model
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.data.config import parse_inputs
from modelopt_cli.data.data_spec import shows_inputs
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.data.source import Samples
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvalOptions
from modelopt_cli.option_types import as_python, is_of_type
from modelopt_cli.program import Program
from modelopt_cli.training.config import FineTuneConfig


class Call:
    """One call of a verb: what was given, in the form that commands take.

    Attributes:
        configs: what was given, by the name of the config.
        space: where models in memory become files.
    """

    def __init__(self, configs: dict[str, Any], space: Workspace) -> None:
        self.configs, self.space = configs, space
        self.given: Given = configs["given"]
        self.options: EvalOptions = configs.get("options", EvalOptions())
        self.preprocessing = shaped(configs["preprocessing"], self.given.input_shape)
        self._samples: dict[int, Samples] = {}

    def note(self, line: str) -> None:
        """Say something worth knowing."""
        if self.given.on_note is not None:
            self.given.on_note(self.space.shown(line))

    def samples(self, data: Batches, name: str) -> Samples | None:
        """Data as commands take it; one object is one and the same, whatever it is given for."""
        if data is None:
            return None
        if id(data) not in self._samples:
            looked_at, limit = (
                getattr(self.configs.get("config"), "calibration_samples", None),
                self.options.limit,
            )
            most = {"calibration": looked_at, "data": limit and max(limit, looked_at or 0)}.get(name)
            self._samples[id(data)] = as_samples(data, name, most)
        return self._samples[id(data)]

    def tell(self) -> None:
        """Say what is worth knowing of the models that have become files."""
        for line in self.space.notes:
            self.note(line)

    def file(self, model: Any, data: Samples | None, name: str = "model") -> str | Path:
        """The file of a model, whose input the example says, or else the data."""
        return self.space.file(model, partial(self._example, data, model), name)

    def _example(self, data: Samples | None, model: Any) -> Example | None:
        return example_of(self.given.example_inputs, self.preprocessing, data, model)

    def measuring(self) -> dict[str, Any]:
        """The fields of ``request.Measuring``."""
        return {
            "arch": self.given.arch,
            "data": self.samples(self.given.data, "data"),
            "preprocessing": self.preprocessing,
            "options": self.options,
            "gates": self.configs["gates"],
            "on_note": self.note,
            "progress": self.given.progress,
            "task": self.given.task,
            "output_name": self.given.output_name,
        }

    def training(self) -> TrainingRequest | None:
        """The training that is asked for, if any.

        Raises:
            UsageError: an argument has no meaning without another.
        """
        config, files = self.configs["training"], self.configs["fitting"]
        if isinstance(config, TrainingRequest):
            return config
        train = self.samples(files.train, "train")
        if not config.epochs:
            for each in fields(files):
                if each.name != "train" and getattr(files, each.name) != each.default:
                    raise UsageError("has no meaning without epochs", where=each.name)
            return None
        if train is None:
            if isinstance(config, FineTuneConfig):
                raise UsageError("there is nothing to train on", where="epochs", hint="give train")
            return None
        return TrainingRequest(
            train=train,
            val=self.samples(files.val, "val"),
            config=config,
            run=path_of(files.run_dir),
            resume=files.resume,
            board=path_of(files.tensorboard),
        )

    def execute(self, command: str, model: Any, output: Any, named: str = "model", **more: Any) -> Result:
        """Do the work; without an output the file is a temporary one, from which the network is read.

        Args:
            command: as ``Request`` has it.
            model: to work on.
            output: the file to write, or None.
            named: the argument that is the model, for messages.
            more: further fields of ``Request``.
        """
        writing: Writing = self.configs["writing"]
        calibrating, fitting = self.configs.get("calibrating"), self.configs.get("fitting")
        calibration = (
            self.samples(calibrating.calibration, "calibration") if calibrating is not None else None
        )
        training = self.training() if fitting is not None else None
        train = self.samples(fitting.train, "train") if fitting is not None else None
        measuring = self.measuring()
        shown = next(filter(shows_inputs, (calibration, train, measuring["data"])), None)
        source = None if model is None else self.file(model, shown, named)
        self.tell()
        evaluate = writing.evaluate
        if evaluate is None:
            evaluate = bool(output is not None or measuring["data"] is not None or measuring["gates"])
        config = self.configs.get("config")
        default: Code = PLAIN_CODE if config is None else config.code
        path = self.space.new(command) if output is None else Path(output)
        self.space.share_code(source, path)
        with self.space.telling_why():
            result = execute(
                Request(
                    command=command,
                    source=source,
                    output=path,
                    config=config,
                    training=training,
                    calibration=calibration or train,
                    evaluate=evaluate,
                    code=writing.code or default,
                    force=writing.force,
                    dry_run=writing.dry_run,
                    **more,
                    **measuring,
                )
            )
        untraced = self.space.untraced or result.untraced
        why = [untraced_note(untraced)] if untraced else []  # for those who gave no on_note
        result = replace(
            result,
            evaluation=self.space.renamed(result.evaluation),
            notes=tuple(map(self.space.shown, [*why, *result.told, *result.notes])),
            untraced=untraced and self.space.shown(untraced),
        )
        if result.written is None:
            return result
        result = replace(result, content=content_of(path, self.given.arch), code=writing.code or default)
        return replace(result, written=None, scratch=None) if output is None else result


def example_of(
    batch: Any, preprocessing: PreprocessOverrides, data: Samples | None, model: nn.Module
) -> Example | None:
    """The input of a module, from the first of these that says it: an example, a shape, data."""
    if (example := example_like(batch)) is not None:
        return example
    sample = preprocessing.sample
    if sample is None and data is not None:
        opened = open_data(data, overrides=preprocessing, labels=False)
        if (runs := input_that_runs(opened, lambda: model)) != opened.input:
            opened = open_data(data, input_spec=runs, labels=False)
        return Example(opened.input, opened.name, next(opened.batches(2, limit=2))[0])
    sample = sample or overridden(None, preprocessing)
    return None if sample is None else Example(sample, "input_shape")


def weighted(teacher: Any) -> tuple[Any, float]:
    """A further teacher and the weight of its logits, which is 1 where none is given.

    Raises:
        UsageError: the weight is no number above 0.
    """
    if not isinstance(teacher, tuple | list):
        return teacher, 1.0
    model, weight = teacher if len(teacher) == 2 else (None, None)
    weight = as_python(weight)
    if not is_of_type(weight, float) or not 0 < weight < math.inf:
        hint = "give models, or pairs of a model and a weight above 0"
        raise UsageError("holds what is neither a model nor a pair", where="also", hint=hint)
    return model, float(weight)


def path_of(path: AnyPath | None) -> Path | None:
    """A path that may be left out."""
    return None if path is None else Path(path)


def content_of(path: Path, arch: str | None) -> Program | artifact.TensorFile:
    """The network in an artifact, built as ``arch`` says where it has parts alone; or its tensors."""
    with open_artifact(path) as opened:
        if opened.document.program is None:
            return tensors_in(opened)
        if opened.document.stands_alone:
            return program_in(opened)
    program = open_model(path, arch).program
    assert program is not None
    return program


def shaped(overrides: PreprocessOverrides, shape: Any) -> PreprocessOverrides:
    """The preprocessing with the shape of a sample, in any form in which Python takes one.

    Raises:
        UsageError: it is no shape, or says what another argument says.
    """
    if shape is None:
        return overrides
    try:
        sample = parse_inputs(_shape_texts(shape))
    except (TypeError, ValueError):
        raise UsageError(f"{shape!r} is no shape", where="input_shape", hint=SHAPE.hint) from None
    for name, problem in overrides.conflicts_with(sample):
        raise UsageError(problem, where=name)
    return overrides.with_shape(sample)


def _shape_texts(shape: Any) -> list[str]:
    """Shapes as on the command line: of a text, of sizes, of several of either, also by name."""
    if isinstance(shape, str):
        return [shape]
    if isinstance(shape, Mapping):
        return [f"{name}={text}" for name, each in shape.items() for text in _shape_texts(each)]
    if any(isinstance(each, str | Sequence) for each in shape):
        return [text for each in shape for text in _shape_texts(each)]
    return ["x".join(map(str, shape)) or "scalar"]
