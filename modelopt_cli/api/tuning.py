"""What training is given on behalf of a verb: its data, and the folder it can be resumed from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.data.spec import same_samples
from modelopt_cli.errors import ArtifactError, GateNotMet, UsageError
from modelopt_cli.measure import EvalOptions, StageProgress
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.settings import option
from modelopt_cli.training import TrainConfig, Training
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.run import METRICS, Run, would_own


@dataclass(frozen=True)
class TrainingRequest:
    """What to train on, how, and where to keep what an interrupted run needs.

    Attributes:
        train: spec of the training data.
        val: spec of the data to choose the best weights by; without it, ``config.val_fraction`` counts.
        config: how to train.
        run: folder of the log and of the state of an interrupted run; None puts it beside the output, with
            ``.run`` in place of its suffix.
        resume: go on with an interrupted run, or start if there is none.
        board: folder for TensorBoard, or None.
    """

    train: str
    val: str | None = None
    config: TrainConfig = field(default_factory=TrainConfig)
    run: Path | None = None
    resume: bool = False
    board: Path | None = None

    def folder(self, output: str | Path) -> Path:
        """Where the run keeps its files."""
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

    def require_fair(self, data: str | None) -> None:
        """Refuse to choose weights by what the result is judged on.

        Raises:
            UsageError: ``val`` is ``data``, or is given beside ``config.val_fraction``.
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
        """What a resumed run must have in common with the interrupted one."""
        return {"train": self.train, "val": self.val, "training": self.config.as_dict()}


@dataclass(frozen=True)
class Surroundings:
    """What a verb was given beside its source, its output and what to do.

    Attributes:
        overrides: preprocessing the user wants instead of the implied one.
        options: seed, device, workers.
        force: start over, whatever the run's folder holds.
        progress: called with the stage, what is done and the total.
        dry: forecast training, and write nothing.
        on_note: called with one line for each thing worth knowing.
    """

    overrides: PreprocessOverrides | None
    options: EvalOptions
    force: bool
    progress: StageProgress | None
    dry: bool = False
    on_note: Callable[[str], None] | None = None

    def note(self, line: str) -> None:
        """Say something worth knowing."""
        if self.on_note is not None:
            self.on_note(line)


@dataclass(frozen=True)
class Trainer:
    """Opened data, a folder that is held, and the processes at work.

    Attributes:
        training: what ``training.fit`` and the methods take.
        run: its folder.
        world: the processes.
    """

    training: Training
    run: Run
    world: World


@contextmanager
def trainer(
    request: TrainingRequest,
    output: str | Path,
    identity: Mapping[str, Any],
    input: InputSpec,
    how: Surroundings,
    labels: tuple[str, ...] | None = None,
    check: Callable[[Data], None] | None = None,
    adopt: bool = False,
) -> Iterator[Trainer]:
    """Everything training needs; an error in here says how to resume, if that is possible.

    Args:
        request: what the user asked for.
        output: the file to be written, which names the folder.
        identity: what else decides the result.
        input: what a sample looks like.
        how: the rest.
        labels: names of the network's classes, by which the data's are found; None takes those of the
            training data for the validation data, too.
        check: called with the training data before anything is written.
        adopt: whether the network is to learn the classes of the training data where they are others.

    Raises:
        DataError: the data cannot be used.
        UsageError: the folder holds a run that was begun otherwise, or that is not to be resumed.
    """
    here = world(how.options.device)
    train = _labelled(request.train, input, how, labels, adopt=adopt)
    val = None
    if request.val is not None:
        val = _labelled(request.val, input, how, labels if train.names is not None else train.class_names)
    if check is not None:
        check(train)
    folder = request.folder(output)
    about = {**identity, **request.identity(), "seed": how.options.seed, "input": asdict(train.input)}
    with Run(
        folder,
        identity=about,
        resume=request.resume,
        force=how.force,
        board=request.board,
        world=here,
        dry=how.dry,
    ) as run:
        training = Training(
            train=train,
            val=val,
            config=request.config,
            run=None if how.dry else run,
            device=how.options.device,
            workers=how.options.workers,
            progress=how.progress,
            note=how.note,
            forecasts=[] if how.dry else None,
        )
        if how.dry:
            yield Trainer(training, run, here)
            return
        resumed = run.interrupted
        try:
            yield Trainer(training, run, here)
        except (GateNotMet, UsageError):  # would end the resumed run, too
            if not resumed:  # what an earlier command left is not ours to delete
                run.discard()
            raise
        except ArtifactError:  # a state that cannot be used, for which resuming is no help
            raise
        except BaseException as error:  # Ctrl-C and SIGTERM included
            if run.interrupted:
                error.add_note(f"go on with the same command and --resume ({folder})")
            raise


def _labelled(
    spec: str, input: InputSpec, how: Surroundings, labels: tuple[str, ...] | None, *, adopt: bool = False
) -> Data:
    """Data whose labels are the network's, matched by name; with ``adopt`` its own where names are others."""
    opened = open_data(spec, input=input, overrides=how.overrides, seed=how.options.seed)
    if adopt and not opened.has_classes(labels):
        if labels is not None and opened.class_names is not None:
            how.note(f"{spec} has other classes than the checkpoint: they are learned in their own order")
        labels = None
    opened = opened.with_labels(labels)
    for note in opened.notes:
        how.note(note)
    return opened


def names_of_classes(program: Program, train: Data) -> tuple[str, ...] | None:
    """The training data's class names, if there are as many as logits; where it has none, the network's."""
    names = train.class_names
    if names is None:
        return program.labels
    with evaluation_mode(program), torch.inference_mode():
        logits = program(zeros(program.input, 1))
    return names if isinstance(logits, Tensor) and len(names) == logits.shape[-1] else None
