"""The state of an interrupted training, in one safetensors file.

The container's metadata holds one JSON object under ``modelopt-state``: ``format``, ``about`` (whatever the
training says of itself) and ``sha256`` of ``about``, the other entries of the header and the tensors' bytes.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact import strictjson
from modelopt_cli.artifact.container import (
    METADATA,
    Layout,
    TensorInfo,
    check_names,
    read_layout,
    read_tensor,
)
from modelopt_cli.artifact.dtypes import NAMES, as_bytes
from modelopt_cli.artifact.header import arrange
from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.regular import open_regular
from modelopt_cli.settings import option

KEY = "modelopt-state"
FORMAT = 2


def _hint() -> str:
    return f"start over with {option('force', True)}"


@dataclass(frozen=True, eq=False)
class State:
    """Everything a training needs to go on as if it had never stopped.

    Attributes:
        tensors: by name, of any type torch can store; they come back on the CPU, contiguous, bit for bit.
        about: a JSON object: counters, the place in the epoch. Finite numbers and string keys only.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def write_state(state: State, path: str | Path) -> None:
    """Write ``state`` in one indivisible step, over an older one.

    Raises:
        EnvironmentFailure: no space or no permission.
        ModeloptError: a tensor or ``about`` cannot be stored (a bug of the caller).
    """
    tensors = {name: _host(name, tensor) for name, tensor in state.tensors.items()}
    check_names(tensors, "the training state", ArtifactError)
    placed = arrange({name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
    data = [_bytes(tensors[name]) for name in placed]
    about = json.loads(strictjson.canonical(state.about))
    meta = {"format": FORMAT, "about": about, "sha256": _digest(about, placed, data)}
    text = strictjson.canonical({METADATA: {KEY: strictjson.canonical(meta).decode()}, **_entries(placed)})
    text += b" " * (-len(text) % 8)
    atomic_write(path, [struct.pack("<Q", len(text)) + text, *data], force=True)


def read_state(path: str | Path) -> State:
    """Read what :func:`write_state` wrote.

    Raises:
        ArtifactError: missing, damaged, from a newer version, or no training state.
    """
    where = str(path)
    with open_regular(path, ArtifactError) as file:
        layout = read_layout(file, where, ArtifactError)
        meta = _metadata(layout, where)
        tensors = {
            name: read_tensor(file, layout, info, where, ArtifactError)
            for name, info in layout.tensors.items()
        }
    if _digest(meta["about"], layout.tensors, map(_bytes, tensors.values())) != meta["sha256"]:
        raise ArtifactError("does not match its digest", where=where, hint=_hint())
    return State(tensors, meta["about"])


def _metadata(layout: Layout, where: str) -> Mapping[str, Any]:
    if KEY not in layout.metadata:
        raise ArtifactError("is not a training state", where=where, hint=_hint())
    meta = strictjson.parse(layout.metadata[KEY].encode(), ArtifactError, where)
    version = meta.get("format")
    if type(version) is int and version > FORMAT:
        raise ArtifactError("was written by a newer modelopt", where=where, hint="update modelopt")
    if type(version) is int and 0 < version < FORMAT:
        raise ArtifactError("was written by an older modelopt", where=where, hint=_hint())
    if set(meta) != {"format", "about", "sha256"} or version != FORMAT or not isinstance(meta["about"], dict):
        raise ArtifactError("is a damaged training state", where=where, hint=_hint())
    return meta


def _host(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in NAMES or tensor.layout is not torch.strided or tensor.is_meta:
        raise ModeloptError(f"a tensor of type {tensor.dtype} cannot be stored", where=name)
    return tensor.detach().cpu().contiguous()


def _bytes(tensor: Tensor) -> memoryview:
    return as_bytes(tensor).numpy().data


def _entries(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
        for name, info in tensors.items()
    }


def _digest(about: dict[str, Any], tensors: Mapping[str, TensorInfo], data: Iterable[memoryview]) -> str:
    sha = hashlib.sha256(strictjson.canonical([about, _entries(tensors)]))
    for chunk in data:
        sha.update(chunk)
    return sha.hexdigest()
