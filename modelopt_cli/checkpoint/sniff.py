"""Kind of a file, from its first bytes; its name is never believed."""

import codecs
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modelopt_cli.errors import CheckpointError
from modelopt_cli.settings import option


@dataclass(frozen=True)
class FileKind:
    """A kind of checkpoint file.

    Attributes:
        name: in reports.
        zipped: its pickle is an entry of a zip file.
        headers: pickles before the one that holds the weights.
        bare: a pickle that ``torch.save`` did not write.
    """

    name: str
    zipped: bool = False
    headers: int = 0
    bare: bool = False


TORCH_ZIP = FileKind("torch-zip", zipped=True)
TORCH_LEGACY = FileKind("torch-legacy", headers=3)  # its magic number, version and system
PICKLE = FileKind("pickle", bare=True)
SAFETENSORS, PT2, INDEX = FileKind("safetensors"), FileKind("pt2"), FileKind("sharded")

_HEAD = 512
_EXPORT_SCRIPT = (
    'import sys,torch as t;t.save(t.jit.load(sys.argv[1],map_location="cpu").state_dict(),sys.argv[2])'
)

# First bytes of files people pass by mistake, and what to say. Longest first where one contains another.
_FOREIGN: Mapping[bytes, tuple[str, str]] = {
    b"version https://git-lfs": (
        "is a git-lfs pointer, not the file it stands for",
        "run `git lfs pull` to fetch it",
    ),
    b"\x89HDF\r\n": ("is an HDF5 file (Keras or TensorFlow weights)", "export the weights from PyTorch"),
    b"\x93NUMPY": ("is a NumPy array, not a checkpoint", "pass a PyTorch or safetensors file"),
    b"\x1f\x8b": ("is gzip-compressed", "decompress it first (gunzip, or tar -xzf)"),
    b"BZh": ("is bzip2-compressed", "decompress it first"),
    b"\xfd7zXZ": ("is xz-compressed", "decompress it first"),
    b"(\xb5/\xfd": ("is zstd-compressed", "decompress it first"),
    b"GGUF": ("is a GGUF file", "pass a PyTorch or safetensors file"),
    b"\x89PNG": ("is a PNG image", "pass a PyTorch or safetensors file"),
    b"\xff\xd8\xff": ("is a JPEG image", "pass a PyTorch or safetensors file"),
    b"\x7fELF": ("is a program, not a checkpoint", "pass a PyTorch or safetensors file"),
}
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def sniff(handle: BinaryIO, path: Path) -> FileKind:
    """The kind of checkpoint in an open file.

    Raises:
        CheckpointError: it is none that we read; the message says what it is instead.
    """
    handle.seek(0)
    head = handle.read(_HEAD)
    if not head:
        raise CheckpointError("is empty (0 bytes)", where=str(path), hint="copy or download it again")
    for magic, (problem, hint) in _FOREIGN.items():
        if head.startswith(magic):
            raise CheckpointError(problem, where=str(path), hint=hint)
    if head.startswith(b"PK"):
        return _sniff_zip(handle, path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return SAFETENSORS
    if head[:1] == b"\x80" and 2 <= head[1] <= 5 if len(head) > 1 else False:
        return TORCH_LEGACY if _LEGACY_MAGIC in head[:32] else PICKLE
    if head[257:262] == b"ustar":
        raise CheckpointError("is a tar archive", where=str(path), hint="unpack it and pass the file inside")
    return _sniff_text(head, path)


def _sniff_zip(handle: BinaryIO, path: Path) -> FileKind:
    names = {name.split("/", 1)[-1] for name in open_zip(handle, path).namelist()}
    if "constants.pkl" in names:
        raise CheckpointError(
            "is a TorchScript archive, which holds code",
            where=str(path),
            hint=f"where you trust it, keep its weights: {convert_command(_EXPORT_SCRIPT, path)}",
        )
    if "data.pkl" in names:
        return TORCH_ZIP
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return PT2
    if any(name.endswith(".npy") for name in names):
        raise CheckpointError(
            "is a NumPy archive", where=str(path), hint=f"{option('data', 'npz:FILE')} takes data"
        )
    raise CheckpointError(
        "is a zip file, but not one that torch.save wrote (no data.pkl in it)",
        where=str(path),
        hint="unpack it and pass the checkpoint inside",
    )


def open_zip(handle: BinaryIO, path: Path) -> zipfile.ZipFile:
    """The zip directory of an open file; nothing is unpacked.

    Raises:
        CheckpointError: there is no readable directory, as in a file that was cut short.
    """
    handle.seek(0)
    try:
        return zipfile.ZipFile(handle)
    except Exception as error:  # zipfile raises half a dozen types on damaged directories
        size = handle.seek(0, 2)
        raise CheckpointError(
            f"is damaged or cut short: its {size:,} bytes do not end in a zip directory",
            where=str(path),
            hint="copy or download it again",
        ) from error


def _sniff_text(head: bytes, path: Path) -> FileKind:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            "is a web page, not a checkpoint",
            where=str(path),
            hint="the download gave an error or login page; fetch the file itself",
        )
    if start.startswith(b"{") and path.name.endswith(".index.json"):
        return INDEX
    problem = "is a text file" if _is_text(head) else "is not a PyTorch or safetensors file"
    raise CheckpointError(problem, where=str(path), hint="pass a .pth, .pt, .ckpt, .bin or .safetensors file")


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\t\r\n\f" for c in text)


def convert_command(script: str, path: Path) -> str:
    """A ``python -c`` line that writes ``NAME-weights.pth`` next to ``path``; both names are quoted."""
    target = path.with_name(f"{path.stem}-weights.pth")
    return f"python -c '{script}' {shlex.quote(str(path))} {shlex.quote(str(target))}"
