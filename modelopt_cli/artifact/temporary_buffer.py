"""Temporary buffer for encoded tensors until the header is known: in memory, or on the output's disk.

A large buffer is a file without a name, so nothing is left of it, whatever happens.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from modelopt_cli.artifact.output_path import environment

_IN_MEMORY = 64 << 20
_BLOCK = 1 << 20


class TemporaryBuffer:
    """Bytes that are appended once and read back from any place."""

    def __init__(self, file: tempfile.SpooledTemporaryFile[bytes], path: str | Path) -> None:
        self._file, self._path = file, path
        self._end = 0

    def append(self, data: memoryview) -> tuple[int, int]:
        """Append bytes and return their place: start and end.

        Raises:
            EnvironmentFailure: no space is left.
        """
        start = self._end
        with environment(self._path):
            if start + data.nbytes > _IN_MEMORY:
                self._file.rollover()  # before it is written, or it would be in memory twice
            self._file.write(data)
        self._end += data.nbytes
        return start, self._end

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """Read a place in blocks; nothing may be appended meanwhile."""
        with environment(self._path):
            self._file.seek(start)
            while start < end:
                block = self._file.read(min(_BLOCK, end - start))
                start += len(block)
                yield block


@contextlib.contextmanager
def temporary_buffer(path: str | Path) -> Iterator[TemporaryBuffer]:
    """A buffer on the file system of an output.

    Raises:
        EnvironmentFailure: no space, or no permission.
    """
    folder = os.path.dirname(os.path.realpath(path))
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=folder) as file:
        yield TemporaryBuffer(file, path)
