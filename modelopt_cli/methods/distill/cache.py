"""Logits of a teacher kept on disk, so that it is called once for each image.

    logits.json    all that the logits depend on
    logits.bin     an entry for each sample in each variant (``cache_layout.py``), variant by variant

The data file has its full size from the start. Every entry has a CRC-32 over that, its
sample, its variant and its data: one that was never written, or not to its end, is not there. So any number
of processes may write to the file at once, and all may be killed at any time.
"""

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelopt_cli.artifact import atomic_write, strictjson
from modelopt_cli.artifact.output_path import environment
from modelopt_cli.errors import ArtifactError, EnvironmentFailure, OutputError, UsageError
from modelopt_cli.methods.distill.cache_layout import Layout
from modelopt_cli.methods.distill.teacher import TeacherOutput
from modelopt_cli.program.input_batch import Inputs, tensors_of
from modelopt_cli.regular import read_regular
from modelopt_cli.settings import option
from modelopt_cli.training import StepInputs
from modelopt_cli.training.distributed import World
from modelopt_cli.training.identity import differences

HEADER, ENTRIES = "logits.json", "logits.bin"
FORMAT = 1
LARGEST = 1 << 36
"""Bytes that a cache may have, 64 GiB: a too long augmentation cycle shall not fill a disk."""
_CHECKSUM = 4


@dataclass(frozen=True)
class CacheRequest:
    """Folder for the logits of teachers.

    Attributes:
        folder: is made if it does not exist; its parent must.
        teachers: JSON-able; whatever tells these teachers from others.
        force: delete logits of others that are there.
        on_note: called with one line for each thing worth knowing.
        dry: write nothing: use what is there, and keep what is not in memory.
    """

    folder: Path
    teachers: Mapping[str, Any]
    force: bool = False
    on_note: Callable[[str], None] | None = None
    dry: bool = False


class Cache:
    """Logits of teachers on disk; see the module.

    Args:
        request: where.
        layout: how large.
        identity: JSON-able; all that the logits depend on.
        world: the processes that share it; the main one makes it. Collective.

    Raises:
        UsageError: the folder holds logits of others, or they would be too large.
        OutputError: it is no folder.
        EnvironmentFailure: no space, no permission.
    """

    def __init__(
        self, request: CacheRequest, layout: Layout, identity: Mapping[str, Any], world: World
    ) -> None:
        self.layout = layout
        about = strictjson.canonical({"format": FORMAT, **identity})
        self._salt = zlib.crc32(about)
        path = request.folder / ENTRIES
        self._entries: NDArray[np.void] | _InMemory
        if request.dry:
            known = _check(request, layout.size, about) and _size(path) == layout.size
            if not known:
                with environment(request.folder):
                    _require_space(path, layout.size - _size(path))
            self._entries = _mapped(path, layout, "c") if known else _InMemory(layout.entry)
            return
        if world.main:
            _prepare(request, layout.size, about)
        world.barrier()
        self._entries = _mapped(path, layout, "r+")

    def output(self, inputs: StepInputs, teacher: Callable[[Inputs], TeacherOutput]) -> TeacherOutput:
        """Output of ``teacher``, from the cache if all of it is there.

        Where not all logits are kept, it is the one that will be read back, was it there or not: the
        network must learn the same either way.
        """
        assert inputs.samples is not None
        samples = inputs.samples.numpy()
        entries = self._entries[inputs.variant, samples]  # a copy: another process may be writing
        if not np.array_equal(entries["checksum"], self._checksums(entries, samples, inputs.variant)):
            output = teacher(inputs.batch).logits
            assert output is not None
            entries = self.layout.pack(output)
            entries["checksum"] = self._checksums(entries, samples, inputs.variant)
            self._entries[inputs.variant, samples] = entries
        return TeacherOutput(self.layout.unpack(entries).to(tensors_of(inputs.batch)[0].device))

    def _checksums(
        self, entries: NDArray[np.void], samples: NDArray[np.int64], variant: int
    ) -> NDArray[np.uint32]:
        return np.fromiter(self._each_checksum(entries, samples, variant), np.uint32, len(entries))

    def _each_checksum(
        self, entries: NDArray[np.void], samples: NDArray[np.int64], variant: int
    ) -> Iterator[int]:
        content, size = memoryview(entries.tobytes()), entries.dtype.itemsize
        for i, sample in enumerate(samples.tolist()):
            key = zlib.crc32(struct.pack("<qq", variant, sample), self._salt)
            # Never 0, which is what stands where nothing was written.
            yield zlib.crc32(content[i * size + _CHECKSUM : (i + 1) * size], key) or 1


