"""Checkpoints of several files: Hugging Face folders and sharded weights with an index."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modelopt_cli.artifact.lazy import LazyState, gather
from modelopt_cli.errors import CheckpointError, EnvironmentFailure
from modelopt_cli.regular import HeldFile, read_regular
from modelopt_cli.text import listing, short

WEIGHTS = (
    "model.safetensors.index.json", "model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip
CONFIG = "config.json"
_TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pth.tar")
_JSON_LIMIT = 64 << 20


def weights_in(folder: Path) -> Path:
    """The file of a Hugging Face folder that holds or lists its weights.

    Raises:
        CheckpointError: there is none; names the checkpoints that are there.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_SUFFIXES))
    except OSError as error:
        raise EnvironmentFailure(f"cannot be listed ({error.strerror})", where=str(folder)) from error
    raise CheckpointError(
        "is a folder without model.safetensors or pytorch_model.bin",
        where=str(folder),
        hint=f"pass one of its files: {listing(names)}" if names else "pass a checkpoint file",
    )


def read_shards(
    held: HeldFile, read: Callable[[Path], tuple[Mapping[str, torch.Tensor], HeldFile]]
) -> tuple[Mapping[str, torch.Tensor], list[HeldFile]]:
    """The tensors an index lists, in its order, and the files: itself and the shards.

    Where every shard is lazy, the tensors are, and each look-up makes sure that all files still have their
    names: they belong together, and a folder that is written again must not give old and new tensors.

    Raises:
        CheckpointError: malformed index, a shard outside the folder or missing, one that lacks a tensor, or
            a file that was changed or replaced meanwhile.
    """
    index = held.path
    table = _parsed(held.file.read(_JSON_LIMIT + 1), index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError("has no weight_map of names to files", where=str(index))
    loaded: dict[str, Mapping[str, torch.Tensor]] = {}
    files = [held]
    for name in sorted(set(table.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"names a shard outside its folder: '{short(name)}'", where=str(index))
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"shard '{short(name)}' is missing", where=str(index), hint="download the whole folder"
            )
        loaded[name], shard_file = read(index.parent / name)
        files.append(shard_file)
    for tensor, shard in table.items():
        if tensor not in loaded[shard]:
            raise CheckpointError(f"shard has no '{short(tensor)}'", where=str(index.parent / shard))
    state = gather(table, loaded)
    return _together(state, files) if isinstance(state, LazyState) else state, files


def _together(state: LazyState, files: list[HeldFile]) -> LazyState:
    def read(name: str) -> torch.Tensor:
        tensor = state[name]
        check_together(files)
        return tensor

    return LazyState(state.kinds, read)


def check_together(files: list[HeldFile]) -> None:
    """Make sure that files that belong together are those that were opened.

    Raises:
        CheckpointError: one was changed or replaced.
    """
    for file in files:
        file.check_name()


def named_in(folder: Path) -> str | None:
    """The architecture that a folder's ``config.json`` names, as a spec; None where it says nothing."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    config = json_object(path)
    name, classes = config.get("architecture"), config.get("num_classes")
    if isinstance(name, str) and _TIMM_NAME.fullmatch(name):
        return f"timm:{name}?num_classes={classes}" if isinstance(classes, int) else f"timm:{name}"
    return f"hf:{folder}" if config.get("architectures") and "?" not in str(folder) else None


def fields_with(data: Any, text: Any, path: str = "") -> Iterator[str]:
    """Names of the fields of a configuration that hold a text, within parts as ``text_config.hidden_act``."""
    for name, value in data.items() if isinstance(data, Mapping) else ():
        if isinstance(value, str) and value == text:
            yield f"{path}{short(name)}"
        yield from fields_with(value, text, f"{path}{short(name)}.")


def digest_of(files: Iterable[Path | HeldFile]) -> str:
    """SHA-256 of one file; of several, of the lines ``HASH  NAME`` sorted by name.

    Raises:
        EnvironmentFailure: a file cannot be read.
    """
    held = (file if isinstance(file, HeldFile) else HeldFile(file, CheckpointError) for file in files)
    lines = sorted((file.path.name, _file_digest(file)) for file in held)
    if len(lines) == 1:
        return lines[0][1]
    text = "".join(f"{digest}  {name}\n" for name, digest in lines)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _file_digest(file: HeldFile) -> str:
    try:
        return file.sha256()
    except OSError as error:
        raise EnvironmentFailure(f"cannot be read ({error.strerror})", where=str(file.path)) from error


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object in a regular file.

    Raises:
        CheckpointError: it holds no such thing, or is no regular file.
        EnvironmentFailure: it cannot be read.
    """
    try:
        return _parsed(read_regular(path, CheckpointError, _JSON_LIMIT + 1), path)
    except OSError as error:
        raise EnvironmentFailure(f"cannot be read ({error.strerror})", where=str(path)) from error


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    if len(text) > _JSON_LIMIT:
        raise CheckpointError("is too long for what it should be", where=str(path))
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("is not valid JSON", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("does not hold a JSON object", where=str(path))
    return data
