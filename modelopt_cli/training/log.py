"""Metrics of a training: one JSON object a line, and TensorBoard where it is asked for."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelopt_cli.artifact import strictjson
from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import ArtifactError, EnvironmentFailure
from modelopt_cli.regular import require_writable
from modelopt_cli.text import json_number


class MetricsLog:
    """Figures of every epoch, in the order of training; an interrupted and resumed run reads as one.

    A line is an object with ``stage``, ``epoch`` and ``step`` (both from the start of the stage), then the
    figures; one that is not finite is ``null``. Add an epoch's line before its state is saved: a line too
    many is dropped on resuming, a missing one never comes back.

    Args:
        path: the ``.jsonl`` file, or None for a log that keeps nothing.
        board: folder for TensorBoard, or None.

    Raises:
        EnvironmentFailure: TensorBoard is asked for and not installed, or its folder cannot be written to.
    """

    def __init__(self, path: Path | None, *, board: Path | None = None) -> None:
        self.path, self._folder = path, board
        self._board: Any = None  # made with the first line: it writes a file at once
        if board is not None:
            require_board(board)

    def rewind(self, stage: str, epoch: int) -> None:
        """Before the first epoch of a stage that goes on after ``epoch`` epochs: drop what came later."""
        if self.path is None or not self.path.exists():
            return
        with _failures(self.path):
            old = self.path.read_bytes()
        kept = b"".join(_until(old, stage, epoch))
        if kept != old:
            atomic_write(self.path, [kept], force=True)

    def add(self, stage: str, epoch: int, step: int, **figures: float | int | None) -> None:
        """Append one line.

        Raises:
            EnvironmentFailure: it cannot be written.
        """
        line = {"stage": stage, "epoch": epoch, "step": step}
        line |= {name: json_number(value) for name, value in figures.items()}
        if self.path is not None:
            with _failures(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._folder is not None:
            self._board = self._board or _writer(self._folder)
            for name, value in figures.items():
                if value is not None:
                    self._board.add_scalar(f"{stage}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        """Finish the TensorBoard files."""
        if self._board is not None:
            self._board.close()


def _until(text: bytes, stage: str, epoch: int) -> Iterator[bytes]:
    """Complete lines before the first one that belongs to a later epoch of ``stage``."""
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            later = entry["stage"] == stage and entry["epoch"] > epoch
        except (ValueError, TypeError, KeyError):
            return
        if later or not line.endswith(b"\n"):
            return
        yield line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, in the order of training.

    Raises:
        EnvironmentFailure: it cannot be read.
        ArtifactError: it is damaged, or no such log.
    """
    with _failures(path, "read"):
        lines = path.read_bytes().splitlines()
    metrics = [strictjson.parse(line, ArtifactError, str(path)) for line in lines]
    for line in metrics:
        if not isinstance(line.get("stage"), str) or not isinstance(line.get("epoch"), int):
            raise ArtifactError("is not the log of a run", where=str(path))
    return metrics


def require_board(folder: Path) -> None:
    """Raise EnvironmentFailure where TensorBoard is not installed, or could not write to ``folder``."""
    _summary_writer()
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with _failures(folder):
        require_writable(place)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EnvironmentFailure(
            "TensorBoard is not installed", hint="pip install 'modelopt-cli[track]'"
        ) from None
    return SummaryWriter


def _writer(folder: Path) -> Any:
    writer = _summary_writer()
    with _failures(folder):
        return writer(str(folder))


@contextlib.contextmanager
def _failures(path: Path, action: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(f"cannot be {action}: {error.strerror or error}", where=str(path)) from error
