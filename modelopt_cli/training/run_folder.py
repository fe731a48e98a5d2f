"""The folder in which a long command keeps what it needs to go on after an interruption.

    identity.json             what the command was asked to do
    state.safetensors         the training in progress, and of which stage
    stage-NAME.safetensors    the result of a finished stage
    metrics.jsonl             one line for each epoch
    lock                      held while a run is at work here

Everything but the metrics goes when the command has succeeded, and the metrics too when it has failed with
nothing to go on from. Only the main process writes.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from modelopt_cli.artifact import atomic_write, read_program, strictjson, write_program
from modelopt_cli.errors import ArtifactError, EnvironmentFailure, ModeloptError, OutputError, UsageError
from modelopt_cli.program import Program
from modelopt_cli.regular import read_regular, require_writable
from modelopt_cli.settings import option
from modelopt_cli.training import distributed
from modelopt_cli.training.distributed import World
from modelopt_cli.training.identity import differences
from modelopt_cli.training.lock import Lock
from modelopt_cli.training.log import MetricsLog, require_board
from modelopt_cli.training.state import State, read_state, write_state

METRICS = "metrics.jsonl"
_STAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FILES = re.compile(r"identity\.json|state\.safetensors|stage-.*\.safetensors|metrics\.jsonl|lock")


def would_own(folder: Path, path: Path) -> bool:
    """True if a run in ``folder`` would take ``path`` for the folder itself or for one of its own files."""
    folder, path = folder.resolve(), path.resolve()
    return path == folder or (path.parent == folder and _FILES.fullmatch(path.name) is not None)


class Run:
    """See the module. A context manager: leaving it lets go of the folder and keeps what can be resumed.

    Args:
        folder: is made if it does not exist; its parent must.
        identity: JSON-able; whatever decides the result: options, SHA-256 of the source, seed. A run is only
            ever resumed under the same one.
        resume: go on from what is there; with nothing there, just start.
        force: start over, and delete what is there.
        board: folder for TensorBoard, or None.
        world: the processes; the main one alone writes.
        dry: only check that all this is possible; nothing is made, written or held.

    Raises:
        UsageError: something is there and neither ``resume`` nor ``force`` is given, or it was begun under
            another identity.
        OutputError: another run is at work in the folder, or the folder is none.
        EnvironmentFailure: the folder may not be written to.

    Attributes:
        folder: as given.
        metrics: the JSONL file.
        log: what writes it; keeps nothing in a process that is not the main one.
        network: whose code calls the parts in the files of stages; None where those stand alone.
    """

    network: nn.Module | None = None

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        resume: bool,
        force: bool = False,
        board: Path | None = None,
        world: World | None = None,
        dry: bool = False,
    ) -> None:
        self.folder = folder
        self.metrics = folder / METRICS
        self._world = world or distributed.world()
        self._lock: Lock | None = None
        about = json.loads(strictjson.canonical(dict(identity)))
        if dry:
            self._require_place()
            self._check(about, resume, force)
            if board is not None:
                require_board(board)
        elif self._world.main:
            self._hold(about, resume, force)
        try:
            if self._lock is not None:
                self._begin(about, resume)
            self._world.barrier()
            writes = self._world.main and not dry
            self.log = MetricsLog(self.metrics if writes else None, board=board if writes else None)
        except BaseException:
            self._leave()
            raise
        # What was there at the start: later, one process might look before and another after a write.
        self._finished = set(self._stages())

    def finished(self, stage: str) -> Program | None:
        """The result of a stage that was completed before an interruption, or in this run."""
        path = self._path(stage)
        return read_program(path, self.network) if path in self._finished else None

    def finish(self, stage: str, program: Program) -> None:
        """Keep the result of a stage; the state of its training has served. Collective."""
        if self._world.main:
            write_program(program, self._path(stage), force=True)
        self._world.barrier()  # until then another process may still have to read the state
        if self._world.main:
            self._state.unlink(missing_ok=True)
        self._finished.add(self._path(stage))

    def save(self, stage: str, state: State) -> None:
        """Keep the state of the training in progress, in place of the last one."""
        if self._world.main:
            write_state(State(state.tensors, {"stage": stage, "state": state.about}), self._state)

    def load(self, stage: str) -> State | None:
        """The state to go on from, or None if the interruption was not in this stage.

        Raises:
            ArtifactError: it is damaged.
        """
        if not self._state.exists():
            return None
        stored = read_state(self._state)
        if stored.about.get("stage") != stage:
            return None
        return State(stored.tensors, stored.about["state"])

    @property
    def interrupted(self) -> bool:
        """True if there is something that a resumed run would go on from."""
        return self._state.exists() or bool(self._stages())

    def close(self) -> None:
        """End a run that has succeeded: delete all but the metrics, and the folder if there are none."""
        self._world.barrier()
        self.log.close()
        if self._lock is not None:
            self._clear()
            self.release()

    def discard(self) -> None:
        """End a run that cannot succeed: delete the metrics too, without waiting for the other processes."""
        self.log.close()
        if self._lock is not None:
            self._clear()
            self._forget_metrics()
            self.release()

    def release(self) -> None:
        """Unlock the folder, and delete it if nothing is in it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.close()
        self._leave()

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def _identity(self) -> Path:
        return self.folder / "identity.json"

    def _path(self, stage: str) -> Path:
        if not _STAGE.fullmatch(stage):
            raise ModeloptError(f"{stage!r} cannot name a stage")
        return self.folder / f"stage-{stage}.safetensors"

    def _stages(self) -> list[Path]:
        return sorted(self.folder.glob("stage-*.safetensors"))

    def _hold(self, identity: dict[str, Any], resume: bool, force: bool) -> None:
        """Lock the folder, if what is in it allows this run."""
        with _failures(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._lock = Lock(self.folder / "lock")
        try:
            self._check(identity, resume, force)
        except BaseException:
            self.release()
            raise

    def _begin(self, identity: dict[str, Any], resume: bool) -> None:
        """Delete or keep what is in the folder."""
        if self.interrupted and not resume:
            self._clear()
        if not self.interrupted:
            self._forget_metrics()
            atomic_write(self._identity, [strictjson.canonical(identity)], force=True)

    def _leave(self) -> None:
        """Let go of the folder; a run with nothing to go on from leaves nothing there."""
        if self._lock is not None and not self.interrupted:
            with contextlib.suppress(
                EnvironmentFailure
            ):  # must not stand in for the error that ended the run
                self._clear()
                self._forget_metrics()
        self.release()

    def _require_place(self) -> None:
        """Refuse what a run could not make or write to."""
        place = self.folder if self.folder.exists() else self.folder.parent
        with _failures(self.folder):
            require_writable(place)

    def _check(self, identity: dict[str, Any], resume: bool, force: bool) -> None:
        """Refuse to work in a folder with these contents."""
        if self.interrupted:
            self._check_interrupted(identity, resume, force)
        elif self.metrics.exists() and not (resume or force):
            hint = f"move it, or replace it with {option('force', True)}"
            raise UsageError("is the log of an earlier run", where=str(self.metrics), hint=hint)

    def _check_interrupted(self, identity: dict[str, Any], resume: bool, force: bool) -> None:
        where = str(self.folder)
        if not self._identity.exists():
            hint = f"give the run another folder with {option('run_dir')}"
            raise UsageError("holds files that are not those of a run", where=where, hint=hint)
        if resume:
            _compare(_read_identity(self._identity), identity, where)
        elif not force:
            hint = f"go on with {option('resume', True)}, or start over with {option('force', True)}"
            raise UsageError("holds an interrupted run", where=where, hint=hint)

    def _forget_metrics(self) -> None:
        with _failures(self.folder):
            self.metrics.unlink(missing_ok=True)

    def _clear(self) -> None:
        with _failures(self.folder):
            for path in (self._state, *self._stages(), self._identity):
                path.unlink(missing_ok=True)


def _read_identity(path: Path) -> dict[str, Any]:
    hint = f"start over with {option('force', True)}"
    try:
        return strictjson.parse(read_regular(path, ArtifactError), ArtifactError, str(path))
    except ArtifactError:
        raise UsageError("is damaged", where=str(path), hint=hint) from None


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a run that was asked to do something else."""
    if differ := differences(old, new):
        raise UsageError(
            f"was begun otherwise: {differ}",
            where=where,
            hint=f"resume with the same options, or start over with {option('force', True)}",
        )


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise OutputError("is not a folder", where=str(path), hint="choose another name") from None
    except OSError as error:
        raise EnvironmentFailure(f"cannot be used: {error.strerror or error}", where=str(path)) from error
