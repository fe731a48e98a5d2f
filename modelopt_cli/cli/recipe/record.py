"""The finished steps of a recipe: ``recipe.json`` in the folder of their results.

A step is known by what it was asked to do, by the SHA-256 of the file it started from, and by the versions of
modelopt and torch. What it made is known by its SHA-256. A file's mere presence means nothing. A recipe that
ends without a finished step, or anything else to go on from, leaves no folder.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from modelopt_cli import __version__
from modelopt_cli.artifact import atomic_write, strictjson
from modelopt_cli.checkpoint.folder import digest_of
from modelopt_cli.cli.recipe.plan import Line
from modelopt_cli.errors import ArtifactError, EnvironmentFailure, OutputError, UsageError
from modelopt_cli.regular import read_regular
from modelopt_cli.training.lock import Lock

_LOCK = "lock"
_START_OVER = "start over with --force"


@dataclass(frozen=True)
class Entry:
    """A step that was begun.

    Attributes:
        command: verb and options.
        source_sha256: of the file it starts from; None where it needs none.
        modelopt: version.
        torch: version.
        sha256: of its result; empty while it is not finished.
    """

    command: tuple[str, ...]
    source_sha256: str | None
    modelopt: str
    torch: str
    sha256: str = ""

    @classmethod
    def of(cls, line: Line, source_sha256: str | None) -> "Entry":
        """The entry of a step before it is done."""
        return cls((line.verb, *line.options), source_sha256, __version__, version("torch"))

    def same_work(self, other: "Entry") -> bool:
        """True if both would make the same, finished or not."""
        return asdict(self) | {"sha256": ""} == asdict(other) | {"sha256": ""}


class Record:
    """See the module. A context manager that holds the folder.

    Args:
        folder: is made if it does not exist; its parent must.
        resume: go on from what is there; with nothing there, just start.
        force: without ``resume``, forget what is there.

    Raises:
        UsageError: a finished step is there and neither is given, or the record is damaged.
        OutputError: another process is at work in the folder, or it is none.
        EnvironmentFailure: the folder may not be written to.
    """

    def __init__(self, folder: Path, *, resume: bool, force: bool) -> None:
        self._path = folder / "recipe.json"
        try:
            folder.mkdir(exist_ok=True)
            self._lock = Lock(folder / _LOCK)
        except (FileExistsError, NotADirectoryError):
            raise OutputError("is not a folder", where=str(folder), hint="choose another output") from None
        except OSError as error:
            raise EnvironmentFailure(f"cannot be used: {error.strerror}", where=str(folder)) from error
        try:
            self._entries = [] if force and not resume else _read(self._path)
            if any(entry.sha256 for entry in self._entries) and not resume:
                hint = f"go on with --resume, or {_START_OVER}"
                raise UsageError("holds the steps of an earlier run", where=str(folder), hint=hint)
            self._entries = self._entries if resume else []
        except BaseException:
            self._release()
            raise

    def entry(self, step: int) -> Entry | None:
        """The entry of the step at this index, or None."""
        return self._entries[step] if step < len(self._entries) else None

    def result(self, step: int, wanted: Entry, output: Path) -> str | None:
        """SHA-256 of what the step made, if it was finished, would make the same again, and is unharmed."""
        entry = self.entry(step)
        if entry is None or not entry.sha256 or not entry.same_work(wanted) or not output.is_file():
            return None
        return entry.sha256 if digest_of([output]) == entry.sha256 else None

    def put(self, step: int, entry: Entry) -> None:
        """Remember that the step was begun, or finished; what was known of later ones no longer counts."""
        self._entries[step:] = [entry]
        document = {"steps": [asdict(known) for known in self._entries]}
        atomic_write(self._path, [strictjson.canonical(document)], force=True)

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not any(entry.sha256 for entry in self._entries) and self._alone():
            self._path.unlink(missing_ok=True)
        self._release()

    def _alone(self) -> bool:
        """True if nothing else is in the folder: no training to be resumed, no file of a step."""
        return {path.name for path in self._path.parent.iterdir()} <= {self._path.name, _LOCK}

    def _release(self) -> None:
        """Unlock the folder, and delete it if nothing is in it."""
        self._lock.release()
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()


def digest(path: Path) -> str:
    """SHA-256 of a checkpoint; where it may consist of several files, of all that lie in the folder."""
    folder = path if path.is_dir() else path.parent if path.suffix == ".json" else None
    files: Iterable[Path] = [path] if folder is None else filter(Path.is_file, folder.iterdir())
    return digest_of(files)


def _read(path: Path) -> list[Entry]:
    if not path.exists():
        return []
    try:
        steps = strictjson.parse(read_regular(path, UsageError), ArtifactError, str(path))["steps"]
        return [_entry(step) for step in steps]
    except (ArtifactError, LookupError, TypeError):
        raise UsageError("is damaged", where=str(path), hint=_START_OVER) from None


def _entry(step: dict[str, Any]) -> Entry:
    return Entry(**{**step, "command": tuple(step["command"])})
