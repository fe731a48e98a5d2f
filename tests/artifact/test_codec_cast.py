"""The codec ``cast``: float32 values of a half-precision type, and refusals."""

import pytest
import torch

from modelopt_cli.artifact import read_tensors, write_tensors
from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program import Encoding

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def parameter(name: str) -> tuple[torch.Tensor, Encoding]:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(TYPES[name]).float()
    return values, Encoding("cast", {"dtype": name})


CASES = {name: lambda name=name: parameter(name) for name in TYPES}


@pytest.mark.parametrize("name", TYPES)
def test_half_the_bytes_hold_the_values_in_their_type(name):
    tensor, encoding = parameter(name)
    values = CODECS["cast"].encode(tensor, encoding)["values"]
    assert values.dtype == TYPES[name]
    assert values.nbytes * 2 == tensor.nbytes
    assert torch.equal(values.float(), tensor)


@pytest.mark.parametrize("name", TYPES)
def test_values_that_have_changed_are_stored_as_they_are(name, tmp_path):
    tensor, encoding = parameter(name)
    changed = tensor + 1e-5
    with pytest.raises(ModeloptError, match=f"values that are not {name}"):
        CODECS["cast"].encode(changed, encoding)
    write_tensors({"a.weight": changed}, {"a.weight": encoding}, tmp_path / "file")
    read = read_tensors(tmp_path / "file")
    assert torch.equal(read.state["a.weight"], changed)
    assert "a.weight" not in read.encodings


@pytest.mark.parametrize("params", [{}, {"dtype": "float32"}, {"dtype": 3}, {"dtype": "float16", "x": 1}])
def test_cast_refuses_other_settings(params):
    with pytest.raises(ArtifactError, match="dtype must be a half"):
        CODECS["cast"].layout((2,), torch.float32, Encoding("cast", params))


def test_cast_refuses_parts_of_another_type():
    with pytest.raises(ArtifactError, match="do not fit"):
        CODECS["cast"].decode({"values": torch.ones(2)}, {"dtype": "float16"}, torch.float32, (2,))
