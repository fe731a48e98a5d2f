"""Shell completion of option values: choices with their descriptions, names of layers, data specs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from modelopt_cli.settings import Field, help_of

Complete = Callable[[typer.Context, str], list[tuple[str, str]]]
"""Takes the context and the beginning of the value; returns values and their descriptions."""

_LARGEST_HEADER = 100 << 20  # bytes, that of the safetensors format


def completion(field: Field) -> Complete | None:
    """The completion of an option's value; None leaves it to the shell, which offers files."""
    if field.setting.choices is not None:
        rows = field.setting.choices
        return lambda ctx, incomplete: [(name, help_of(row)) for name, row in rows.items()]
    return _layers if field.metavar == "GLOB" else None


def _layers(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    checkpoint = ctx.params.get("checkpoint")
    return [(name, "") for name in layer_names(Path(checkpoint))] if checkpoint else []


def layer_names(path: Path) -> list[str]:
    """Names of the layers with weights in a safetensors file, an artifact or not; of other files none.

    Reads the header alone and imports no torch, so that a key press costs no seconds.
    """
    try:
        names = _header(path)
    except (OSError, ValueError):
        return []
    return list(dict.fromkeys(layer for name in names for layer in _layer(name)))


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; raises OSError or ValueError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError("is no safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("is no safetensors file")
    return header


def _layer(name: str) -> Iterator[str]:
    """The layer that a tensor is the weight of, or a part of the weight of."""
    layer, found, rest = name.partition(".weight")
    if found and rest[:1] in ("", "."):
        yield layer
