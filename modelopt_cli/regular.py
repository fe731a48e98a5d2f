"""Opening of the user's files for reading: regular files, and nothing that could block or never end."""

import errno
import hashlib
import os
import stat
import weakref
from pathlib import Path
from typing import BinaryIO

from modelopt_cli.errors import EnvironmentFailure, InputError


def require_there(path: str | Path, error: type[InputError]) -> None:
    """Refuse a path where nothing is, without a look at what is there.

    Raises:
        InputError: of the class ``error``.
    """
    if not os.path.exists(path):
        raise error("no such file", where=str(path))


def open_regular(path: str | Path, error: type[InputError]) -> BinaryIO:
    """Open a regular file. A named pipe, on which a plain ``open`` waits for ever, is refused at once.

    Args:
        path: the file.
        error: raised where it cannot be used.

    Raises:
        InputError: of the class ``error``: there is none, or it is no regular file.
        EnvironmentFailure: it may not be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise error("no such file", where=str(path)) from None
    except PermissionError:
        raise EnvironmentFailure("permission denied", where=str(path)) from None
    except (OSError, ValueError) as cause:
        raise error(f"cannot be opened: {cause}", where=str(path)) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise error("is a folder" if stat.S_ISDIR(mode) else "is not a regular file", where=str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: str | Path, error: type[InputError], limit: int = -1) -> bytes:
    """The first ``limit`` bytes of a regular file, or all.

    Raises:
        InputError, EnvironmentFailure: as :func:`open_regular`.
    """
    with open_regular(path, error) as file:
        return file.read(limit)


class HeldFile:
    """A regular file held open for as long as any of it may be read, so that all of it is of one state.

    A file that takes its name meanwhile is not looked at. One that is written into is refused.

    Attributes:
        path: its name when it was opened.
        file: to read from.
        size: in bytes.

    Raises:
        InputError, EnvironmentFailure: as :func:`open_regular`.
    """

    def __init__(self, path: str | Path, error: type[InputError]) -> None:
        self.path, self._error = Path(path), error
        self.file = open_regular(path, error)
        self._state = _state(os.fstat(self.file.fileno()))
        self.size = self._state[2]
        self.close = weakref.finalize(self, self.file.close)

    def check(self) -> None:
        """Make sure that nobody wrote into the file since it was opened.

        Raises:
            InputError: somebody did, so that what was read may be of two states.
        """
        if _state(os.fstat(self.file.fileno())) != self._state:
            raise self._changed()

    def check_name(self) -> None:
        """Make sure that the file is as it was and still has its name, as several that belong together must.

        Raises:
            InputError: another file has the name, or none.
        """
        try:
            named = _state(os.stat(self.path))
        except OSError:
            raise self._changed() from None
        if named != self._state:
            raise self._changed()

    def sha256(self) -> str:
        """SHA-256 of the whole file.

        Raises:
            InputError: as :meth:`check`.
        """
        self.file.seek(0)
        digest = hashlib.file_digest(self.file, "sha256").hexdigest()  # type: ignore[arg-type]
        self.check()
        return digest

    def _changed(self) -> InputError:
        hint = "wait until it is written, then run again"
        return self._error("was changed while it was read", where=str(self.path), hint=hint)


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def require_writable(folder: Path) -> None:
    """Raise OSError where ``folder`` is none, or files cannot be made in it."""
    os.stat(os.path.join(folder, ""))  # the slash makes it an error where that is no folder
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
