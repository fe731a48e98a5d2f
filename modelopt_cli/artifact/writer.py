"""Write a file so that it is absent, old or complete, whatever happens. Standard library only.

The bytes go to ``.NAME.part`` next to the target, are synced, and take the target's name in one step.
The part file carries an exclusive lock for as long as its writer lives: a locked one belongs to a
writer at work, an unlocked one was left by a process that was killed and is cleared away.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from modelopt_cli.artifact.output_path import environment, force_hint, part_name, real_output
from modelopt_cli.artifact.undo import remember
from modelopt_cli.errors import OutputError

# Some network file systems offer no locks; a fresh part file is then ours by O_EXCL alone.
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_ATTEMPTS = 100


def atomic_write(
    path: str | Path,
    chunks: Iterable[bytes | bytearray | memoryview],
    force: bool = False,
    *,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write ``chunks`` to ``path`` in one indivisible step; on any exception leave things as they were.

    A link is followed and stays a link. A new file gets the mode the umask gives, a replaced one
    keeps its own.

    Args:
        path: the target; see ``output_path.check_output`` for what is refused.
        chunks: the content, written in order.
        force: whether an existing file may be replaced.
        verify: called with the finished, not yet published file; what it raises stops the write.

    Raises:
        OutputError: as ``check_output``, or another process is writing the same file.
        EnvironmentFailure: no space, no permission, a read-only file system.
    """
    target = real_output(path, force, ())
    with environment(path):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _write_in(folder, target, chunks, force, verify)
        finally:
            os.close(folder)


def _write_in(
    folder: int,
    target: Path,
    chunks: Iterable[bytes | bytearray | memoryview],
    force: bool,
    verify: Callable[[Path], None] | None,
) -> None:
    part = part_name(target)
    handle = _claim(folder, part, target)
    published = False
    try:
        for chunk in chunks:
            _write_all(handle, chunk)
        _keep_mode(handle, target)
        os.fsync(handle)
        if verify is not None:
            verify(target.with_name(part))
        _publish(folder, part, target.name, force)
        published = True
        remember(handle)
        _sync_folder(folder)
    finally:
        if not published and _is_named(folder, part, handle):
            os.unlink(part, dir_fd=folder)
        os.close(handle)


def _claim(folder: int, part: str, target: Path) -> int:
    """A new, empty, locked part file; one that a killed process left behind is cleared first."""
    for _ in range(_ATTEMPTS):
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        fresh = True
        try:
            handle = os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
        except FileExistsError:
            fresh = False
            leftover = _open_leftover(folder, part, flags, target)
            if leftover is None:
                continue
            handle = leftover
        try:
            _lock(handle, fresh, target)
            # Whoever held the lock before may have published or removed this file meanwhile.
            mine = _is_named(folder, part, handle)
            if fresh and mine:
                return handle
            if mine:
                os.unlink(part, dir_fd=folder)
        except BaseException:
            if fresh and _is_named(folder, part, handle):
                os.unlink(part, dir_fd=folder)
            os.close(handle)
            raise
        os.close(handle)
    raise _busy(target)


def _open_leftover(folder: int, part: str, flags: int, target: Path) -> int | None:
    try:
        handle = os.open(part, flags | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _in_the_way(target) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _in_the_way(target)
    return handle


def _in_the_way(target: Path) -> OutputError:
    part = target.with_name(part_name(target))
    return OutputError("is in the way and not a regular file", where=str(part), hint="remove it")


def _busy(target: Path) -> OutputError:
    return OutputError(
        "another modelopt is writing this file", where=str(target), hint="wait for it or choose another name"
    )


def _lock(handle: int, fresh: bool, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(target) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if not fresh:
            part = target.with_name(part_name(target))
            hint = "remove it if no other modelopt is writing this file"
            raise OutputError("was left by another writer", where=str(part), hint=hint) from None


def _is_named(folder: int, part: str, handle: int) -> bool:
    try:
        named = os.stat(part, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(handle))


def _write_all(handle: int, chunk: bytes | bytearray | memoryview) -> None:
    """``os.write`` may take fewer bytes than offered (at most 2 GiB), so loop."""
    view = memoryview(chunk).cast("B")
    while len(view):
        view = view[os.write(handle, view) :]


def _keep_mode(handle: int, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.fchmod(handle, stat.S_IMODE(os.stat(target).st_mode) & 0o777)


def _publish(folder: int, part: str, name: str, force: bool) -> None:
    """Give the part file its final name; without ``force``, never over a file that appeared since."""
    if not force:
        try:
            os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            raise OutputError("already exists", where=name, hint=force_hint()) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise  # those few mean a file system without hard links
            _refuse_existing(folder, name)
        else:
            os.unlink(part, dir_fd=folder)
            return
    os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)


def _refuse_existing(folder: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        raise OutputError("already exists", where=name, hint=force_hint())


def _sync_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
