"""Data in several files: the pattern that names them, and reading them at any place."""

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from modelopt_cli.errors import DataError
from modelopt_cli.regular import open_regular

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST_OPEN = 64


def find_shards(pattern: str) -> list[str]:
    """The files that a path, a glob or a brace range names, sorted, each once.

    ``{000..012}`` counts as in WebDataset: with leading zeros where one of the ends has some. Every number
    must have its file. What exists under the pattern's very name is that file.

    Raises:
        DataError: nothing fits, or what fits is not a file.
    """
    paths: set[str] = set()
    for path in [pattern] if os.path.lexists(pattern) else _expanded(pattern):
        matches = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
        if not matches:
            message = "matches no file" if glob.has_magic(path) else "no such file"
            raise DataError(message, where=path, hint="give a path, a glob or a range like {000..009}")
        paths.update(matches)
    for path in sorted(paths):
        if not os.path.isfile(path):
            hint = f"write {os.path.join(path, '*')}" if os.path.isdir(path) else None
            raise DataError("is not a file", where=path, hint=hint)
    return sorted(paths)


def _expanded(pattern: str) -> Iterator[str]:
    """The pattern with each number of its ranges; one by one, since a slip of the finger makes millions."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise DataError(f"the range {match[0]} ends before it starts", where=pattern)
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: match.start()]}{number:0{width}}{pattern[match.end() :]}")


class Shards:
    """Files that are read at any place, with few of them open at a time.

    ``pread`` moves no offset, so forked processes may share what is open; a spawned one opens its own.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` on; fewer only where the file ends.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            return os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise DataError(error.strerror or "cannot be read", where=self.paths[shard]) from None

    def size(self, shard: int) -> int:
        """Bytes of the file.

        Raises:
            DataError: it cannot be opened.
        """
        try:
            return os.fstat(self._descriptor(shard)).st_size
        except OSError as error:
            raise DataError(error.strerror or "cannot be read", where=self.paths[shard]) from None

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            while len(self._open) >= _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            with open_regular(self.paths[shard], DataError) as file:
                self._open[shard] = os.dup(file.fileno())
        self._open.move_to_end(shard)
        return self._open[shard]

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}
