"""The weights of a ``.pt2`` file, without ``torch.export.load``.

``torch.export.load`` (torch 2.13) unpickles constants with ``pickle.loads`` and evaluates symbolic
expressions, so it runs what the file says. The weights themselves are raw bytes next to a JSON table;
they are all that is taken.
"""

import json
import math
from collections.abc import Mapping
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


def read_pt2(handle: BinaryIO, path: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name.

    Raises:
        CheckpointError: damaged, of an older layout, or with weights that are pickled.
    """
    check_zip(handle, path)
    archive = open_zip(handle, path)
    try:
        tables = [n for n in archive.namelist() if n.endswith("/data/weights/model_weights_config.json")]
        if len(tables) != 1:
            raise _refuse(path, "holds no table of plain weights")
        folder = tables[0].rsplit("/", 1)[0]
        if archive.getinfo(tables[0]).file_size > _TABLE_LIMIT:
            raise _refuse(path, "its table of weights is too long")
        config = json.loads(archive.read(tables[0]))["config"]
        return {
            str(name): _tensor(str(name), entry, archive.read(f"{folder}/{entry['path_name']}"), path)
            for name, entry in config.items()
        }
    except CheckpointError:
        raise
    except Exception as error:  # JSON and zip entries of a damaged file fail in many ways
        raise _refuse(path, "its weights cannot be read, it is damaged") from error


def _tensor(name: str, entry: Mapping[str, Any], data: bytes, path: Path) -> torch.Tensor:
    if entry["use_pickle"]:
        raise _refuse(path, f"weight '{short(name)}' is pickled")
    meta = entry["tensor_meta"]
    dtype = _DTYPES.get(meta["dtype"])
    if dtype is None or meta["layout"] != _STRIDED:
        raise _refuse(path, f"weight '{short(name)}' is not a plain dense tensor")
    sizes = [int(size["as_int"]) for size in meta["sizes"]]
    strides = [int(stride["as_int"]) for stride in meta["strides"]]
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))


def _refuse(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        problem,
        where=str(path),
        hint="save the network's state_dict() with torch.save or safetensors instead",
    )
