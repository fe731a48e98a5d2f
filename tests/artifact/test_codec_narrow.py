"""The codec ``narrow``: integers of few bits in an int8 parameter, and refusals."""

import pytest
import torch
from torch import Tensor

from modelopt_cli.artifact import write_tensors
from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.artifact.encodings import pruned_encoding
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program import Encoding


def of_bits(bits: int, *shape: int) -> Tensor:
    """Every integer of so many bits, again and again."""
    return (
        (torch.arange(torch.Size(shape).numel()) % (1 << bits) - (1 << bits - 1))
        .to(torch.int8)
        .reshape(shape)
    )


CASES = {
    f"{bits} bits": lambda bits=bits: (of_bits(bits, 5, 7, 3), Encoding("narrow", {"bits": bits}))
    for bits in range(2, 8)
} | {"empty": lambda: (torch.zeros(0, 3, dtype=torch.int8), Encoding("narrow", {"bits": 4}))}


@pytest.mark.parametrize("bits", range(2, 8))
def test_packed_files_hold_the_integers_in_their_bits(bits, tmp_path):
    tensor, encoding = of_bits(bits, 64, 80), Encoding("narrow", {"bits": bits})
    sizes = {}
    for code in ("plain", "packed"):
        path = tmp_path / code
        write_tensors({"a.weight": tensor}, {"a.weight": encoding}, path, code=code)
        content = path.read_bytes()
        sizes[code] = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert sizes == {"plain": 64 * 80, "packed": 64 * 80 * bits // 8}


@pytest.mark.parametrize(
    "params", [{}, {"bits": 8}, {"bits": 1}, {"bits": True}, {"bits": 4, "x": 1}], ids=str
)
def test_narrow_refuses_other_settings(params):
    with pytest.raises(ArtifactError, match="bits must be 2 to 7"):
        CODECS["narrow"].layout((2,), torch.int8, Encoding("narrow", params))


def test_integers_of_more_bits_are_refused_on_either_way():
    wide, encoding = torch.tensor([8, -8], dtype=torch.int8), Encoding("narrow", {"bits": 4})
    with pytest.raises(ModeloptError, match="integers of more than 4 bits"):
        CODECS["narrow"].encode(wide, encoding)
    with pytest.raises(ArtifactError, match="more bits than the setting says"):
        CODECS["narrow"].decode({"values": wide}, encoding.params, torch.int8, (2,))


def test_a_pruned_parameter_of_few_bits_is_stored_without_its_zeros():
    tensor = torch.zeros(64, 64, dtype=torch.int8)
    tensor[:, ::16] = 3
    assert pruned_encoding(tensor, Encoding("narrow", {"bits": 4})).codec == "sparse"
