"""Paths of outputs: what they may be called, what must not be there, and how a refused write is said.

Standard library only.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from modelopt_cli.errors import EnvironmentFailure, OutputError
from modelopt_cli.settings import option

SUFFIX = ".safetensors"
_CAUSES = {
    errno.ENOSPC: ("no space left on the device", "free some space or write elsewhere"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or write elsewhere"),
    errno.EFBIG: ("the file would exceed the size limit", "raise the limit (ulimit -f) or write elsewhere"),
    errno.EACCES: ("permission denied", "choose a folder you may write to"),
    errno.EPERM: ("operation not permitted", "choose a folder you may write to"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}


def force_hint() -> str:
    """Next step where an output is there already."""
    return f"choose another name, or replace it with {option('force', True)}"


def check_suffix(path: str | Path) -> None:
    """Refuse an artifact's name that promises another format than safetensors.

    Raises:
        OutputError: it has a suffix, and that is another one.
    """
    suffix = Path(path).suffix
    if suffix and suffix.lower() != SUFFIX:
        raise OutputError(
            f"ends in {suffix}, but what is written is a safetensors file",
            where=str(path),
            hint=f"end its name in {SUFFIX}",
        )


def scratch_beside(output: str | Path) -> Path:
    """Path of the student that is trained without a teacher, next to the output."""
    path = Path(output)
    return path.with_name(f"{path.stem}-scratch{path.suffix}")


def check_output(path: str | Path, force: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse an output path that could not or must not be written, before any work is done.

    Args:
        path: where the output would go.
        force: whether an existing file may be replaced.
        inputs: files the output must never be, not even with ``force``.

    Raises:
        OutputError: a directory, device, socket, pipe or dangling link; an existing file without
            ``force``; one of ``inputs``; a missing parent.
        EnvironmentFailure: the folder may not be written to, or the name is too long.
    """
    real_output(path, force, inputs)


def real_output(path: str | Path, force: bool, inputs: Iterable[str | Path]) -> Path:
    """The real path behind ``path``, after every check that needs no writing."""
    if not str(path) or "\0" in str(path):
        raise OutputError("the output path is empty or holds a NUL character", hint="give a file name")
    with environment(path):
        target = Path(os.path.realpath(path))
        status = _status(target, path)
        if status is not None:
            _check_existing(path, target, status, force, inputs)
        elif os.path.islink(path):
            raise OutputError(
                "is a link to nothing", where=str(path), hint="remove the link or create its target"
            )
        _check_folder(path, target)
    return target


def _status(target: Path, path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(target)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            problem = (
                "part of the path is not a directory" if error.errno == errno.ENOTDIR else "links in a loop"
            )
            raise OutputError(problem, where=str(path), hint="choose another path") from None
        raise


def _check_existing(
    path: str | Path, target: Path, status: os.stat_result, force: bool, inputs: Iterable[str | Path]
) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise OutputError("is a directory", where=str(path), hint="give a file name inside it")
    if not stat.S_ISREG(status.st_mode):
        raise OutputError("is not a regular file", where=str(path), hint="give the name of a plain file")
    for source in inputs:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(source), status):
                raise OutputError("is also an input", where=str(path), hint="choose another output name")
    if not force:
        raise OutputError("already exists", where=str(path), hint=force_hint())


def _check_folder(path: str | Path, target: Path) -> None:
    folder = target.parent
    if not folder.exists():
        raise OutputError(f"the folder {folder} does not exist", where=str(path), hint="create it first")
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a directory", where=str(path), hint="choose another path")
    if len(os.fsencode(part_name(target))) > os.pathconf(folder, "PC_NAME_MAX"):
        raise OSError(errno.ENAMETOOLONG, "")
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, "")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, "")


def part_name(target: Path) -> str:
    """Name of the file that an output's bytes go to until they are complete."""
    return f".{target.name}.part"


@contextlib.contextmanager
def environment(path: str | Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line."""
    try:
        yield
    except OSError as error:
        cause, hint = _CAUSES.get(error.errno or 0, (os.strerror(error.errno or errno.EIO), None))
        raise EnvironmentFailure(f"cannot write: {cause}", where=str(path), hint=hint) from error
