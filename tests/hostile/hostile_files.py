"""Files that mean harm, made from seeds: malformed headers, pickles, bombs, damaged copies of good files."""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hostile_exports import bad_exports, changed_exports, good_export
from hostile_graphs import GRAPHS, graph, quantized_program
from safetensors.torch import save_file

from modelopt_cli import artifact
from modelopt_cli.artifact.header import BLANK, digest_of, header_bytes, with_digest

State = dict[str, torch.Tensor]
Case = tuple[str, bytes]
"""A file's name, whose suffix means nothing to the tool, and its bytes."""


def small_state() -> State:
    """A few tensors of several types."""
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=drawn)
    return {"fc.weight": weight, "fc.bias": torch.zeros(6), "steps": torch.tensor(3)}


@cache
def good_files() -> dict[str, bytes]:
    """One good file of each format, by name."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder, state = Path(name), small_state()
        torch.save(state, folder / "zip.pth")
        torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
        save_file(state, folder / "plain.safetensors")
        artifact.write_tensors(state, {}, folder / "tensors.safetensors")
        artifact.write_program(quantized_program(), folder / "program.safetensors")
        artifact.write_program(quantized_program(), folder / "sealed.safetensors", code="entropy")
        (folder / "network.pt2").write_bytes(good_export())
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


ARTIFACTS = ("tensors.safetensors", "program.safetensors", "sealed.safetensors")


def flips(rng: random.Random, name: str, count: int) -> Iterator[Case]:
    """A good artifact with one byte changed: each of the first 200, then ``count`` others."""
    data = good_files()[name]
    later = rng.sample(range(200, len(data)), min(count, len(data) - 200))
    for at in (*range(200), *later):
        yield f"{name} byte {at}", data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def mutations(rng: random.Random, count: int) -> Iterator[Case]:
    """Good files cut, repeated, overwritten, or mixed with others."""
    names = list(good_files())
    for number in range(count):
        name = names[number % len(names)]
        data = bytearray(good_files()[name])
        for _ in range(rng.choice((1, 1, 2, 8))):
            at, length = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 64))
            other = good_files()[rng.choice(names)]
            begin = rng.randrange(len(other))
            data[at : at + rng.choice((0, length))] = rng.choice(
                (b"", rng.randbytes(length), b"\xff" * length, b"\0" * length, other[begin : begin + length])
            )
            if not data:
                data = bytearray(b"\0")
        yield f"mutation {number} of {name}", bytes(data)


CALLS = (
    "os system", "posix system", "builtins exec", "builtins eval", "builtins __import__", "subprocess Popen",
    "subprocess check_output", "runpy run_path", "torch.hub load", "torch load", "importlib import_module",
    "pickle loads", "shutil rmtree", "builtins getattr", "operator attrgetter", "functools partial",
    "torch._utils _rebuild_tensor_v2", "torch.jit load", "numpy load", "webbrowser open", "ctypes CDLL",
    "torch.serialization _load", "builtins open", "codecs encode", "torch.fx Graph",
)  # fmt: skip


def pickles(rng: random.Random, canary: Path) -> Iterator[Case]:
    """Pickles that call something while they load, in every container; ``canary`` appears if one does."""
    command = f"touch {canary}"
    for target in CALLS:
        module, name = target.split()
        for argument in (command, f"open({str(canary)!r},'w')"):
            yield from contained(f"{target} {argument[:5]}", _calling(rng, module, name, argument))


def _calling(rng: random.Random, module: str, name: str, argument: str) -> bytes:
    """A pickle of a dict that holds the result of a call, made with one of the ways there are."""
    text = pickle.SHORT_BINUNICODE + bytes([len(argument.encode())]) + argument.encode()
    named = pickle.GLOBAL + f"{module}\n{name}\n".encode()
    stacked = b"".join(pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in (module, name))
    ways = (
        named + text + pickle.TUPLE1 + pickle.REDUCE,
        stacked + pickle.STACK_GLOBAL + text + pickle.TUPLE1 + pickle.REDUCE,
        pickle.MARK + text + pickle.INST + f"{module}\n{name}\n".encode(),
        pickle.MARK + named + text + pickle.OBJ,
        named + text + pickle.TUPLE1 + pickle.NEWOBJ,
        named
        + pickle.EMPTY_TUPLE
        + pickle.NEWOBJ
        + pickle.EMPTY_DICT
        + text
        + text
        + pickle.SETITEM
        + pickle.BUILD,
    )
    key = pickle.SHORT_BINUNICODE + b"\x01w"
    protocol = pickle.PROTO + bytes([rng.choice((2, 3, 4, 5))])
    return protocol + pickle.EMPTY_DICT + key + rng.choice(ways) + pickle.SETITEM + pickle.STOP


def contained(name: str, content: bytes) -> Iterator[Case]:
    """A pickle as it is, in a zip as torch.save writes them, and after the head of a legacy file."""
    yield f"{name} bare", content
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("archive/data.pkl", content)
        made.writestr("archive/version", "3\n")
        made.writestr("archive/byteorder", "little")
    yield f"{name} zip", archive.getvalue()
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    yield f"{name} legacy", head + content + pickle.dumps([], 2)


def container(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, as JSON or as bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def bombs() -> Iterator[Case]:
    """Small files that ask for much: memory, time, depth."""
    huge = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "a tensor of 4 TB", container({"w": huge})
    yield "an empty shape of 2**60", container({"w": empty | {"shape": [0, 2**31, 2**31]}})
    entry = json.dumps(empty).encode()
    many = b",".join(b'"%d":' % i + entry for i in range(300_000))
    yield "300,000 tensors", container(b"{" + many + b"}")
    yield "a header of 2**63", struct.pack("<Q", 2**63) + b"{}"
    yield "nested JSON", container(b'{"w":' + b"[" * 10**6)
    yield "a number of a million digits", container(b'{"w":' + b"9" * 10**6 + b"}")
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bytes(64 << 20))
    yield "a zip that unpacks to 64 MB", deflated.getvalue()
    lists = pickle.PROTO + b"\x02" + pickle.EMPTY_LIST * 20_000 + pickle.APPEND * 19_999 + pickle.STOP
    yield from contained("a deep list", lists)
    laughs = pickle.PROTO + b"\x02" + pickle.EMPTY_LIST + pickle.BINPUT + b"\0"
    for level in range(1, 40):
        laughs += pickle.EMPTY_LIST + pickle.BINPUT + bytes([level])
        laughs += (pickle.BINGET + bytes([level - 1]) + pickle.APPEND) * 10
    yield from contained("a billion lists", laughs + pickle.STOP)
    yield from contained("a string of 2**60", b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.")
    yield from contained("a number of 2**31 bytes", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.")
    archive = io.BytesIO()
    torch.save({"w": torch.ones(1).expand(1 << 40)}, archive)
    yield "a view of 4 TB", archive.getvalue()
    nodes = [("torch.relu", [{"node": "x"}], {}), *[("torch.relu", [{"back": 1}], {})] * 21_000]
    yield "21,000 nodes", forged(graph(nodes))


def graphs() -> Iterator[Case]:
    """Artifacts in order but for a graph that asks for too much or cannot run."""
    for name, calls in GRAPHS.items():
        yield name, forged(graph(calls))


def document(program: dict[str, Any]) -> dict[str, Any]:
    """What an artifact without tensors says whose graph is this."""
    once = {name: program[name] for name in ("history", "input", "labels")}
    inner = {name: value for name, value in program.items() if name not in (*once, "arch")}
    stated = {"digest": BLANK, "format": 1, "parameters": [], "tied": {}, "network": None, "program": inner}
    return stated | once


def with_right_digest(stated: dict[str, Any]) -> bytes:
    """An artifact that says this, with its right digest."""
    head = header_bytes(stated, {})
    return with_digest(head, digest_of(head, []))


def forged(program: dict[str, Any]) -> bytes:
    """An artifact without tensors whose digest is right, and whose graph is this."""
    return with_right_digest(document(program))


def malformed(rng: random.Random, count: int) -> Iterator[Case]:
    """Artifacts of the right form with one value wrong, their digest right."""
    for number in range(count):
        stated = document(graph([("torch.relu", [{"node": "x"}], {})]))
        target, key = _somewhere(rng, stated)
        if key != "digest":
            target[key] = rng.choice(_WRONG)
        yield f"malformed {number}", with_right_digest(stated)


_WRONG: tuple[Any, ...] = (
    None,
    -1,
    2**80,
    1.5,
    "",
    "a\nb",
    "__class__",
    [],
    {},
    [[]],
    True,
    "x" * 5000,
    ["x"],
    {"x": 1},
)


def _somewhere(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A random place in nested lists and dicts: what holds it, and its key there."""
    places = []
    pending = [value]
    while pending:
        item = pending.pop()
        entries = (
            item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        )
        for key, inner in entries:
            places.append((item, key))
            pending.append(inner)
    return rng.choice(places)


GENERATORS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "flips": lambda rng, _: (case for name in ARTIFACTS for case in flips(rng, name, 40)),
    "mutations": lambda rng, _: mutations(rng, 150),
    "pickles": pickles,
    "bombs": lambda rng, _: bombs(),
    "graphs": lambda rng, _: graphs(),
    "malformed": lambda rng, _: malformed(rng, 60),
    "exports": lambda _, canary: bad_exports(canary),
    "changed exports": lambda rng, _: changed_exports(
        lambda document: _somewhere(rng, document), lambda: rng.choice(_WRONG), 60
    ),
}
"""By name: cases from a random state, and the path of the canary."""

MAY_BE_GOOD = frozenset({"mutations", "malformed", "changed exports"})
"""Where a file may come out that nothing is wrong with, or nothing that anybody could know."""

DESCRIBED = frozenset({"graphs", "exports"})
"""Where ``inspect`` may list the tensors, because only the graph is out of order."""
