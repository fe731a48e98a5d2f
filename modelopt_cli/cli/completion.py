"""Shell completion of option values: choices with their descriptions, names of layers, data specs."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

import typer

from modelopt_cli.artifact.deflate import KEY, inflate
from modelopt_cli.settings import Field, help_of

Complete = Callable[[typer.Context, str], list[tuple[str, str]]]
"""Takes the context and the beginning of the value; returns values and their descriptions."""

_LARGEST_HEADER = 100 << 20  # bytes, that of the safetensors format


def completion(field: Field) -> Complete | None:
    """The completion of an option's value; None leaves it to the shell, which offers files."""
    if field.setting.choices is not None:
        rows = field.setting.choices
        return lambda ctx, incomplete: [(name, help_of(row)) for name, row in rows.items()]
    if (suggest := field.setting.suggest) is not None:
        return lambda ctx, incomplete: list(suggest().items())
    return _layers if field.setting.of_layers else None


def architectures() -> dict[str, str]:
    """Names for ``--arch`` with what their input is: the networks of this package and of torchvision.

    timm's names are known to timm alone, which takes long to import, so only their beginning is offered.
    """
    from modelopt_cli.checkpoint.builtin_table import BUILTINS

    names = {f"builtin:{name}": f"{row.channels}x{row.size}x{row.size}" for name, row in BUILTINS.items()}
    table = json.loads((files("modelopt_cli") / "checkpoint" / "fingerprints.json").read_text("utf-8"))
    for name, network in table["networks"].items():
        if "?" not in name:
            names[f"torchvision:{name}"] = _shape(network["inputs"][0])
    return names | {"timm:": "any network of timm", "hf:": "the network of a Hugging Face folder"}


def _shape(data: Mapping[str, Any]) -> str:
    """The shape of an input as ``checkpoint.fingerprint`` stores it."""
    crop = data.get("crop")
    shape = data["shape"] if "shape" in data else [3, *([crop, crop] if crop else data["resize"])]
    return "x".join(map(str, shape))


def join_at_colons(environ: MutableMapping[str, str]) -> str:
    """Undo bash's parting of words at colons, which are parts of values here.

    Args:
        environ: with the words that bash tells a completion, which are changed.

    Returns:
        The beginning of the word that is completed which bash keeps, up to its last colon.
    """
    if "COMP_WORDS" not in environ:  # another shell
        return ""
    text, place = environ["COMP_WORDS"], int(environ["COMP_CWORD"])
    words = text.split("\n" if "\n" in text else " ")
    joined: list[str] = []
    for word in words[: place + 1]:
        if joined and word and (word.startswith(":") or joined[-1].endswith(":")):
            joined[-1] += word
        else:
            joined.append(word)
    environ["COMP_WORDS"] = "\n".join((*joined, *words[place + 1 :]))
    environ["COMP_CWORD"] = str(len(joined) - 1)
    return joined[-1][: joined[-1].rfind(":") + 1]


def _layers(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    # The context knows no arguments where the line ends in an option that still waits for its value.
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    names = (name for word in line.split() for name in layer_names(Path(word).expanduser()))
    return [(name, "") for name in names]


def layer_names(path: Path) -> list[str]:
    """Names of the layers with weights in a safetensors file, an artifact or not; of other files none.

    Reads the header alone and imports no torch, so that a key press costs no seconds.
    """
    try:
        with path.open("rb") as file:
            names = _tensors(file) if path.is_file() else []
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return list(dict.fromkeys(layer for name in names for layer in _layer(str(name))))


def _tensors(file: BinaryIO) -> list[str]:
    """The names in a header; raises one of many exceptions if it is none."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise ValueError("is no safetensors file")
    header = json.loads(file.read(length))
    stated = json.loads(header.pop("__metadata__", {}).get("modelopt", "{}"))
    if KEY not in stated:
        return list(header)
    short, long = stated[KEY]
    if long > _LARGEST_HEADER:
        raise ValueError("is no artifact")
    return [parameter["name"] for parameter in json.loads(inflate(file.read(short), long))["parameters"]]


def _layer(name: str) -> Iterator[str]:
    """The layer that a tensor is the weight of, or a part of the weight of."""
    layer, separator, suffix = name.partition(".weight")
    if separator and suffix[:1] in ("", "."):
        yield layer
