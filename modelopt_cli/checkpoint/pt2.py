"""The tensors of a ``.pt2`` file, and the JSON of its graph, without ``torch.export.load``.

``torch.export.load`` (torch 2.13) unpickles constants with ``pickle.loads`` and evaluates symbolic
expressions, so it runs what the file says. Tensors are raw bytes next to a JSON table; those are read, and
what is pickled is not.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from modelopt_cli.checkpoint.sniff import open_zip
from modelopt_cli.checkpoint.torch_file import check_zip
from modelopt_cli.errors import CheckpointError
from modelopt_cli.text import short

# torch/_export/serde/schema.py, ScalarType and Layout; part of the file format.
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_STRIDED = 7
_TABLE_LIMIT = 64 << 20


@dataclass(frozen=True)
class Archive:
    """Contents of a ``.pt2`` file.

    Attributes:
        weights: parameters and buffers by name; those of one tensor are one.
        constants: tensors that the graph holds besides, and buffers that are not saved.
        model: JSON of the network's graph; None where there is none, or more than one.
    """

    weights: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    model: bytes | None


def read_pt2(handle: BinaryIO, path: Path) -> Archive:
    """Read the tensors of an archive, and the text of its graph.

    Raises:
        CheckpointError: damaged, of an older layout, or with weights that are pickled.
    """
    check_zip(handle, path)
    archive = open_zip(handle, path)
    try:
        names = archive.namelist()
        tables = [n for n in names if n.endswith("/data/weights/model_weights_config.json")]
        if len(tables) != 1:
            raise _refuse(path, "holds no table of plain weights")
        weights = _tensors(archive, tables[0], path)
        root = tables[0].removesuffix("data/weights/model_weights_config.json")
        table, model = f"{root}data/constants/model_constants_config.json", f"{root}models/model.json"
        constants = _tensors(archive, table, path, pickled=False) if table in names else {}
        return Archive(weights, constants, _text(archive, model, path) if names.count(model) == 1 else None)
    except CheckpointError:
        raise
    except Exception as error:  # JSON and zip entries of a damaged file fail in many ways
        raise _refuse(path, "its weights cannot be read, it is damaged") from error


def _tensors(
    archive: zipfile.ZipFile, table: str, path: Path, *, pickled: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors of a table, by name; those that lie in the same place are one.

    Args:
        archive: the file.
        table: name of its entry.
        path: the file's, for messages.
        pickled: refuse a table that has pickled ones, rather than leave them out.
    """
    folder = table.rsplit("/", 1)[0]
    flat: dict[str, bytearray] = {}
    made: dict[str, torch.Tensor] = {}
    tensors = {}
    for name, entry in json.loads(_text(archive, table, path))["config"].items():
        if entry["use_pickle"] and pickled:
            raise _refuse(path, f"weight '{short(name)}' is pickled")
        if entry["use_pickle"]:
            continue
        place, meta = f"{folder}/{entry['path_name']}", entry["tensor_meta"]
        if place not in flat:
            flat[place] = bytearray(archive.read(place))
        key = json.dumps([place, meta["dtype"], meta["sizes"], meta["strides"], meta["storage_offset"]])
        if key not in made:
            made[key] = _tensor(name, meta, flat[place], path)
        tensors[name] = made[key]
    return tensors


def _text(archive: zipfile.ZipFile, entry: str, path: Path) -> bytes:
    if archive.getinfo(entry).file_size > _TABLE_LIMIT:
        raise _refuse(path, f"its {entry.rpartition('/')[2]} is too long")
    return archive.read(entry)


def _tensor(name: str, meta: Mapping[str, Any], data: bytearray, path: Path) -> torch.Tensor:
    dtype = _DTYPES.get(meta["dtype"])
    if dtype is None or meta["layout"] != _STRIDED:
        raise _refuse(path, f"weight '{short(name)}' is not a plain dense tensor")
    sizes = [int(size["as_int"]) for size in meta["sizes"]]
    strides = [int(stride["as_int"]) for stride in meta["strides"]]
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype)
    return flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))


def _refuse(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        problem,
        where=str(path),
        hint="save the network's state_dict() with torch.save or safetensors instead",
    )
