"""Removal of written files where the work that wrote them fails. Standard library only."""

import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_published: set[tuple[int, int]] = set()  # device and inode of the files that this process has written


def remember(handle: int) -> None:
    """Note that this process has published an open file, which may therefore be taken back."""
    _published.add(_identity(os.fstat(handle)))


@contextmanager
def undone_on_failure(*outputs: str | Path) -> Iterator[None]:
    """Around work that writes files: whatever ends it early, they are as they were before, absent or old.

    Until the work is done an old file has a second name next to it, ``.NAME.0.old``, which a killed process
    leaves behind. What another process wrote is not touched.

    Raises:
        OSError: an old file cannot be kept; nothing has been done then.
    """
    kept: dict[Path, Path | None] = {}
    try:
        for path in map(Path, outputs):
            kept[path] = _keep(path)
        yield
    except BaseException as error:
        for path, old in kept.items():
            if _is_ours(path):
                error.add_note(_take_back(path, old))
        raise
    finally:
        for old in filter(None, kept.values()):
            old.unlink(missing_ok=True)


def _keep(path: Path) -> Path | None:
    """Another name for a file, under which it outlives its replacement; None where there is none."""
    target = Path(os.path.realpath(path))
    if not target.is_file():
        return None
    for number in itertools.count():
        old = target.with_name(f".{target.name}.{number}.old")
        try:
            os.link(target, old)
        except FileExistsError:  # left by a killed process, or kept by one at work
            continue
        except OSError:  # a file system without hard links
            shutil.copy2(target, old)
        return old
    raise AssertionError("unreachable")


def _take_back(path: Path, old: Path | None) -> str:
    target = Path(os.path.realpath(path))
    if old is None:
        target.unlink()
        return f"{path} was deleted again"
    os.replace(old, target)
    return f"the earlier {path} is back"


def _is_ours(path: Path) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _identity(status) in _published


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
