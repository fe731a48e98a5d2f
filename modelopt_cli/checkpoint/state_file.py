"""``read_state``: the tensors of a checkpoint of any kind, and its hash."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelopt_cli.artifact.lazy import LazyState, open_safetensors
from modelopt_cli.checkpoint.folder import check_together, digest_of, named_in, read_shards, weights_in
from modelopt_cli.checkpoint.pt2 import Archive, read_pt2
from modelopt_cli.checkpoint.sniff import (
    INDEX,
    PICKLE,
    PT2,
    SAFETENSORS,
    TORCH_LEGACY,
    TORCH_ZIP,
    FileKind,
    sniff,
)
from modelopt_cli.checkpoint.tensor_checks import check_tensors, check_types
from modelopt_cli.checkpoint.torch_file import load_object
from modelopt_cli.checkpoint.unwrap import unwrap, unwrap_lazy
from modelopt_cli.errors import CheckpointError, EnvironmentFailure
from modelopt_cli.regular import HeldFile


@dataclass(frozen=True)
class StateFile:
    """Contents of a checkpoint.

    Attributes:
        state: CPU tensors by layer name, wrappers' prefixes taken off, in the file's order; those of
            safetensors files stay in them, see ``artifact.lazy``.
        source: kind of file: torch-zip, torch-legacy, safetensors, pt2, sharded.
        sha256: of the file; of several files, of their names and hashes.
        notes: one line for each thing that was unwrapped or left aside.
        arch: the architecture that the folder's ``config.json`` names, as a spec.
        file_bytes: length of the file; of several files, of all that were read.
        exported: contents of a ``.pt2`` file, among them its graph.
        path: that was given.
    """

    state: Mapping[str, torch.Tensor]
    source: str
    sha256: str
    notes: tuple[str, ...] = ()
    arch: str | None = None
    file_bytes: int = 0
    exported: Archive | None = None
    path: str = ""


def read_state(path: str | Path) -> StateFile:
    """Read a checkpoint: a file of torch.save, safetensors or torch.export, or a Hugging Face folder.

    Nothing in the file runs. Every tensor is a plain CPU tensor that the file really holds.

    Raises:
        CheckpointError: one line with what the file is instead, or what is wrong with it.
        EnvironmentFailure: it cannot be opened.
    """
    path = Path(path)
    arch = None
    if os.path.isdir(path):
        path, arch = weights_in(path), named_in(path)
    kind, saved, files = _read(path)
    state, notes = _unwrapped(saved, files, str(path))
    if not state:
        raise CheckpointError("holds no tensors", where=str(path))
    sha256 = digest_of(files)
    if len(files) > 1:
        check_together(files)
    exported = saved if isinstance(saved, Archive) else None
    size = sum(file.size for file in files)
    return StateFile(state, kind.name, sha256, notes, arch, size, exported, str(path))


def _unwrapped(
    saved: Any, files: list[HeldFile], where: str
) -> tuple[Mapping[str, torch.Tensor], tuple[str, ...]]:
    if isinstance(saved, LazyState):
        state, notes = unwrap_lazy(saved)
        check_types(state.described(), where)
        return state, notes
    size = sum(file.size for file in files)
    if isinstance(saved, Archive):
        check_tensors(saved.constants, size, where)
        saved = saved.weights
    unwrapped = unwrap(saved, where)
    check_tensors(unwrapped.state, size, where)
    return unwrapped.state, unwrapped.notes


def _read(path: Path) -> tuple[FileKind, Any, list[HeldFile]]:
    kind, saved, held = _read_file(path)
    if kind is not INDEX:
        return kind, saved, [held]
    held.file.seek(0)
    return kind, *read_shards(held, _read_shard)


def _read_shard(path: Path) -> tuple[Mapping[str, torch.Tensor], HeldFile]:
    kind, saved, held = _read_file(path)
    if kind is INDEX:
        raise CheckpointError("is an index where weights should be", where=str(path))
    if isinstance(saved, Archive):
        raise CheckpointError("is an exported network where a part of its weights should be", where=str(path))
    return saved if isinstance(saved, LazyState) else unwrap(saved, str(path)).state, held


def _reader_of_torch(kind: FileKind) -> Callable[[HeldFile, Path], Any]:
    return lambda held, path: load_object(held.file, path, kind)


_READERS: dict[FileKind, Callable[[HeldFile, Path], Any]] = {
    **{kind: _reader_of_torch(kind) for kind in (TORCH_ZIP, TORCH_LEGACY, PICKLE)},
    SAFETENSORS: lambda held, path: open_safetensors(held),
    PT2: lambda held, path: read_pt2(held.file, path),
    INDEX: lambda held, path: None,  # its shards are read one by one
}


def _read_file(path: Path) -> tuple[FileKind, Any, HeldFile]:
    held = HeldFile(path, CheckpointError)
    try:
        kind = sniff(held.file, path)
        saved = _READERS[kind](held, path)
    except OSError as error:
        raise EnvironmentFailure(f"cannot be read ({error.strerror})", where=str(path)) from error
    held.check()
    return kind, saved, held


def state_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors of a state dict; one that appears under two names counts once."""
    seen: dict[tuple[Any, ...], int] = {}
    for name, tensor in state.items():
        # Empty and meta tensors have no address of their own.
        pointer = tensor.data_ptr() if tensor.device.type != "meta" else 0
        address = pointer or hash(name)
        key = (address, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        seen[key] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
