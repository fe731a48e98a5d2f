"""Compressed headers: the same artifact in fewer bytes, and nothing in it is believed unchecked."""

import hashlib
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from modelopt_cli.artifact import (
    compressed_header,
    is_artifact,
    predicted_bytes,
    read_header,
    read_program,
    read_tensors,
    save,
    write_program,
    write_tensors,
)
from modelopt_cli.artifact.header import DIGEST_AT
from modelopt_cli.checkpoint import fresh_model
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import Encoding

DICTIONARY = (Path(compressed_header.__file__).parent / "compressed_header.txt").read_bytes()
AFFINE = {"bits": 8, "axis": 0, "group": None}


def example():
    scale = torch.tensor([0.5, 0.25, 2.0])
    values = torch.randint(-128, 128, (3, 4), generator=torch.Generator().manual_seed(0))
    shared = torch.tensor([float("nan"), -0.0, 3.0])
    state = {
        "l.weight": values.float() * scale.reshape(3, 1),
        "l.bias": torch.ones(3).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 2),
        "first": shared,
        "second": shared,
    }
    return state, {"l.weight": Encoding("affine", AFFINE, {"scale": scale})}


@pytest.fixture(autouse=True)
def _uncoded(monkeypatch):
    """The form of the file alone is looked at here: integers stay as they are."""
    monkeypatch.setattr(save, "stored_encoding", lambda tensor, encoding, code: encoding)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "net.safetensors"
    state, encodings = example()
    write_tensors(state, encodings, path, history=[{"method": "m"}], labels=["a", "b"], code="entropy")
    return path


def pack(text):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    return packer.compress(text) + packer.flush()


def parse(content):
    """Metadata, inner header and data of a file with a compressed header."""
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    stated = json.loads(outer["__metadata__"]["modelopt"])
    short, _ = stated["sealed"]
    body = content[8 + length :]
    inner = zlib.decompressobj(-15, zdict=DICTIONARY).decompress(body[:short])
    return stated, inner, body[short:]


