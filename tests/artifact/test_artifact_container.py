"""Strict reading of safetensors files: every way to be wrong, by name."""

import json
import os
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelopt_cli.artifact import read_safetensors, read_safetensors_header
from modelopt_cli.artifact.container import MAX_HEADER, TensorInfo
from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.errors import ArtifactError, CheckpointError, EnvironmentFailure

A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
B = '"b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}'


def container(header, data=b"", length=None):
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}
    return json.dumps({"a": entry})


GOOD = container("{" + A + "," + B + "}", bytes(12))

BAD = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "text": (b"this is a README, not a model", "too long"),
    "huge header length": (container("{}", length=1 << 63), "too long"),
    "header just above the limit": (container("{}", length=MAX_HEADER + 1), "too long"),
    "header longer than the file": (container("{}", length=3), "ends inside its header"),
    "zero header length": (container(""), "does not start with"),
    "leading space": (container(" {}"), "does not start with"),
    "array": (container("[]"), "does not start with"),
    "not utf-8": (container(b'{"\xff":1}'), "not UTF-8"),
    "not json": (container("{a}"), "not valid JSON"),
    "text after the object": (container("{}{}"), "not valid JSON"),
    "endless nesting": (container('{"a":' + "[" * 100_000), "nested too deeply|not valid JSON"),
    "deep nesting": (container('{"a":' + "[" * 99 + "]" * 99 + "}"), "nested too deeply"),
    "huge number": (container('{"a":' + "9" * 5000 + "}"), "not valid JSON"),
    "infinite number": (container('{"a":1e999}'), "not finite"),
    "nan": (container('{"a":NaN}'), "not finite"),
    "half a character": (container('{"\\ud800":{}}'), "half a character"),
    "tensor twice": (container("{" + A + "," + A + "}", bytes(8)), "key 'a' twice"),
    "key twice in an entry": (
        container('{"a":{"dtype":"F32","dtype":"U8","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "key 'dtype' twice",
    ),
    "metadata twice": (container('{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata key twice": (container('{"__metadata__":{"k":"1","k":"2"}}'), "key 'k' twice"),
    "metadata not an object": (container('{"__metadata__":[]}'), "map strings to strings"),
    "metadata value not text": (container('{"__metadata__":{"k":1}}'), "map strings to strings"),
    "entry not an object": (container('{"a":1}'), "must have exactly"),
    "entry without shape": (container('{"a":{"dtype":"F32","data_offsets":[0,8]}}', bytes(8)), "exactly"),
    "entry with more": (container(tensor(extra=1), bytes(8)), "must have exactly"),
    "unknown dtype": (container(tensor("F31"), bytes(8)), "unknown dtype 'F31'"),
    "sub-byte dtype": (container(tensor("F4"), bytes(8)), "unknown dtype"),
    "dtype not text": (container('{"a":{"dtype":[],"shape":[],"data_offsets":[0,4]}}', bytes(4)), "dtype"),
    "negative dimension": (container(tensor(shape=(-2,)), bytes(8)), "bad shape"),
    "fractional dimension": (container(tensor(shape=(2.0,)), bytes(8)), "bad shape"),
    "boolean dimension": (container(tensor(shape=(True, 2)), bytes(8)), "bad shape"),
    "dimension of 64 bits": (container(tensor(shape=(1 << 63,)), bytes(8)), "bad shape"),
    "too many dimensions": (container(tensor(shape=(1,) * 65), bytes(8)), "bad shape"),
    "shape overflow": (container(tensor(shape=(1 << 32, 1 << 32)), bytes(8)), "too large"),
    "shape overflow behind a zero": (container(tensor(shape=(0, 1 << 62), offsets=(0, 0))), "too large"),
    "negative offset": (container(tensor(offsets=(-8, 0)), bytes(8)), "bad data_offsets"),
    "three offsets": (container(tensor(offsets=(0, 8, 8)), bytes(8)), "bad data_offsets"),
    "offsets reversed": (container(tensor(offsets=(8, 0)), bytes(8)), "do not fit"),
    "offsets not the shape's": (container(tensor(offsets=(0, 4)), bytes(4)), "do not fit"),
    "out of bounds": (container(tensor(), bytes(7)), "beyond the end"),
    "far out of bounds": (container(tensor(offsets=(1 << 50, (1 << 50) + 8)), bytes(8)), "beyond the end"),
    "gap at the start": (container(tensor(offsets=(4, 12)), bytes(12)), "gap"),
    "gap in the middle": (container("{" + A + "," + B.replace("8,12", "9,13") + "}", bytes(13)), "gap"),
    "overlap": (container("{" + A + "," + B.replace("8,12", "7,11") + "}", bytes(11)), "overlaps"),
    "same place twice": (container("{" + A + "," + A.replace('"a"', '"b"') + "}", bytes(8)), "overlaps"),
    "empty tensor inside another": (
        container("{" + A + ',"e":{"dtype":"U8","shape":[0],"data_offsets":[3,3]}}', bytes(8)),
        "overlaps",
    ),
    "trailing bytes": (container("{" + A + "}", bytes(9)), "trailing"),
    "bytes without tensors": (container("{}", bytes(1)), "trailing"),
    "empty name": (container("{" + A.replace('"a"', '""') + "}", bytes(8)), "bad tensor name"),
    "overlong name": (
        container("{" + A.replace('"a"', '"' + "n" * 1025 + '"') + "}", bytes(8)),
        "bad tensor name",
    ),
    "newline in a name": (container("{" + A.replace('"a"', '"a\\n"') + "}", bytes(8)), "control character"),
    "escape in a name": (
        container("{" + A.replace('"a"', '"a\\u001b[2J"') + "}", bytes(8)),
        "control character",
    ),
    "c1 control in a name": (
        container("{" + A.replace('"a"', '"a\\u009b"') + "}", bytes(8)),
        "control character",
    ),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("error", [CheckpointError, ArtifactError])
@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD.keys())
def test_bad_file_gets_one_line_of_the_asked_class(path, content, says, error):
    path.write_bytes(content)
    with pytest.raises(error, match=says) as caught:
        read_safetensors(path, error)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_that_the_bad_ones_vary_is_good(path):
    path.write_bytes(GOOD)
    tensors, metadata = read_safetensors_header(path)
    assert tensors == {"a": TensorInfo("F32", (2,), 0, 8), "b": TensorInfo("U8", (4,), 8, 12)}
    assert metadata == {}


def test_boolean_bytes_other_than_zero_and_one_are_refused(path):
    path.write_bytes(container(tensor("BOOL", (3,), (0, 3)), b"\0\1\2"))
    with pytest.raises(CheckpointError, match="boolean"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "device"])
def test_what_is_not_a_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "net"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = "/dev/zero"
    with pytest.raises(CheckpointError):
        read_safetensors_header(path)


def test_file_without_permission_is_an_environment_failure(path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(EnvironmentFailure, match="permission denied"):
        read_safetensors(path)


def every_dtype():
    generator = torch.Generator().manual_seed(0)
    for name, dtype in DTYPES.items():
        if name == "F8_E8M0":
            continue  # safetensors 0.8 cannot write it
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * dtype.itemsize,), generator=generator)
        yield f"t.{name}", raw.to(torch.uint8).view(dtype).reshape(2, 3)


def test_reads_what_the_library_writes_bit_for_bit_in_every_dtype(path):
    state = {
        **dict(every_dtype()),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "e2": torch.empty(2, 0),
    }
    safetensors.torch.save_file(state, path, metadata={"format": "pt", "more": "keys"})
    found = read_safetensors(path)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        bits = [t.reshape(-1).view(torch.uint8) for t in (found[name], value)]
        assert torch.equal(*bits), name
    assert read_safetensors_header(path)[1] == {"format": "pt", "more": "keys"}


def test_tensors_own_their_memory(path):
    safetensors.torch.save_file({"a": torch.zeros(4)}, path)
    first, second = read_safetensors(path)["a"], read_safetensors(path)["a"]
    first += 1
    assert second.eq(0).all()
    assert read_safetensors(path)["a"].eq(0).all()


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_header_is_refused_or_read_as_the_library_reads_it(path, data):
    content = bytearray(container('{"__metadata__":{"k":"v"},' + A + "," + B + "}", bytes(range(12))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        ours = read_safetensors(path)
    except CheckpointError:
        return
    theirs = safetensors.torch.load(bytes(content))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))
