"""The contract of every codec, on the ``CASES`` of its own test, ``test_codec_NAME.py``."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from modelopt_cli.artifact import predicted_bytes, read_tensors, write_tensors
from modelopt_cli.artifact.codecs import CODECS, WRAPPERS
from modelopt_cli.artifact.coding import CODINGS
from modelopt_cli.artifact.header import FORMAT
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import Encoding

CASES = {
    f"{codec}: {name}": (codec, make)
    for codec in CODECS
    for name, make in import_module(f"test_codec_{codec}").CASES.items()
}
DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


@pytest.mark.parametrize(("name", "make"), CASES.values(), ids=CASES.keys())
def test_a_codec_gives_the_tensor_back_in_the_bytes_that_it_predicts(name, make):
    codec, (tensor, encoding) = CODECS[name], make()
    shape = tuple(tensor.shape)
    assert encoding.codec == name
    layout = codec.layout(shape, tensor.dtype, encoding)
    parts = codec.encode(tensor, encoding)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} == {
        part: (spec.dtype, spec.shape) for part, spec in layout.items()
    }
    predicted = codec.predicted_bytes(shape, tensor.dtype, encoding.params, tuple(encoding.parts))
    assert sum(part.nbytes for part in parts.values()) == predicted
    back = codec.decode(parts, encoding.params, tensor.dtype, shape)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)
    assert codec.payload[0] in parts
    assert all(torch.equal(parts[p], v) for p, v in encoding.parts.items() if p not in codec.payload)


@pytest.mark.parametrize("code", CODINGS)
@pytest.mark.parametrize(("name", "make"), CASES.values(), ids=CASES.keys())
def test_a_codec_gives_the_tensor_back_from_a_file(name, make, code, tmp_path):
    if CODECS[name].wraps:
        return  # chosen by the coding, around the others
    tensor, encoding = make()
    state, encodings = {"a.weight": tensor}, {"a.weight": encoding}
    written = write_tensors(state, encodings, tmp_path / "file", code=code)
    assert written.file_bytes == (tmp_path / "file").stat().st_size
    assert written.file_bytes == predicted_bytes(state, encodings, code=code)
    read = read_tensors(tmp_path / "file")
    assert torch.equal(read.state["a.weight"], tensor)
    stored = read.encodings.get("a.weight", Encoding("raw"))
    assert (stored.codec, stored.params) == (name, encoding.params)
    again = write_tensors(read.state, read.encodings, tmp_path / "again", code=code)
    assert again.sha256 == written.sha256


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_stores_the_types_that_its_row_says(name):
    codec = CODECS[name]
    types = {make()[0].dtype for codec_name, make in CASES.values() if codec_name == name}
    assert not codec.dtypes or types <= set(codec.dtypes)
    if codec.dtypes:
        _, encoding = next(make() for codec_name, make in CASES.values() if codec_name == name)
        with pytest.raises(ArtifactError, match=f"codec {name} stores no torch.complex64"):
            codec.layout((4, 4), torch.complex64, encoding)


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_described_and_known_since_a_version_of_the_format(name):
    assert f"**`{name}`**" in DOC
    assert 1 <= CODECS[name].version <= FORMAT


def test_every_wrapper_is_tried_by_some_coding():
    assert {name for coding in CODINGS.values() for name in coding.wrappers} == set(WRAPPERS)
