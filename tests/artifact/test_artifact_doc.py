"""docs/format.md is enough to write a reader: here is one, standard library only."""

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path

import pytest
import torch

from modelopt_cli.artifact import compressed_header, save, write_tensors
from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.program import Encoding

DOC = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
DICTIONARY = (Path(compressed_header.__file__).parent / "compressed_header.txt").read_bytes()
FORMATS = {"F32": "f", "I8": "b", "I64": "q"}


def read_as_documented(path):
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    assert content[8:51] == rb'{"__metadata__":{"modelopt":"{\"digest\":\"'
    assert hashlib.sha256(content[:51] + b"0" * 64 + content[115:]).hexdigest() == content[51:115].decode()
    header = json.loads(content[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")["modelopt"])
    if "sealed" in document:
        document, header, length = expand(document, content, length)
    tensors = {}
    for name, entry in header.items():
        count = math.prod(entry["shape"])
        place = 8 + length + entry["data_offsets"][0]
        tensors[name] = struct.unpack_from(f"<{count}{FORMATS[entry['dtype']]}", content, place)
    state = {}
    for parameter in document["parameters"]:
        parts = {part: tensors[name] for part, name in parameter["parts"].items()}
        state[parameter["name"]] = decode(parameter, parts)
    return {**state, **{name: state[owner] for name, owner in document["tied"].items()}}, document


def expand(stated, content, length):
    short, long = stated["sealed"]
    start = 8 + length
    text = zlib.decompressobj(-15, zdict=DICTIONARY).decompress(content[start : start + short])
    assert len(text) == long
    document, header, position = json.loads(text), {}, 0
    for index, parameter in enumerate(document["parameters"]):
        for part, (dtype, shape) in sorted(parameter["parts"].items()):
            end = position + math.prod(shape) * struct.calcsize(FORMATS[dtype])
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            header[index, part], position = entry, end
            parameter["parts"][part] = (index, part)
    assert start + short + position == len(content)
    return document, header, length + short


def decode(parameter, parts):
    if parameter["codec"] == "raw":
        return list(parts["values"])
    shape, params, found = parameter["shape"], parameter["params"], []
    for flat, value in enumerate(parts["values"]):
        if params["axis"] is not None:
            index = flat // math.prod(shape[params["axis"] + 1 :]) % shape[params["axis"]]
        elif params["group"] is not None:
            row, column = divmod(flat, shape[-1])
            index = row * -(-shape[-1] // params["group"]) + column // params["group"]
        else:
            index = 0
        zero = parts["zero_point"][index] if "zero_point" in parts else 0
        exact = (value - zero) * parts["scale"][index]  # 9 by 24 bits: exact in binary64
        found.append(struct.unpack("<f", struct.pack("<f", exact))[0])
    return found


@pytest.mark.parametrize("code", ["plain", "entropy"])
def test_a_reader_written_from_the_document_reads_the_same_values(tmp_path, code, monkeypatch):
    monkeypatch.setattr(save, "stored_encoding", lambda tensor, encoding, code: encoding)
    values = torch.randint(-128, 128, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    grid = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1))
    grouped = values.float() * grid.repeat_interleave(3, -1)[..., :5]
    zero = torch.tensor([3, -7, 100])
    channels = (values - zero.reshape(1, 3, 1)).float() * grid[0, :, :1]
    state = {"a.weight": grouped, "b.weight": channels, "n": torch.tensor([7, -1]), "tied": channels}
    encodings = {
        "a.weight": Encoding("affine", {"bits": 8, "axis": None, "group": 3}, {"scale": grid}),
        "b.weight": Encoding(
            "affine",
            {"bits": 8, "axis": 1, "group": None},
            {"scale": grid[0, :, 0], "zero_point": zero.to(torch.int8)},
        ),
    }
    path = tmp_path / "net.safetensors"
    write_tensors(state, encodings, path, arch="builtin:x", code=code)
    found, document = read_as_documented(path)
    assert document["network"] == "builtin:x"
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name] == value.flatten().tolist(), name


def test_the_document_names_every_codec_dtype_and_field(tmp_path):
    path = tmp_path / "net.safetensors"
    write_tensors({}, {}, path)
    _, document = read_as_documented(path)
    assert all(f"**`{name}`**" in DOC for name in CODECS)
    assert all(name in DOC for name in DTYPES)
    assert all(f"\n| `{name}` |" in DOC for name in document)
