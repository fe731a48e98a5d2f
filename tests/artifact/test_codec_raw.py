"""The codec ``raw``: the very bits, and refusals."""

import pytest
import torch

from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import Encoding

SCALE = torch.ones(2)
CASES = {
    "float16": lambda: (torch.linspace(-1, 1, 15).half().reshape(3, 5), Encoding("raw")),
    "int64": lambda: (torch.arange(7), Encoding("raw")),
    "empty": lambda: (torch.zeros(0, 3), Encoding("raw")),
}


def test_raw_returns_the_very_bits():
    weights = torch.tensor([float("nan"), -0.0, 1e-45])
    parts = CODECS["raw"].encode(weights, Encoding("raw"))
    back = CODECS["raw"].decode(parts, {}, torch.float32, (3,))
    assert torch.equal(back.view(torch.int32), weights.view(torch.int32))


@pytest.mark.parametrize(
    ("parts", "params", "dtype", "shape"),
    [
        ({"values": SCALE}, {"x": 1}, torch.float32, (2,)),
        ({"values": SCALE, "x": SCALE}, {}, torch.float32, (2,)),
        ({"x": SCALE}, {}, torch.float32, (2,)),
        ({"values": SCALE}, {}, torch.int32, (2,)),
        ({"values": SCALE}, {}, torch.float32, (1, 2)),
    ],
    ids=["settings", "extra part", "no values", "other type", "other shape"],
)
def test_raw_refuses_what_does_not_fit(parts, params, dtype, shape):
    with pytest.raises(ArtifactError):
        CODECS["raw"].decode(parts, params, dtype, shape)
