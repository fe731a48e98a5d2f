"""Everything that training needs: opened data, a folder to be resumed from, the processes at work."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.api.choosing_task import BY_DEFAULT, ChosenTask
from modelopt_cli.api.request import Request
from modelopt_cli.data import Data, open_data
from modelopt_cli.data.source import Samples, name_of
from modelopt_cli.errors import ArtifactError, GateNotMet, UsageError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.input_batch import call
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.training import Training
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.run_folder import Run


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
    request: Request,
    identity: Mapping[str, Any],
    sample: InputSpec,
    labels: tuple[str, ...] | None = None,
    check: Callable[[Data], None] | None = None,
    adopt: bool = False,
    task: ChosenTask = BY_DEFAULT,
) -> Iterator[Trainer]:
    """Everything training needs; an error in here says how to resume, if that is possible.

    Args:
        request: the command, which asks for training; a dry run only estimates its time.
        identity: what else decides the result.
        sample: shape and preprocessing of a sample.
        labels: names of the network's classes, by which the data's are found; None takes those of the
            training data for the validation data, too.
        check: called with the training data before anything is written.
        adopt: whether the network is to learn the classes of the training data where they are others.
        task: what the network is for.

    Raises:
        DataError: the data cannot be used.
        UsageError: the folder holds a run that was begun otherwise, or that is not to be resumed.
    """
    asked, options, dry = request.training, request.options, request.dry_run
    assert asked is not None
    here = world(options.device)
    train = _labelled(asked.train, sample, request, task.spec, labels, adopt=adopt)
    val = None
    if asked.val is not None:
        own = train.names is None and train.class_names is not None
        names = train.class_names if own else labels
        val = _labelled(asked.val, sample, request, task.spec, names)
        if val.may_never_end:
            request.note(f"{val.name} has no length: every validation goes on until it ends, if it does")
    if check is not None:
        check(train)
    folder = asked.folder(request.output)
    about = {
        **identity,
        **asked.identity(),
        "seed": options.seed,
        "input": asdict(train.input),
        **task.history,
    }
    with Run(
        folder,
        identity=about,
        resume=asked.resume,
        force=request.force,
        board=asked.board,
        world=here,
        dry=dry,
    ) as run:
        training = Training(
            train=train,
            val=val,
            config=asked.config,
            run=None if dry else run,
            device=options.device,
            workers=options.workers,
            progress=request.progress,
            note=request.note,
            estimates=[] if dry else None,
            task=task.spec,
        )
        if dry:
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
                error.add_note(f"go on with the same command and {option('resume', True)} ({folder})")
            raise


def _labelled(
    spec: Samples,
    sample: InputSpec,
    request: Request,
    task: TaskSpec,
    labels: tuple[str, ...] | None,
    *,
    adopt: bool = False,
) -> Data:
    """Data whose labels are the network's, matched by name; with ``adopt`` its own where names are others."""
    opened = open_data(
        spec, input_spec=sample, overrides=request.preprocessing, seed=request.options.seed, labels=False
    )
    if adopt and opened.class_names is not None and not opened.has_classes(labels):
        if labels is not None:
            request.note(
                f"{name_of(spec)} has other classes than the checkpoint: they are learned in their own order"
            )
        labels = None
    opened = task.read_targets(opened, labels)
    for note in opened.notes:
        request.note(note)
    return opened


def names_of_classes(program: Program, train: Data) -> tuple[str, ...] | None:
    """The training data's class names, if there are as many as logits; where it has none, the network's."""
    names = train.class_names
    if names is None:
        return program.labels
    with evaluation_mode(program), torch.inference_mode():
        logits = CLASSIFY.find(call(program, zeros(program.input, 1)))
    return names if isinstance(logits, Tensor) and len(names) == logits.shape[-1] else None