class _InMemory:
    """Stands in for the file where none is to be written; only what was written takes memory."""

    def __init__(self, entry: "np.dtype[np.void]") -> None:
        self._entry, self._kept = entry, dict[tuple[int, int], np.void]()

    def __getitem__(self, place: tuple[int, NDArray[np.int64]]) -> NDArray[np.void]:
        variant, samples = place
        entries = np.zeros(len(samples), self._entry)
        for i, sample in enumerate(samples.tolist()):
            if (variant, sample) in self._kept:
                entries[i] = self._kept[variant, sample]
        return entries

    def __setitem__(self, place: tuple[int, NDArray[np.int64]], entries: NDArray[np.void]) -> None:
        variant, samples = place
        self._kept.update({(variant, sample): entries[i] for i, sample in enumerate(samples.tolist())})


def _mapped(path: Path, layout: Layout, mode: Literal["r+", "c"]) -> NDArray[np.void]:
    """The entries of a file, ``(variants, samples)``; with ``c`` what is assigned to them stays in memory."""
    with environment(path):
        return np.memmap(path, layout.entry, mode, shape=(layout.variants, layout.samples))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(request: CacheRequest, size: int, about: bytes) -> bool:
    """True if the logits that are there are these; raises if others may not be replaced."""
    folder, header = request.folder, request.folder / HEADER
    if size > LARGEST:
        raise UsageError(
            f"the teacher's logits would take {size:,} bytes, and {LARGEST:,} are allowed",
            where=option("cache"),
            hint=f"lower {option('augmentation_cycle')} or {option('cache_top')}",
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError("is not a folder", where=str(folder), hint="choose another name")
    return header.exists() and _is_same(header, about, request)


def _prepare(request: CacheRequest, size: int, about: bytes) -> None:
    """Make the folder and the files, or see that those that are there will do."""
    folder, header = request.folder, request.folder / HEADER
    known = _check(request, size, about)
    with environment(folder):
        folder.mkdir(exist_ok=True)
    _allocate(folder / ENTRIES, size)
    if not known:
        atomic_write(header, [about], force=True)
    if request.on_note is not None:
        request.on_note(f"the teacher's logits take {size:,} bytes in {folder}")


def _is_same(header: Path, about: bytes, request: CacheRequest) -> bool:
    """True if the logits that are there are these; raises if others may not be replaced."""
    try:
        with environment(header):
            before = strictjson.parse(read_regular(header, ArtifactError), ArtifactError, str(header))
        changes = differences(before, strictjson.parse(about, ArtifactError, str(header)))
        problem = f"holds the logits of another distillation: {changes}" if changes else ""
    except ArtifactError:
        problem = f"holds a damaged {HEADER}"
    if problem and not request.force:
        raise UsageError(
            problem, where=str(request.folder), hint=f"give another folder, or {option('force', True)}"
        )
    return not problem


def _allocate(path: Path, size: int) -> None:
    """Reserve all of the file on the disk: a mapped page that finds no room would kill the process."""
    with environment(path):
        if path.exists() and path.stat().st_size != size:  # of other logits, or of a killed process
            path.unlink()
        fresh = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _require_space(path, size - 512 * os.fstat(handle).st_blocks)
            os.posix_fallocate(handle, 0, size)
        except BaseException:
            if fresh:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)


def _require_space(path: Path, size: int) -> None:
    """A file system that cannot reserve would fill up first, and then say so."""
    folder = path.parent
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if size > free:
        raise EnvironmentFailure(
            f"the teacher's logits need {size:,} bytes more, and {free:,} are free",
            where=str(path),
            hint=f"free some space, or lower {option('augmentation_cycle')} or {option('cache_top')}",
        )
