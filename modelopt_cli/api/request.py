"""Everything that a command is asked, as one frozen value."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.data.data_spec import same_samples, shows_inputs
from modelopt_cli.data.source import Samples, name_of
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvalOptions, Gates, StageProgress
from modelopt_cli.settings import option
from modelopt_cli.training import TrainConfig
from modelopt_cli.training.run_folder import METRICS, would_own

Note = Callable[[str], None]
"""Called with one line that is worth knowing."""


@dataclass(frozen=True)
class TrainingRequest:
    """Training data, settings of training, and the folder for what an interrupted run needs.

    Attributes:
        train: spec of the training data.
        val: spec of the data to choose the best weights by; without it, ``config.val_fraction`` counts.
        config: how to train.
        run: folder of the log and of the state of an interrupted run; None puts it next to the output, with
            ``.run`` in place of its suffix.
        resume: go on with an interrupted run, or start if there is none.
        board: folder for TensorBoard, or None.
    """

    train: Samples
    val: Samples | None = None
    config: TrainConfig = field(default_factory=TrainConfig)
    run: Path | None = None
    resume: bool = False
    board: Path | None = None

    def folder(self, output: str | Path) -> Path:
        """Folder of the run that writes ``output``."""
        return self.run if self.run is not None else Path(output).with_suffix(".run")

    def log(self, output: str | Path) -> Path:
        """The log of the run, which stays when the rest of it goes."""
        return self.folder(output) / METRICS

    def require_apart(self, output: str | Path, sources: Iterable[str | Path]) -> None:
        """Refuse to read or write what the run would take for its own: it replaces and deletes its files.

        Raises:
            UsageError: a path is that of the run's folder or of one of its files.
        """
        folder = self.folder(output)
        for path in (output, *sources):
            if would_own(folder, Path(path)):
                hint = f"give the run another folder with {option('run_dir')}"
                raise UsageError(
                    f"is a name that the run in {folder} uses itself", where=str(path), hint=hint
                )

    def require_fair(self, data: Samples | None) -> None:
        """Refuse to choose weights by what the result is judged on.

        Raises:
            UsageError: ``val`` is ``data``, or is given next to ``config.val_fraction``.
            DataError: one of them is malformed.
        """
        if self.val is not None and data is not None and same_samples(self.val, data):
            hint = f"hold out training data with {option('val_fraction')}"
            raise UsageError(
                "is what the result is judged on, and may not choose it", where=option("val"), hint=hint
            )
        if self.val is not None and self.config.val_fraction:
            raise UsageError(f"cannot be given together with {option('val')}", where=option("val_fraction"))

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must have in common with the interrupted one."""
        return {"train": name_of(self.train), "val": name_of(self.val), "training": self.config.as_dict()}


@dataclass(frozen=True)
class Student:
    """The network that is to learn, and its further teachers.

    Attributes:
        spec: see ``students.open_student``.
        arch: the architecture of a checkpoint that is not recognised.
        also: more teachers, each with the weight of its logits; that of the first is 1.
        resize_for_teacher: resize images for a teacher of another input size.
        compare_scratch: train the same student without a teacher, too, for comparison.
        cache: folder to keep the teachers' logits in, for later epochs and other students, or None.
    """

    spec: str
    arch: str | None = None
    also: Sequence[tuple[str | Path, float]] = ()
    resize_for_teacher: bool = False
    compare_scratch: bool = False
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Conditions under which models are opened and measured.

    Attributes:
        arch: the architecture of those that are not recognised.
        data: spec of the data to evaluate on, and never to train or choose by; without it, accuracy is not
            measured.
        preprocessing: what the user says about the input, instead of what is recorded or implied.
        options: how to measure, and the seed, threads, device and workers.
        task: what the models are for, as ``--task`` says it; None leaves it to files, architectures and data.
        output_name: the output that is judged and learned, where the task's usual one is not meant.
        gates: limits to apply to the result; see ``measure.gates.require``.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.
    """

    arch: str | None = None
    data: Samples | None = None
    preprocessing: PreprocessOverrides | None = None
    options: EvalOptions = field(default_factory=EvalOptions)
    gates: Gates = field(default_factory=Gates)
    on_note: Note | None = None
    progress: StageProgress | None = None
    task: str | None = None
    output_name: str | None = None

    def note(self, line: str) -> None:
        """Say something worth knowing."""
        if self.on_note is not None:
            self.on_note(line)

    def noting_once(self) -> Self:
        """The same, with no note said twice; data that is opened twice has the same notes."""
        said: set[str] = set()

        def note(line: str) -> None:
            if self.on_note is not None and line not in said:
                said.add(line)
                self.on_note(line)

        return replace(self, on_note=note)


@dataclass(frozen=True, kw_only=True)
class EvalRequest(Measuring):
    """Models to measure side by side.

    Attributes:
        paths: files, in the order of the table; ``options.baseline`` is an index into them.
    """

    paths: Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class Request(Measuring):
    """One command: a model, the method, and how the result is written and measured.

    Attributes:
        command: ``train``, or a key of ``methods.method_table.METHODS``.
        source: a checkpoint or an artifact of any kind: the model, or the teacher of ``distill``. None, for
            ``train`` alone, starts from random weights drawn from ``options.seed``.
        output: the file to write; an existing one only with ``force``.
        config: an instance of the method's config; None for ``train``.
        training: data and settings of training; None does not train.
        student: the network that learns, for ``distill`` alone.
        calibration: spec of the data that the method looks at; by default the training data, else ``data``.
        evaluate: measure the result next to the source.
        code: how the file is written, a key of ``artifact.coding.CODINGS``; a target in bytes counts that.
        force: replace an existing output, and start over where an interrupted run is found.
        dry_run: check everything and plan; train, write and measure nothing.
    """

    command: str
    source: str | Path | None
    output: str | Path
    config: Any = None
    training: TrainingRequest | None = None
    student: Student | None = None
    calibration: Samples | None = None
    evaluate: bool = True
    code: Code = PLAIN_CODE
    force: bool = False
    dry_run: bool = False

    @property
    def samples(self) -> Samples | None:
        """Spec of the data that the method looks at."""
        return self.calibration or (self.training.train if self.training is not None else self.data)

    @property
    def trained_on(self) -> Samples | None:
        """Spec of the data that the result learns from; None where nothing is trained."""
        return self.training.train if self.training is not None else None

    @property
    def shown(self) -> Samples | None:
        """Spec of data that show what a sample looks like."""
        return next(filter(shows_inputs, (self.samples, self.data)), None)
