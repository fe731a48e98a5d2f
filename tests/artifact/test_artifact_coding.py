"""Coding: chosen when a file is written, undone when it is read, never larger than what a method wants."""

import pytest
import torch

from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.artifact.coding import CODINGS, base_encoding, stored_encoding
from modelopt_cli.artifact.encodings import pruned_encoding
from modelopt_cli.program import Encoding


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def affine():
    steps = (draw((64, 27)) * 20).round().clamp(-127, 127)
    scale = draw((64,), 1).abs() + 0.1
    return steps * scale[:, None], Encoding("affine", {"bits": 8, "axis": 0, "group": None}, {"scale": scale})


def asymmetric():
    steps = (draw((20, 30)) * 3).round().clamp(-8, 7)
    parts = {"scale": torch.tensor(0.25), "zero_point": torch.tensor(-3, dtype=torch.int8)}
    return (steps + 3) * 0.25, Encoding("affine", {"bits": 4, "axis": None, "group": None}, parts)


def codebook():
    table = draw((2, 16)).sort(1).values
    index = (draw((40, 50), 1) * 2.5 + 7.5).round().clamp(0, 15).long()
    tensor = torch.cat((table[0][index[:20]], table[1][index[20:]]))
    params = {"entries": 16, "groups": 2, "vector": 1, "pruned": False}
    return tensor, Encoding("codebook", params, {"table": table})


def vectors():
    table = draw((1, 300, 4))
    index = (draw((40, 50), 1) * 40).abs().long()
    params = {"entries": 300, "groups": 1, "vector": 4, "pruned": False}
    return table[0][index].reshape(40, 200), Encoding("codebook", params, {"table": table})


def sparse():
    tensor = draw((64, 100)) * (draw((64, 100), 1) > 1.3)
    return tensor, pruned_encoding(tensor)


def sparse_affine():
    tensor, encoding = affine()
    tensor = tensor * (draw(tensor.shape, 2) > 1.0)
    return tensor, pruned_encoding(tensor, encoding)


def raw():
    return draw((50, 60)), Encoding("raw")


def raw_int8():
    return (draw((50, 60)) * 9).to(torch.int8), Encoding("raw")


def sparse_int8():
    tensor = raw_int8()[0] * (draw((50, 60), 1) > 1.3)
    return tensor, pruned_encoding(tensor)


MAKERS = [affine, asymmetric, codebook, vectors, sparse, sparse_affine, sparse_int8, raw, raw_int8]


def settings_of(encoding):
    """What of an encoding is in a file next to its payload: settings, and parts that are given."""
    payload = CODECS[encoding.codec].payload
    return {name: part for name, part in encoding.parts.items() if name not in payload}


@pytest.mark.parametrize("code", CODINGS)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_what_is_stored_gives_tensor_and_encoding_back(make, code):
    tensor, encoding = make()
    stored = stored_encoding(tensor, encoding, code)
    codec = CODECS[stored.codec]
    parts = codec.encode(tensor, stored)
    assert torch.equal(codec.decode(parts, stored.params, tensor.dtype, tuple(tensor.shape)), tensor)
    read = Encoding(stored.codec, stored.params, settings_of(Encoding(stored.codec, {}, parts)))
    base = base_encoding(read)
    assert (base.codec, base.params) == (encoding.codec, encoding.params)
    assert base.parts.keys() == encoding.parts.keys()
    assert all(torch.equal(base.parts[name], encoding.parts[name]) for name in base.parts)
    again = CODECS[base.codec].encode(tensor, base)
    assert again.keys() == CODECS[encoding.codec].encode(tensor, encoding).keys()


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_tighter_coding_is_never_larger(make):
    tensor, encoding = make()
    sizes = []
    for code in ("plain", "packed", "entropy"):
        stored = stored_encoding(tensor, encoding, code)
        sizes.append(sum(part.nbytes for part in CODECS[stored.codec].encode(tensor, stored).values()))
    assert sizes == sorted(sizes, reverse=True)


def test_each_coding_does_what_it_is_for():
    chosen = {
        make.__name__: [stored_encoding(*make(), code).codec for code in ("plain", "packed", "entropy")]
        for make in MAKERS
    }
    assert chosen == {
        "affine": ["affine", "affine", "entropy"],
        "asymmetric": ["affine", "packed", "entropy"],
        "codebook": ["codebook", "packed", "entropy"],
        "vectors": ["codebook", "packed", "entropy"],
        "sparse": ["sparse", "sparse", "entropy"],
        "sparse_affine": ["sparse", "sparse", "entropy"],
        "sparse_int8": ["sparse", "sparse", "entropy"],
        "raw": ["raw", "raw", "raw"],
        "raw_int8": ["raw", "raw", "entropy"],
    }


def test_a_coding_changes_no_encoding_it_is_given():
    tensor, encoding = codebook()
    before = (dict(encoding.params), set(encoding.parts))
    stored_encoding(tensor, encoding, "entropy")
    assert (encoding.params, set(encoding.parts)) == before


def test_a_scalar_and_an_empty_tensor_are_stored_somehow():
    params = {"entries": 2, "groups": 1, "vector": 1, "pruned": False}
    encoding = Encoding("codebook", params, {"table": torch.tensor([[0.0, 1.0]])})
    for tensor in (torch.tensor(1.0), torch.zeros(0), torch.zeros(3, 0)):
        for code in CODINGS:
            stored = stored_encoding(tensor, encoding, code)
            codec = CODECS[stored.codec]
            parts = codec.encode(tensor, stored)
            back = codec.decode(parts, stored.params, tensor.dtype, tuple(tensor.shape))
            assert torch.equal(back, tensor)