def build(path, stream, long, data, *, stated=None, dtype="U8", name="modelopt"):
    """A file with a right digest, whatever it holds."""
    stated = {"digest": "0" * 64, "format": 1, "sealed": [len(stream), long], **(stated or {})}
    body = stream + data
    entry = {"data_offsets": [0, len(body)], "dtype": dtype, "shape": [len(body)]}
    metadata = {"modelopt": json.dumps(stated, separators=(",", ":"))}
    header = json.dumps({"__metadata__": metadata, name: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    blank = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(blank + body).hexdigest().encode()
    path.write_bytes(blank[:DIGEST_AT] + digest + blank[DIGEST_AT + 64 :] + body)


def forge(path, change):
    """Change the inner header of a file and keep everything else right."""
    _, inner, data = parse(path.read_bytes())
    document = json.loads(inner)
    change(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    build(path, pack(text), len(text), data)


def test_what_is_written_is_what_is_read(path):
    state, _ = example()
    found = read_tensors(path)
    for name, value in state.items():
        assert found.state[name].dtype == value.dtype
        assert torch.equal(found.state[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), (
            name
        )
    assert found.state["first"] is found.state["second"]
    assert found.encodings["l.weight"].params == AFFINE
    assert found.history == ({"method": "m"},)
    assert found.labels == ("a", "b")


def test_both_forms_hold_the_same_program(tmp_path):
    program = fresh_model("builtin:resnet8").program
    plain = write_program(program, tmp_path / "plain")
    compressed = write_program(program, tmp_path / "sealed", code="entropy")
    again = write_program(read_program(tmp_path / "sealed"), tmp_path / "again")
    assert again.sha256 == plain.sha256
    assert plain.file_bytes - compressed.file_bytes > 20_000
    assert read_header(tmp_path / "sealed")["program"] == read_header(tmp_path / "plain")["program"]
    assert is_artifact(tmp_path / "sealed")


@pytest.mark.parametrize("spec", ["builtin:lenet5", "builtin:resnet8?width=0.5"])
def test_predicted_size_is_exact(tmp_path, spec):
    program = fresh_model(spec).program
    written = write_program(program, tmp_path / "net", code="entropy")
    assert (
        predicted_bytes(program, code="entropy") == written.file_bytes == len((tmp_path / "net").read_bytes())
    )


def test_any_safetensors_reader_opens_it(path):
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["modelopt"]
        assert json.loads(file.metadata()["modelopt"]).keys() == {"digest", "format", "sealed"}
    stored = safetensors.torch.load_file(path)
    assert stored.keys() == {"modelopt"}
    assert stored["modelopt"].dtype == torch.uint8


def test_every_damaged_byte_is_refused(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            read_tensors(path)


@pytest.mark.parametrize("change", ["cut", "longer", "empty"])
def test_other_length_is_refused(path, change):
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "longer": whole + b"\0", "empty": b""}[change])
    with pytest.raises(ArtifactError):
        read_tensors(path)


@pytest.mark.slow
def test_header_that_hardly_any_bytes_stand_for_is_stored_at_length(tmp_path):
    labels = ["x"] * 400_000
    write_tensors({}, {}, tmp_path / "net", labels=labels, code="entropy")
    assert read_tensors(tmp_path / "net").labels == tuple(labels)
    assert (tmp_path / "net").stat().st_size > 1_000_000


def test_forging_without_a_change_is_accepted(path):
    before = path.read_bytes()
    forge(path, lambda document: None)
    assert path.read_bytes() == before


def parameter(key, value):
    return lambda document: document["parameters"][0].update({key: value})


def part(kind):
    return lambda document: document["parameters"][0]["parts"].update(scale=kind)


FORGED = {
    "field missing": (lambda d: d.pop("tied"), "missing or unknown header fields"),
    "digest inside": (lambda d: d.update(digest="0" * 64), "missing or unknown header fields"),
    "parameters an object": (lambda d: d.update(parameters={}), "bad parameters"),
    "parameter a text": (lambda d: d.update(parameters=["x"]), "bad codec parts"),
    "parts a list": (parameter("parts", []), "bad codec parts"),
    "part a name": (part("l.scale"), "bad codec parts"),
    "part of three": (part(["F32", [3], 0]), "bad codec parts"),
    "part of unknown type": (part(["F31", [3]]), "unknown dtype"),
    "part with a type that is no text": (part([["F32"], [3]]), "unknown dtype"),
    "part with a negative size": (part(["F32", [-3]]), "bad shape"),
    "part of a huge shape": (part(["F32", [1 << 40, 1 << 40]]), "too large to address"),
    "part longer than the file": (part(["F32", [4]]), "more or fewer bytes"),
    "part shorter than the file": (part(["F32", [2]]), "more or fewer bytes"),
    "part that the codec lacks": (
        lambda d: d["parameters"][1]["parts"].update(more=["U8", [0]]),
        "exactly one part",
    ),
    "part called with a control character": (
        lambda d: d["parameters"][1]["parts"].update({"\n": ["U8", [0]]}),
        "control character",
    ),
    "parameter twice": (lambda d: d["parameters"][3].update(name="count"), "parameter twice"),
    "tied to nothing": (lambda d: d.update(tied={"second": "x"}), "tied"),
    "program with its tensors": (lambda d: d.update(program={"tensors": {}, "tied": {}}), "bad program"),
    "program without ties": (lambda d: d.update(program={}), "bad list of tied"),
    "program tied to a list": (lambda d: d.update(program={"tied": {}}, tied={"second": []}), "tied"),
    "program of not_named_as_weights parameters": (
        lambda d: (d.update(program={"tied": {}}), d["parameters"][0].update(name=[])),
        "bad parameter",
    ),
}


@pytest.mark.parametrize(("change", "says"), FORGED.values(), ids=FORGED.keys())
def test_forged_header_gets_one_line(path, change, says):
    forge(path, change)
    with pytest.raises(ArtifactError, match=says) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_key_twice_in_the_inner_header_is_refused(path):
    _, inner, data = parse(path.read_bytes())
    text = inner.replace(b'"labels":', b'"labels":null,"labels":', 1)
    build(path, pack(text), len(text), data)
    with pytest.raises(ArtifactError, match="key 'labels' twice"):
        read_tensors(path)


OUTER = {
    "no lengths": ({"sealed": None}, {}, "bad header lengths"),
    "one length": ({"sealed": [1]}, {}, "bad header lengths"),
    "negative length": ({"sealed": [-1, 1]}, {}, "bad header lengths"),
    "stream longer than the file": ({"sealed": [1 << 40, 1]}, {}, "reaches beyond the file"),
    "unknown field": ({"network": None}, {}, "missing or unknown header fields"),
    "newer version": ({"format": 2}, {}, "newer than 1"),
    "version zero": ({"format": 0}, {}, "bad format version"),
    "tensor of another name": ({}, {"name": "x"}, "bad outer tensors"),
    "tensor of another type": ({}, {"dtype": "I8"}, "bad outer tensors"),
}


@pytest.mark.parametrize(("stated", "more", "says"), OUTER.values(), ids=OUTER.keys())
def test_forged_outer_header_gets_one_line(path, stated, more, says):
    _, inner, data = parse(path.read_bytes())
    build(path, pack(inner), len(inner), data, stated=stated, **more)
    with pytest.raises(ArtifactError, match=says):
        read_tensors(path)


STREAMS = {
    "ends early": (lambda text: (pack(text)[:-1], len(text)), "another length"),
    "followed by more": (lambda text: (pack(text) + b"\0", len(text)), "another length"),
    "states less": (lambda text: (pack(text), len(text) - 1), "another length"),
    "states more": (lambda text: (pack(text), len(text) + 1), "another length"),
    "not deflate": (lambda text: (b"\xff" * 500, len(text)), "cannot be inflated"),
    "states more than its bytes allow": (lambda text: (pack(text), 1 << 20), "too long"),
    "states more than any header has": (lambda text: (bytes(500_000), 100_000_001), "too long"),
    "empty": (lambda text: (b"", 0), "another length"),
}


@pytest.mark.parametrize(("stream", "says"), STREAMS.values(), ids=STREAMS.keys())
def test_bad_stream_gets_one_line(path, stream, says):
    _, inner, data = parse(path.read_bytes())
    build(path, *stream(inner), data)
    with pytest.raises(ArtifactError, match=says):
        read_tensors(path)


def test_bomb_is_not_inflated(path):
    bomb = pack(bytes(200_000_000))
    build(path, bomb, 1_000_000, b"")
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="another length"):
        read_tensors(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_dictionary_is_the_one_of_the_format():
    document = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    assert f"the {len(DICTIONARY):,} bytes" in document
    assert hashlib.sha256(DICTIONARY).hexdigest() in document
