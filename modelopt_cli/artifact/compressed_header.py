"""Compressed headers: an artifact's header deflated, in front of the data, inside one tensor.

What the header of the plain form says twice is left out first: offsets that follow from types and
shapes, the network's list of tensors. ``docs/format.md`` says how it is read.
"""

from collections.abc import Mapping
from typing import Any, BinaryIO

from modelopt_cli.artifact import strictjson
from modelopt_cli.artifact.container import (
    MAX_HEADER,
    Layout,
    TensorInfo,
    check_names,
    is_size,
    tensor_bytes,
)
from modelopt_cli.artifact.deflate import EXPANSION, FREE, KEY, deflate, inflate
from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.artifact.header import BLANK, FORMAT, Document, damaged, expect, header_bytes
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.json_arguments import dtype_name

TENSOR = "modelopt"
"""Name of the one tensor of such a file."""

_STATED = {"digest", "format", KEY}
_INNER = {"history", "input", "labels", "network", "parameters", "program", "tied"}


def is_compressed(stated: Mapping[str, Any]) -> bool:
    """True if a file's metadata is that of one with a compressed header."""
    return KEY in stated


def inner_name(index: int, part: str) -> str:
    """Name of a part of the ``index``-th parameter where the file gives it none."""
    return f"{index}.{part}"


def compress_header(document: Document, tensors: Mapping[str, TensorInfo]) -> bytes:
    """Everything in front of the data, with the digest blank.

    Args:
        document: its parts named by :func:`inner_name`.
        tensors: in file order: parameter by parameter, parts by name.
    """
    text = inner_text(document, tensors)
    stream = deflate(text)
    total = len(stream) + max((info.end for info in tensors.values()), default=0)
    stated = {"digest": BLANK, "format": FORMAT, KEY: [len(stream), len(text)]}
    return header_bytes(stated, {TENSOR: TensorInfo("U8", (total,), 0, total)}) + stream


def expand_header(
    file: BinaryIO, outer: Layout, stated: dict[str, Any], where: str
) -> tuple[dict[str, Any], Layout]:
    """The document's JSON as in the plain form, not yet checked, and where the inner tensors are.

    Raises:
        ArtifactError: not as the format demands.
    """
    with damaged(where):
        expect(stated.keys() == _STATED, "missing or unknown header fields")
        short, long = _lengths(stated[KEY], outer)
        file.seek(outer.data_start)
        try:
            text = inflate(file.read(short), long)
        except ValueError as error:
            raise ArtifactError(str(error)) from None
    data = strictjson.parse(text, ArtifactError, where)
    with damaged(where):
        expect(data.keys() == _INNER, "missing or unknown header fields")
        tensors = _place(data["parameters"])
        end = max((info.end for info in tensors.values()), default=0)
        expect(outer.tensors[TENSOR].end == short + end, "more or fewer bytes than its parameters need")
        data["program"] = _with_tensors(data)
    data |= {"digest": stated["digest"], "format": stated["format"]}
    return data, Layout(tensors, outer.metadata, outer.data_start + short)


def inner_text(document: Document, tensors: Mapping[str, TensorInfo]) -> bytes:
    """The text of a header before it is compressed."""
    data = document.to_json()
    del data["digest"], data["format"]
    for entry in data["parameters"]:
        described = {part: tensors[name] for part, name in entry["parts"].items()}
        entry["parts"] = {part: [info.dtype, list(info.shape)] for part, info in described.items()}
    if data["program"] is not None:
        del data["program"]["tensors"]
    return strictjson.canonical(data)


def _lengths(stated: Any, outer: Layout) -> tuple[int, int]:
    """The header's compressed and full length, once they can be true."""
    expect(isinstance(stated, list) and len(stated) == 2 and all(map(is_size, stated)), "bad header lengths")
    expect(
        outer.tensors.keys() == {TENSOR} and outer.tensors[TENSOR].dtype == "U8",
        "bad outer tensors",
    )
    short, long = stated
    expect(short <= outer.tensors[TENSOR].end, "a compressed header that reaches beyond the file")
    expect(long <= min(MAX_HEADER, FREE + EXPANSION * short), "a compressed header that would be too long")
    return short, long


def _place(parameters: Any) -> dict[str, TensorInfo]:
    """Places of all parts; in ``parameters`` their names replace their types and shapes."""
    expect(isinstance(parameters, list), "bad parameters")
    position, placed = 0, {}
    for index, entry in enumerate(parameters):
        expect(isinstance(entry, dict) and isinstance(entry.get("parts"), dict), "bad codec parts")
        parts = entry["parts"]
        for part in sorted(parts):
            kind, name = parts[part], inner_name(index, part)
            expect(isinstance(kind, list) and len(kind) == 2, "bad codec parts")
            end = position + _part_bytes(name, *kind)
            placed[name] = TensorInfo(kind[0], tuple(kind[1]), position, end)
            parts[part], position = name, end
    return placed


def _part_bytes(name: str, dtype: Any, shape: Any) -> int:
    try:
        check_names([name], "", ArtifactError)
        return tensor_bytes(name, dtype, shape, "", ArtifactError)
    except ArtifactError as error:
        raise ArtifactError(f"a bad codec part: {error.message}") from None


def _with_tensors(data: dict[str, Any]) -> dict[str, Any] | None:
    """The network with its list of tensors, which the parameters' types and shapes imply."""
    program, tied = data["program"], data["tied"]
    if program is None:
        return None
    expect(isinstance(program, dict) and "tensors" not in program, "a bad program")
    expect(isinstance(program.get("tied"), dict) and isinstance(tied, dict), "a bad list of tied tensors")
    kinds = {}
    for entry in data["parameters"]:
        name, dtype = entry.get("name"), entry.get("dtype")
        expect(isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES, "a bad parameter")
        kinds[name] = {"dtype": dtype_name(DTYPES[dtype]), "shape": entry.get("shape")}
    expect(all(isinstance(owner, str) and owner in kinds for owner in tied.values()), "bad tied tensors")
    kinds |= {name: kinds[owner] for name, owner in tied.items()}
    return {**program, "tensors": {name: kinds[name] for name in kinds if name not in program["tied"]}}
