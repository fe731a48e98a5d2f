"""The commands as functions on paths, modules and Programs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from modelopt_cli import artifact
from modelopt_cli.api.arguments import configured, naming_arguments
from modelopt_cli.api.evaluating import evaluate_files
from modelopt_cli.api.given_models import Workspace, sample_like
from modelopt_cli.api.opening import overridden
from modelopt_cli.api.pipeline import execute
from modelopt_cli.api.request import EvalRequest, Note, Request, Student, TrainingRequest
from modelopt_cli.api.result import Measured, Result
from modelopt_cli.artifact.coding import Code
from modelopt_cli.artifact.reader import open_artifact, program_in, tensors_in
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.data.source import Samples
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvalOptions, Gates
from modelopt_cli.measure.evaluated_model import StageProgress
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.table import METHODS
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.training.config import FineTuneConfig, TrainConfig

Model = str | PathLike[str] | nn.Module
"""A checkpoint or artifact, a network, or a Program."""
Output = str | PathLike[str] | None
Batches = Any
"""A data spec, a Dataset, a DataLoader, or an iterable of batches; see ``data.in_memory.as_samples``."""


@dataclass(frozen=True)
class Given:
    """Keyword arguments of every verb."""

    data: Annotated[Batches, "Data to evaluate on, and never to train or choose by."] = None
    example_inputs: Annotated[Any, "One batch: what a module takes, where neither it nor data say so."] = None
    input_shape: Annotated[tuple[int, ...] | None, "Shape of one sample, without the batch."] = None
    arch: Annotated[str | None, "Architecture of a checkpoint that is not recognised."] = None
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

    train: Annotated[Batches, "Data to train on."] = None
    val: Annotated[Batches, "Data by which the best weights are chosen; never the test data."] = None
    run_dir: Annotated[Path | None, "Folder of the log and of the state of an interrupted run."] = None
    resume: Annotated[bool, "Go on with an interrupted run, or start if there is none."] = False
    tensorboard: Annotated[Path | None, "Folder of a log for TensorBoard."] = None


@dataclass(frozen=True)
class Learning:
    """Keyword arguments of ``distill`` alone."""

    student: Annotated[Any, "Network that learns: a model, an architecture, width:F or depth:F."] = None
    student_arch: Annotated[str | None, "Architecture of a student's checkpoint."] = None
    also: Annotated[Sequence[Any], "More teachers: models, or pairs of a model and its weight."] = ()
    resize_for_teacher: Annotated[bool, "Resize images for a teacher of another input size."] = False
    compare_scratch: Annotated[bool, "Train the student without a teacher, too."] = False
    cache: Annotated[Path | None, "Folder of the teachers' logits."] = None


_MEASURING: dict[str, type[Any]] = {
    "options": EvalOptions,
    "gates": Gates,
    "preprocessing": PreprocessOverrides,
    "given": Given,
}
_HIDDEN = ("shape", "dtype", "judged")


class _Call:
    """One call of a verb: what was given, in the form that commands take.

    Attributes:
        configs: what was given, by the name of the config.
        space: where models in memory become files.
    """

    def __init__(self, configs: dict[str, Any], space: Workspace) -> None:
        self.configs, self.space = configs, space
        self.given: Given = configs["given"]
        self.options: EvalOptions = configs["options"]
        self.preprocessing = _shaped(configs["preprocessing"], self.given.input_shape)
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
            most = getattr(self.configs.get("config"), "calibration_samples", None)
            self._samples[id(data)] = as_samples(data, name, most if name == "calibration" else None)
        return self._samples[id(data)]

    def file(self, model: Any, data: Samples | None, name: str = "model") -> str | Path:
        """The file of a model, whose input the example says, or else the data."""

        def sample() -> InputSpec | None:
            example = sample_like(self.given.example_inputs) or self.preprocessing.sample
            if example is not None or data is None:
                return example or overridden(None, self.preprocessing)
            return open_data(data, overrides=self.preprocessing, labels=False).input

        return self.space.file(model, sample, name)

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
        }

    def training(self) -> TrainingRequest | None:
        """The training that is asked for, if any."""
        config, files = self.configs["training"], self.configs["fitting"]
        if isinstance(config, TrainingRequest):
            return config
        train = self.samples(files.train, "train")
        if train is None or not config.epochs:
            if config.epochs and isinstance(config, FineTuneConfig):
                raise UsageError("there is nothing to train on", where="epochs", hint="give train")
            return None
        return TrainingRequest(
            train=train,
            val=self.samples(files.val, "val"),
            config=config,
            run=files.run_dir,
            resume=files.resume,
            board=files.tensorboard,
        )

    def execute(self, command: str, model: Any, output: Any, **more: Any) -> Result:
        """Do the work; without an output the file is a temporary one, from which the network is read."""
        if output is not None and not isinstance(output, str | PathLike):
            raise UsageError(f"is of type {type(output).__name__}, no path", where="output")
        writing: Writing = self.configs["writing"]
        calibrating, fitting = self.configs.get("calibrating"), self.configs.get("fitting")
        calibration = (
            self.samples(calibrating.calibration, "calibration") if calibrating is not None else None
        )
        training = self.training() if fitting is not None else None
        train = self.samples(fitting.train, "train") if fitting is not None else None
        measuring = self.measuring()
        shown = calibration or train or measuring["data"]
        source = None if model is None else self.file(model, shown)
        for line in self.space.notes:
            self.note(line)
        evaluate = writing.evaluate
        if evaluate is None:
            evaluate = bool(output is not None or measuring["data"] is not None or measuring["gates"])
        config = self.configs.get("config")
        default: Code = METHODS[command].code(config) if command in METHODS else "plain"
        path = self.space.new(command) if output is None else Path(output)
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
        result = replace(
            result,
            evaluation=self.space.renamed(result.evaluation),
            notes=tuple(map(self.space.shown, result.notes)),
        )
        if result.written is None:
            return result
        result = replace(result, content=content_of(path), code=writing.code or default)
        return replace(result, written=None, scratch=None) if output is None else result


@configured({"calibrating": Calibrating, "config": QuantizeConfig, "writing": Writing, **_MEASURING}, _HIDDEN)
def quantize(configs: dict[str, Any], model: Model, output: Output = None) -> Result:
    """Quantize a network.

    Args:
        model: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.
        NothingCompressed: not one layer could be quantized.

    Example:
        >>> result = mo.quantize(model, calibration=loader, scheme="int8")  # doctest: +SKIP
    """
    with Workspace() as space:
        return _Call(configs, space).execute("quantize", model, output)


_TUNED: dict[str, type[Any]] = {
    "training": FineTuneConfig,
    "fitting": Fitting,
    "writing": Writing,
    **_MEASURING,
}


@configured({"calibrating": Calibrating, "config": PruneConfig, **_TUNED}, _HIDDEN)
def prune(configs: dict[str, Any], model: Model, output: Output = None) -> Result:
    """Prune a network, and fine-tune it on the way where there are epochs.

    Args:
        model: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.
        GateNotMet: the target cannot be reached, or nothing can be pruned.

    Example:
        >>> result = mo.prune(model, flops=0.5, example_inputs=batch)  # doctest: +SKIP
    """
    with Workspace() as space:
        return _Call(configs, space).execute("prune", model, output)


@configured({"calibrating": Calibrating, "config": ShareConfig, **_TUNED}, _HIDDEN)
def share(configs: dict[str, Any], model: Model, output: Output = None) -> Result:
    """Cluster the weights of a network (palettization), and fine-tune it where there are epochs.

    Args:
        model: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.
        GateNotMet: the budget cannot be met, or nothing can be shared.

    Example:
        >>> result = mo.share(model, bits=4, example_inputs=batch)  # doctest: +SKIP
    """
    config, gates = configs["config"], configs["gates"]
    if config.max_drop is not None and configs["given"].data is not None and gates.max_drop is None:
        configs["gates"] = replace(gates, max_drop=config.max_drop)  # what was wanted is held against data
    with Workspace() as space:
        return _Call(configs, space).execute("share", model, output)


@configured(
    {
        "learning": Learning,
        "config": DistillConfig,
        "fitting": Fitting,
        "training": TrainConfig,
        "writing": Writing,
        **_MEASURING,
    },
    _HIDDEN,
)
def distill(configs: dict[str, Any], teacher: Model, output: Output = None) -> Result:
    """Teach a student what a teacher knows.

    Args:
        teacher: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the student.

    Returns:
        The result; ``result.program`` is the student, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: a model, the data or an option cannot be used.

    Example:
        >>> result = mo.distill(model, student="width:0.5", train=loader, epochs=5)  # doctest: +SKIP
    """
    learning: Learning = configs["learning"]
    with Workspace() as space:
        call = _Call(configs, space)
        student = learning.student
        if not isinstance(student, Student):
            train = call.samples(configs["fitting"].train, "train")
            also = [each if isinstance(each, tuple) else (each, 1.0) for each in learning.also]
            if student is None:
                raise UsageError(
                    "nothing says what is to learn", where="student", hint='give e.g. "width:0.5"'
                )
            if not isinstance(student, str):
                student = str(call.file(student, train, "student"))
            student = Student(
                student,
                learning.student_arch,
                [(call.file(model, train, "also"), weight) for model, weight in also],
                learning.resize_for_teacher,
                learning.compare_scratch,
                learning.cache,
            )
        return call.execute("distill", teacher, output, student=student)


@configured(
    {"fitting": Fitting, "training": TrainConfig, "writing": Writing, **_MEASURING},
    (*_HIDDEN, "code"),
)
def train(configs: dict[str, Any], model: Model | None = None, output: Output = None) -> Result:
    """Train a network, from scratch or from a checkpoint.

    Args:
        model: a path, an ``nn.Module`` or a Program, which is not changed; None starts from random weights of
            ``arch``.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.

    Example:
        >>> result = mo.train(arch="builtin:lenet5", train="digits?split=train", epochs=3)  # doctest: +SKIP
    """
    with Workspace() as space:
        return _Call(configs, space).execute("train", model, output)


@configured(_MEASURING, ("shape", "dtype"))
def evaluate(configs: dict[str, Any], models: Model | Sequence[Model]) -> Measured:
    """Measure networks side by side: size, accuracy and speed.

    Args:
        models: one or several paths, modules or Programs; the first is what the others are compared with,
            unless ``baseline`` is the index of another.

    Returns:
        The figures; ``str()`` of them is the table.

    Raises:
        InputError: a model or the data cannot be used.

    Example:
        >>> print(mo.evaluate(["base.safetensors", "int8.safetensors"], data="val/"))  # doctest: +SKIP
    """
    several = [models] if isinstance(models, str | PathLike | nn.Module) else list(models)
    with Workspace() as space:
        call = _Call(configs, space)
        measuring = call.measuring()
        paths = [call.file(model, measuring["data"], "models") for model in several]
        evaluation = space.renamed(evaluate_files(EvalRequest(paths=paths, **measuring)))
        assert evaluation is not None
        return evaluation


def save(
    model: Program | Result, path: str | PathLike[str], *, code: Code | None = None, force: bool = False
) -> artifact.Written:
    """Write a network as an artifact, which :func:`load` opens without anything else.

    Args:
        model: a Program, or the result of a verb.
        path: the file to write; an existing one only with ``force``.
        code: coding of the file; by default that of the method whose result it is, else ``plain``.
        force: replace an existing file.

    Returns:
        The path, length and SHA-256 of the file.

    Raises:
        UsageError: it is neither.
        OutputError: the path must not be written to.

    Example:
        >>> mo.save(result.program, "small.safetensors")  # doctest: +SKIP
    """
    with naming_arguments():
        content = model.content if isinstance(model, Result) else model
        default: Code = model.code if isinstance(model, Result) else "plain"
        path = Path(path)
        artifact.check_suffix(path)
        artifact.check_output(path, force)
        if isinstance(content, Program):
            return artifact.write_program(content, path, force=force, code=code or default)
        if isinstance(content, artifact.TensorFile):
            return artifact.write_tensors(
                content.state,
                content.encodings,
                path,
                history=content.history,
                arch=content.arch,
                input_spec=content.input,
                labels=content.labels,
                force=force,
                code=code or default,
            )
        hint = "quantize, prune, share or load it first"
        raise UsageError(f"is of type {type(model).__name__}, no Program", where="model", hint=hint)


def content_of(path: Path) -> Program | artifact.TensorFile:
    """The network in an artifact, or its tensors where it has none."""
    with open_artifact(path) as opened:
        return program_in(opened) if opened.document.program is not None else tensors_in(opened)


def _shaped(overrides: PreprocessOverrides, shape: Sequence[int] | None) -> PreprocessOverrides:
    """The preprocessing with the shape of a sample; that of an image is its size and its channels."""
    if shape is None:
        return overrides
    sizes = tuple(shape)
    if len(sizes) == 3 and sizes[0] in (1, 3):
        return replace(overrides, input_size=sizes[1:], channels=sizes[0])
    return replace(overrides, shape=sizes)
