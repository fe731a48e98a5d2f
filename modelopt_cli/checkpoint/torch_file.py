"""The one ``torch.load`` of the tree, and what stands around it.

``weights_only=True`` keeps a pickle from running code; objects that are no tensors become stand-ins. It is
not a boundary against everything else: a compressed zip entry can ask for gigabytes, and a damaged file fails
with whatever exception the unpickler happens to meet. So the zip directory is checked before, and every
exception becomes ours.
"""

import contextlib
import io
import pickletools
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch

from modelopt_cli.checkpoint.sniff import FileKind, convert_command, open_zip
from modelopt_cli.checkpoint.standins import Survey, runs_code, survey, unwrapped_classes
from modelopt_cli.checkpoint.tensor_checks import MAX_TENSORS
from modelopt_cli.errors import CheckpointError, a_or_an
from modelopt_cli.text import first_line, short

# Runs only where the user runs it: loads with the original code, keeps names and tensors.
# Where modelopt is there, it goes first: torchvision may not import without it, see ``_torchvision``.
_FIRST = (
    'import sys,importlib.util as u,torch as t;u.find_spec("modelopt_cli") and __import__("modelopt_cli");'
)
_LOAD = f'{_FIRST}m=t.load(sys.argv[1],"cpu",weights_only=False);'
_UNPICKLE = f'{_FIRST}import pickle;m=pickle.load(open(sys.argv[1],"rb"));'
_KEEP_WEIGHTS = (
    'm=m.get("state_dict",m.get("model",m)) if isinstance(m,dict) else m;'
    't.save(m.state_dict() if hasattr(m,"state_dict") else '
    "{k:v for k,v in m.items() if t.is_tensor(v)},sys.argv[2])"
)
_SCAN_LIMIT = 64 << 20
_SURVEY_LIMIT = 16 << 20  # bytes of a pickle; that of a training checkpoint with 10,000 tensors has 3 MB
_REFUSED = re.compile(
    r"GLOBAL (?P<not_allowed>\S+) was not an allowed global"
    r"|GLOBAL (?P<blocked>\S+) whose module \S+ is blocked"
    r"|unrecognized function (?P<called>.+)"
)


def load_object(handle: BinaryIO, path: Path, kind: FileKind) -> Any:
    """Load a file of ``torch.save``: dicts and lists of CPU tensors and scalars, and stand-ins for the rest.

    Args:
        handle: the open file, so that what was checked and hashed is what is read.
        path: its name, for messages.
        kind: what it is.

    Raises:
        CheckpointError: the file is damaged, was not written by ``torch.save``, or would run code.
    """
    if kind.zipped:
        check_zip(handle, path)
    content = _pickle_bytes(handle, path, kind)
    surveyed = _surveyed(content, kind)
    stand_ins = surveyed.stand_ins(map(_name_of, torch.serialization.get_safe_globals()))
    if surveyed.modules:
        handle = io.BytesIO(unwrapped_classes(_whole(handle), surveyed.modules))
    handle.seek(0)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # about the pickle protocol and old storages; nothing to act on
            return torch.load(handle, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # six types seen on damaged files; a seventh must not escape either
        raise _explain(error, content, path, kind) from error


def _surveyed(content: bytes, kind: FileKind) -> Survey:
    """Survey of the names in the pickle of a file of ``torch.save``."""
    stream = io.BytesIO(content[:_SURVEY_LIMIT])
    with contextlib.suppress(Exception):  # damaged before it
        for _ in range(kind.headers):
            for _opcode in pickletools.genops(stream):
                pass
    return survey(stream)


def _name_of(allowed: Any) -> str:
    """The name by which a class that the user's own program has allowed is found."""
    return str(allowed[1]) if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"


def check_zip(handle: BinaryIO, path: Path) -> None:
    """Refuse a zip that unpacks to more than the file holds.

    torch.save stores its entries uncompressed, so their sizes never add up to more than the file's.

    Raises:
        CheckpointError: names both sizes.
    """
    entries = open_zip(handle, path).infolist()
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"holds {len(entries):,} entries; {MAX_TENSORS:,} can be read", where=str(path))
    unpacked, size = sum(entry.file_size for entry in entries), handle.seek(0, 2)
    if unpacked > size:
        raise CheckpointError(
            f"its {size:,} bytes unpack to {unpacked:,}, which torch.save never does",
            where=str(path),
            hint="if you re-zipped it, store it uncompressed (zip -0)",
        )


def _explain(error: Exception, content: bytes, path: Path, kind: FileKind) -> CheckpointError:
    where = str(path)
    refusal = _REFUSED.search(str(error))
    named = [_full(next(group for group in refusal.groups() if group))] if refusal else _globals(content)
    running = [name for name in named if runs_code(name)]
    if running or (refusal and refusal["blocked"]):
        return CheckpointError(
            f"asks to call {short((running or named)[0])} while it loads, which is code and was not run",
            where=where,
            hint="do not load it elsewhere either; get the weights from a source you trust",
        )
    if refusal:
        problem = f"holds {a_or_an(short(named[0]))}, which cannot be read without running code"
        return CheckpointError(problem, where=where, hint=_hint(path, kind))
    if kind.bare:
        return CheckpointError(
            "is a pickle that torch.save did not write", where=where, hint=_hint(path, kind)
        )
    if "Unsupported operand" in str(error) and content[:2] in (b"\x80\x04", b"\x80\x05"):
        problem = "was saved with a pickle protocol above 3, which torch reads only where code may run"
        return CheckpointError(problem, where=where, hint=_hint(path, kind))
    return CheckpointError(
        f"cannot be read, it is damaged or cut short ({first_line(_useful(error))})",
        where=where,
        hint="copy or download it again",
    )


def _full(name: str) -> str:
    """A name out of torch's message, which leaves out ``builtins.``."""
    return name if "." in name or " " in name else f"builtins.{name}"


def _globals(content: bytes) -> list[str]:
    """Every ``module.name`` that a file's pickles mention, read without running them."""
    names: list[str] = []
    with contextlib.suppress(Exception):  # a damaged pickle ends the walk where it is damaged
        stream = io.BytesIO(content)
        while True:
            strings: list[str] = []
            for opcode, argument, _position in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return names


def _pickle_bytes(handle: BinaryIO, path: Path, kind: FileKind) -> bytes:
    """The pickle in a file, as far as it can be had; never more than 64 MiB."""
    if not kind.zipped:
        handle.seek(0)
        return handle.read(_SCAN_LIMIT)
    with contextlib.suppress(Exception):  # the entry may be as damaged as the rest
        archive = open_zip(handle, path)
        entry = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(entry) as stream:
            return stream.read(_SCAN_LIMIT)
    return b""


def _whole(handle: BinaryIO) -> bytes:
    handle.seek(0)
    return handle.read()


def _hint(path: Path, kind: FileKind) -> str:
    script = (_UNPICKLE if kind.bare else _LOAD) + _KEEP_WEIGHTS
    return f"if you trust it, convert it where its classes can be imported: {convert_command(script, path)}"


def _useful(error: Exception) -> str | Exception:
    """torch wraps the unpickler's words in a page of advice; the useful line comes after it."""
    return str(error).partition("WeightsUnpickler error:")[2] or error
