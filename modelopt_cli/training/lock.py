"""A lock between processes that ends with the process that holds it."""

import contextlib
import fcntl
import os
import weakref
from pathlib import Path
from typing import ClassVar

from modelopt_cli.artifact.writer import NO_LOCKS
from modelopt_cli.errors import OutputError


class Lock:
    """A file that only one process holds, from here to :meth:`release`.

    The kernel lets go of a killed process's lock at once. A forked child (a data worker) would inherit it and
    hold it longer than its parent lives, so it closes its copy. Where the file system offers no locks, none
    is taken.

    Raises:
        OutputError: another process holds it.
        OSError: the file cannot be made.
    """

    _held: ClassVar["weakref.WeakSet[Lock]"] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before removed the file on letting go; another may have made a new one since.
            lost = not (path.exists() and os.path.samestat(path.stat(), os.fstat(self._handle)))
        except OSError as error:
            lost = isinstance(error, BlockingIOError)
            if not lost and error.errno not in NO_LOCKS:
                os.close(self._handle)
                raise
        if lost:
            os.close(self._handle)
            hint = "wait for it or choose another folder"
            raise OutputError("another run is at work here", where=str(path.parent), hint=hint)
        self._held.add(self)

    def release(self) -> None:
        """Remove the file where that is possible, and let go."""
        self._held.discard(self)
        with contextlib.suppress(OSError):  # must not stand in for the error that ended the run
            self._path.unlink()
        os.close(self._handle)

    @classmethod
    def forget_all(cls) -> None:
        """Close the copies that a fork has made."""
        for lock in cls._held:
            os.close(lock._handle)
        cls._held.clear()


os.register_at_fork(after_in_child=Lock.forget_all)
