"""Checkpoints of several files: Hugging Face folders and sharded weights with an index."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from modelopt_cli.artifact.lazy import gather
from modelopt_cli.checkpoint.text import listing, printable
from modelopt_cli.errors import CheckpointError, EnvironmentFailure
from modelopt_cli.regular import open_regular, read_regular

WEIGHTS = (
    "model.safetensors.index.json", "model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip
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
    index: Path, read: Callable[[Path], Mapping[str, torch.Tensor]]
) -> tuple[Mapping[str, torch.Tensor], list[Path]]:
    """The tensors an index lists, in its order, and the shard files; lazy where every shard is.

    Raises:
        CheckpointError: malformed index, a shard outside the folder or missing, or one that lacks a tensor.
    """
    table = _json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError("has no weight_map of names to files", where=str(index))
    loaded: dict[str, Mapping[str, torch.Tensor]] = {}
    for name in sorted(set(table.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"names a shard outside its folder: '{printable(name)}'", where=str(index))
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"shard '{printable(name)}' is missing", where=str(index), hint="download the whole folder"
            )
        loaded[name] = read(index.parent / name)
    for tensor, shard in table.items():
        if tensor not in loaded[shard]:
            raise CheckpointError(f"shard has no '{printable(tensor)}'", where=str(index.parent / shard))
    return gather(table, loaded), [index.parent / name for name in loaded]


def folder_arch(folder: Path) -> str | None:
    """The architecture that a ``config.json`` names, as words for a message; None where it says nothing."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = _json(path)
    name, classes = config.get("architecture"), config.get("architectures")
    if isinstance(name, str):
        return f"config.json names timm's {printable(name)}: try --arch timm:{printable(name)}"
    if isinstance(classes, list) and classes:
        return f"config.json names the transformers class {printable(classes[0])}"
    return None


def digest_of(paths: Iterable[Path]) -> str:
    """SHA-256 of one file; of several, of the lines ``HASH  NAME`` sorted by name.

    Raises:
        EnvironmentFailure: a file cannot be read.
    """
    lines = sorted((path.name, _file_digest(path)) for path in paths)
    if len(lines) == 1:
        return lines[0][1]
    text = "".join(f"{digest}  {name}\n" for name, digest in lines)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with open_regular(path, CheckpointError) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise EnvironmentFailure(f"cannot be read ({error.strerror})", where=str(path)) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise CheckpointError("is too long for what it should be", where=str(path))
        data = json.loads(read_regular(path, CheckpointError))
    except OSError as error:
        raise EnvironmentFailure(f"cannot be read ({error.strerror})", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("is not valid JSON", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("does not hold a JSON object", where=str(path))
    return data
