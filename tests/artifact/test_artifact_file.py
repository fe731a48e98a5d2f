"""Artifacts without a network: what is written is what is read, bit for bit, or nothing is."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelopt_cli.artifact import (
    codecs,
    is_artifact,
    predicted_bytes,
    read_header,
    read_tensors,
    save,
    write_tensors,
)
from modelopt_cli.artifact.header import BLANK, DIGEST_AT
from modelopt_cli.errors import ArtifactError, EnvironmentFailure, ModeloptError, OutputError
from modelopt_cli.program import Encoding, InputSpec, Preprocess

REPO = Path(__file__).resolve().parents[2]
AFFINE = {"bits": 8, "axis": 0, "group": None}
INPUT = InputSpec(
    (3, 8, 8), Preprocess(resize=(9, 10), crop=0.875, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 1.0))
)
HISTORY = ({"method": "prune", "config": {"sparsity": 0.5}}, {"method": "quantize", "torch": "2.13.0"})


def example():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(8, generator=generator)
    values = torch.randint(-128, 128, (8, 3, 3, 3), generator=generator)
    shared = torch.randn(5, generator=generator)
    state = {
        "conv.weight": values.float() * scale.reshape(8, 1, 1, 1),
        "conv.bias": torch.randn(8, generator=generator),
        "bn.num_batches_tracked": torch.tensor(3),
        "mask": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "odd [/name] ü": torch.tensor([float("nan"), -0.0]),
        "first": shared,
        "second": shared,
    }
    return state, {"conv.weight": Encoding("affine", AFFINE, {"scale": scale})}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def write_example(path, **more):
    state, encodings = example()
    return write_tensors(
        state, encodings, path, history=HISTORY, arch="torchvision:resnet18", input_spec=INPUT, **more
    )


def test_round_trip_is_bit_exact(path):
    state, encodings = example()
    write_example(path, labels=["cat", "dog"])
    found = read_tensors(path)
    assert list(found.state)[:-1] == list(state)[:-1]
    for name, value in state.items():
        assert found.state[name].dtype == value.dtype
        assert found.state[name].shape == value.shape
        assert torch.equal(bits(found.state[name]), bits(value)), name
    assert found.state["first"] is found.state["second"]
    assert found.history == HISTORY
    assert found.arch == "torchvision:resnet18"
    assert found.input == INPUT
    assert found.labels == ("cat", "dog")
    assert found.encodings.keys() == {"conv.weight"}
    assert found.encodings["conv.weight"].params == AFFINE
    assert torch.equal(found.encodings["conv.weight"].parts["scale"], encodings["conv.weight"].parts["scale"])


def test_artifact_written_from_what_was_read_is_the_same_file(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_example(first)
    found = read_tensors(first)
    write_tensors(
        found.state, found.encodings, second, history=found.history, arch=found.arch, input_spec=found.input
    )
    assert first.read_bytes() == second.read_bytes()


def test_any_safetensors_reader_opens_it(path):
    write_example(path)
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["modelopt"]
        document = json.loads(file.metadata()["modelopt"])
    assert document["format"] == 1
    stored = safetensors.torch.load_file(path)
    state, encodings = example()
    assert stored["conv.weight"].dtype == torch.int8
    scale = stored["conv.scale"]
    assert torch.equal(scale, encodings["conv.weight"].parts["scale"])
    assert torch.equal(stored["conv.weight"].float() * scale.reshape(-1, 1, 1, 1), state["conv.weight"])
    assert "second" not in stored


def test_written_reports_the_bytes_on_disk(path):
    written = write_example(path)
    assert written.path == path
    assert written.file_bytes == os.path.getsize(path)
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_digest_is_the_sha256_with_the_field_blank(path):
    write_example(path)
    content = path.read_bytes()
    stated = content[DIGEST_AT : DIGEST_AT + 64]
    blank = content[:DIGEST_AT] + b"0" * 64 + content[DIGEST_AT + 64 :]
    assert hashlib.sha256(blank).hexdigest() == stated.decode()
    assert read_header(path)["digest"] == stated.decode()


def test_tensors_are_aligned_to_their_element_size(path):
    write_example(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 8 == 0
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    widths = {"I64": 8, "F32": 4, "BF16": 2, "I8": 1, "BOOL": 1}
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


def test_predicted_size_is_exact_even_from_shapes_alone(path):
    written = write_example(path)
    state, encodings = example()
    more = {"history": HISTORY, "arch": "torchvision:resnet18", "input_spec": INPUT}
    assert predicted_bytes(state, encodings, **more) == written.file_bytes
    del state["second"]
    path.unlink()
    written = write_tensors(state, encodings, path, **more)
    meta = {name: value.to("meta") for name, value in state.items()}
    plan = {"conv.weight": Encoding("affine", AFFINE, {"scale": torch.empty(8, device="meta")})}
    assert predicted_bytes(meta, plan, **more) == written.file_bytes


@pytest.mark.parametrize("position", ["length", "header", "digest", "data", "last"])
def test_flipped_bit_is_refused(path, position):
    write_example(path)
    content = bytearray(path.read_bytes())
    place = {"length": 0, "header": 700, "digest": DIGEST_AT + 5, "data": len(content) - 40, "last": -1}
    content[place[position]] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damaged_byte_anywhere_is_refused(path, data):
    if not path.exists():
        write_example(path)
        path.with_name("whole").write_bytes(path.read_bytes())
    content = bytearray(path.with_name("whole").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        read_tensors(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 1000, -1])
def test_truncated_file_is_refused(path, keep):
    write_example(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError):
        read_tensors(path)


def test_header_can_be_read_without_reading_the_rest(path):
    write_example(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert read_header(path, verify=False)["network"] == "torchvision:resnet18"
    with pytest.raises(ArtifactError, match="does not match its digest"):
        read_header(path)


def test_is_artifact_looks_at_the_first_bytes_only(path, tmp_path):
    write_example(path)
    assert is_artifact(path)
    path.write_bytes(path.read_bytes()[:200])
    assert is_artifact(path)  # damaged, but to be reported as ours
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    assert not is_artifact(path)
    assert not is_artifact(tmp_path / "missing")
    assert not is_artifact(tmp_path)
    assert not is_artifact("/dev/zero")


def test_safetensors_of_others_is_teachers_identity(path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not a modelopt artifact; give it as a checkpoint"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("conv.weight", "conv.scale"),
        ("table", "table.scale"),
        ("weight", "weight.scale"),
        ("w.bias", "w.bias.scale"),
    ],
)
def test_scale_stands_beside_its_parameter(path, name, part):
    encodings = {name: Encoding("affine", {**AFFINE, "axis": None}, {"scale": torch.tensor(0.5)})}
    write_tensors({name: torch.tensor([1.0, 0.5])}, encodings, path)
    assert safetensors.torch.load_file(path).keys() == {name, part}


def test_taken_part_name_is_avoided_and_none_left_is_an_error(path):
    encodings = {"a.weight": Encoding("affine", {**AFFINE, "axis": None}, {"scale": torch.tensor(0.5)})}
    state = {"a.weight": torch.tensor([1.0]), "a.scale": torch.tensor(7.0)}
    write_tensors(state, encodings, path)
    assert safetensors.torch.load_file(path).keys() == {"a.weight", "a.scale", "a.weight.scale"}
    assert read_tensors(path).state["a.scale"] == 7
    state["a.weight.scale"] = torch.tensor(8.0)
    with pytest.raises(ModeloptError, match="no free name"):
        write_tensors(state, encodings, path, force=True)


def test_tied_tensors_are_stored_once_under_the_encoded_name(path):
    shared = torch.tensor([1.0, 0.5])
    encodings = {"b": Encoding("affine", {**AFFINE, "axis": None}, {"scale": torch.tensor(0.5)})}
    write_tensors({"a": shared, "b": shared, "part": shared[:1]}, encodings, path)
    assert read_header(path)["tied"] == {"a": "b"}
    assert safetensors.torch.load_file(path)["b"].dtype == torch.int8
    found = read_tensors(path)
    assert found.state["a"] is found.state["b"]
    assert torch.equal(found.state["part"], shared[:1])


def test_non_contiguous_tensors_are_stored_in_row_major_order(path):
    state = {
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "e": torch.tensor(1.0).expand(3),
        "s": torch.arange(9)[::2],
    }
    write_tensors(state, {}, path)
    stored = safetensors.torch.load_file(path)
    assert all(torch.equal(stored[name], value) for name, value in state.items())


UNFIT = {
    "values off the grid": (
        {"a": torch.tensor([0.3])},
        {"a": Encoding("affine", {**AFFINE, "axis": None}, {"scale": torch.tensor(0.5)})},
    ),
    "unknown codec": ({"a": torch.tensor([0.3])}, {"a": Encoding("zip")}),
    "settings that do not fit": (
        {"a": torch.tensor(0.0)},
        {"a": Encoding("affine", AFFINE, {"scale": torch.ones(1)})},
    ),
    "encoding without tensor": ({"a": torch.tensor(0.0)}, {"b": Encoding("raw")}),
    "no tensor": ({"a": 1}, {}),
    "tensor without data": ({"a": torch.empty(2, device="meta")}, {}),
    "sparse tensor": ({"a": torch.eye(2).to_sparse()}, {}),
    "type the format lacks": ({"a": torch.zeros(1, dtype=torch.complex128)}, {}),
    "control character in a name": ({"a\n": torch.zeros(1)}, {}),
    "reserved name": ({"__metadata__": torch.zeros(1)}, {}),
}


@pytest.mark.parametrize(("state", "encodings"), UNFIT.values(), ids=UNFIT.keys())
def test_what_cannot_be_stored_leaves_no_file(path, state, encodings):
    with pytest.raises(ModeloptError) as caught:
        write_tensors(state, encodings, path)
    assert "\n" not in str(caught.value)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    "history", [[{"drop": float("nan")}], [{"x": torch.zeros(1)}], [{"x": "\ud800"}]], ids=repr
)
def test_history_that_is_not_json_leaves_no_file(path, history):
    with pytest.raises(ModeloptError):
        write_tensors({"a": torch.zeros(1)}, {}, path, history=history)
    assert os.listdir(path.parent) == []


def test_existing_file_and_devices_are_refused_before_any_work(path, monkeypatch):
    path.write_bytes(b"old")
    monkeypatch.setattr(save, "_write", lambda *_: pytest.fail("work was done"))
    with pytest.raises(OutputError):
        write_tensors({}, {}, path)
    with pytest.raises(OutputError):
        write_tensors({}, {}, "/dev/null", force=True)
    assert path.read_bytes() == b"old"


class _Lossy(type(codecs.CODECS["raw"])):
    def decode(self, parts, params, dtype, shape):
        return parts["values"] + 1


def test_file_that_reads_back_differently_is_never_published(path, monkeypatch):
    path.write_bytes(b"old")
    monkeypatch.setitem(codecs.CODECS, "raw", _Lossy())
    with pytest.raises(ModeloptError, match="reads back with other values"):
        write_tensors({"a": torch.zeros(3)}, {}, path, force=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_disk_that_loses_a_byte_is_noticed(path, monkeypatch):
    real = os.write

    def lossy(handle, data):
        damaged = bytearray(data)
        if len(damaged) == 12:
            damaged[-1] ^= 1
        return real(handle, damaged)

    monkeypatch.setattr(os, "write", lossy)
    with pytest.raises(ModeloptError, match="does not match its digest"):
        write_tensors({"a": torch.zeros(3)}, {}, path)
    assert os.listdir(path.parent) == []


def test_full_disk_is_one_line_and_leaves_nothing(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentFailure, match="no space left"):
        write_example(path)
    assert os.listdir(path.parent) == []


def test_empty_state_is_a_valid_file(path):
    write_tensors({}, {}, path)
    assert read_tensors(path).state == {}
    assert safetensors.torch.load_file(path) == {}


def test_blank_is_as_long_as_a_digest():
    assert len(BLANK) == len(hashlib.sha256().hexdigest())
