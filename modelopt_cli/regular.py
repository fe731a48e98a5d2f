"""Opening what the user named for reading: a regular file, and nothing that could block or never end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from modelopt_cli.errors import EnvironmentFailure, InputError


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
