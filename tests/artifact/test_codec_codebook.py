"""The codecs `codebook` and `packed`: there and back, exact sizes, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program import Encoding

CODEC, PACKED = CODECS["codebook"], CODECS["packed"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def shared(shape, entries, groups=1, vector=1, dtype=torch.float32, pruned=False, seed=0):
    """A tensor put together row by row from its tables, its indices, and the encoding that describes it."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn((groups, entries, vector), generator=generator)
    if pruned:
        table[:, entries // 2] = 0
    rows, weights = (shape[0] if shape else 1), math.prod(shape[1:])
    indices = torch.randint(0, entries, (rows, weights // vector), generator=generator)
    height = max(-(-rows // groups), 1)
    made = [table[row // height][indices[row]].reshape(weights) for row in range(rows)]
    tensor = torch.stack(made) if made else torch.empty(0, weights)
    params = {"entries": entries, "groups": groups, "vector": vector, "pruned": pruned}
    parts = {"table": table if vector > 1 else table[:, :, 0]}
    return tensor.reshape(shape).to(dtype), indices, Encoding("codebook", params, parts)


def case(*settings, **options):
    tensor, _, encoding = shared(*settings, **options)
    return tensor, encoding


CASES = {
    "one table": lambda: case((20, 3, 5), 16),
    "a table for each run of rows, one centroid pruned": lambda: case((20, 9), 7, groups=4, pruned=True),
    "vectors": lambda: case((40, 12), 300, vector=4, dtype=torch.float16),
}


def packed(encoding):
    return Encoding("packed", {"codec": encoding.codec, "params": encoding.params}, encoding.parts)


def there_and_back(tensor, encoding):
    codec = CODECS[encoding.codec]
    parts = codec.encode(tensor, encoding)
    shape = tuple(tensor.shape)
    layout = codec.layout(shape, tensor.dtype, encoding)
    for name, part in parts.items():
        assert (part.dtype, tuple(part.shape)) == (layout[name].dtype, layout[name].shape)
    predicted = codec.predicted_bytes(shape, tensor.dtype, encoding.params, tuple(encoding.parts))
    assert sum(part.nbytes for part in parts.values()) == predicted
    back = codec.decode(parts, encoding.params, tensor.dtype, shape)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)
    return parts


SHAPES = [(), (1,), (7,), (0,), (0, 3), (4, 0), (1, 9), (9, 1), (20, 3, 5, 5)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_parameter_of_every_shape_and_type_comes_back(shape, dtype):
    tensor, indices, encoding = shared(shape, 5, dtype=dtype, pruned=True)
    parts = there_and_back(tensor, encoding)
    assert torch.equal(parts["indices"].reshape(-1).long(), indices.reshape(-1))
    there_and_back(tensor, packed(encoding))


@given(
    rows=st.integers(1, 12),
    vectors=st.integers(1, 6),
    vector=st.sampled_from([1, 2, 4, 64]),
    entries=st.sampled_from([1, 2, 3, 16, 255, 256]),
    wanted=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_groups_and_vectors_come_back(rows, vectors, vector, entries, wanted, seed):
    height = -(-rows // min(wanted, rows))
    groups = -(-rows // height)
    tensor, indices, encoding = shared((rows, vectors * vector), entries, groups, vector, seed=seed)
    parts = there_and_back(tensor, encoding)
    assert torch.equal(parts["indices"].long(), indices)
    small = there_and_back(tensor, packed(encoding))
    bits = max((entries - 1).bit_length(), 1)
    assert len(small["stream"]) == -(-rows * vectors * bits // 8)


def test_65536_vectors_have_indices_of_two_bytes():
    tensor, indices, encoding = shared((64, 2048), 65536, 1, 2)
    parts = there_and_back(tensor, encoding)
    assert parts["indices"].dtype == torch.uint16
    assert torch.equal(parts["indices"].int(), indices.int())
    assert len(there_and_back(tensor, packed(encoding))["stream"]) == 64 * 1024 * 2


def test_300_vectors_take_nine_bits_each():
    tensor, _, encoding = shared((40, 60), 300, 2, 3)
    assert len(there_and_back(tensor, packed(encoding))["stream"]) == 40 * 20 * 9 // 8


def test_more_weights_than_are_looked_up_at_once_come_back(monkeypatch):
    monkeypatch.setattr("modelopt_cli.artifact.codecs.codebook._CHUNK", 7)
    there_and_back(*shared((10, 9), 5, 4)[::2])
    there_and_back(*shared((10, 12), 300, 4, 3)[::2])


def test_a_view_in_another_order_comes_back():
    tensor, _, encoding = shared((12, 10), 6, 3)
    view = tensor.t().contiguous().t()
    assert not view.is_contiguous()
    there_and_back(view, encoding)


def test_a_negative_zero_is_the_entry_zero():
    encoding = Encoding(
        "codebook",
        {"entries": 2, "groups": 1, "vector": 1, "pruned": True},
        {"table": torch.tensor([[0.0, 1.0]])},
    )
    there_and_back(torch.tensor([-0.0, 1.0, 0.0]), encoding)
    table = torch.tensor([[[0.0, 1.0], [-0.0, -1.0]]])
    vectors = {"entries": 2, "groups": 1, "vector": 2, "pruned": False}
    there_and_back(torch.tensor([[-0.0, 1.0, 0.0, -1.0]]), Encoding("codebook", vectors, {"table": table}))


def test_a_half_table_is_stored_as_it_is():
    tensor, _, encoding = shared((8, 8), 4)
    half = Encoding("codebook", encoding.params, {"table": encoding.parts["table"].half()})
    tensor = tensor.half().float()
    parts = CODEC.encode(tensor, half)
    assert parts["table"].dtype == torch.float16
    assert torch.equal(CODEC.decode(parts, half.params, torch.float32, (8, 8)), tensor)


def test_values_that_are_not_in_their_own_table_are_a_mistake():
    tensor, _, encoding = shared((4, 6), 3, 2)
    for wrong in (tensor.flip(0), tensor + 1e-6, torch.full((4, 6), math.nan), torch.full((4, 6), math.inf)):
        with pytest.raises(ModeloptError, match="not in its codebook"):
            CODEC.encode(wrong, encoding)
    tensor, _, encoding = shared((4, 6), 5, 1, 3)
    with pytest.raises(ModeloptError, match="not in its codebook"):
        CODEC.encode(tensor.flip(1), encoding)


def test_a_pruned_parameter_has_a_zero_in_every_table():
    tensor, _, encoding = shared((4, 6), 3, 2, pruned=True)
    encoding.parts["table"][1, 1] = 0.5
    with pytest.raises(ModeloptError, match="no centroid that is zero"):
        CODEC.encode(tensor, encoding)


BAD = {
    "setting missing": ({"entries": 4, "groups": 1, "vector": 1}, (8, 6)),
    "unknown setting": ({"entries": 4, "groups": 1, "vector": 1, "pruned": False, "x": 1}, (8, 6)),
    "no entries": ({"entries": 0, "groups": 1, "vector": 1, "pruned": False}, (8, 6)),
    "257 entries": ({"entries": 257, "groups": 1, "vector": 1, "pruned": False}, (8, 6)),
    "65,537 vectors": ({"entries": 65537, "groups": 1, "vector": 2, "pruned": False}, (8, 6)),
    "entries true": ({"entries": True, "groups": 1, "vector": 1, "pruned": False}, (8, 6)),
    "no groups": ({"entries": 4, "groups": 0, "vector": 1, "pruned": False}, (8, 6)),
    "more groups than rows": ({"entries": 4, "groups": 9, "vector": 1, "pruned": False}, (8, 6)),
    "an empty group": ({"entries": 4, "groups": 5, "vector": 1, "pruned": False}, (8, 6)),
    "groups of a scalar": ({"entries": 4, "groups": 2, "vector": 1, "pruned": False}, ()),
    "vector zero": ({"entries": 4, "groups": 1, "vector": 0, "pruned": False}, (8, 6)),
    "vector of 65": ({"entries": 4, "groups": 1, "vector": 65, "pruned": False}, (8, 65)),
    "vectors that do not divide": ({"entries": 4, "groups": 1, "vector": 4, "pruned": False}, (8, 6)),
    "vectors of single weights": ({"entries": 4, "groups": 1, "vector": 2, "pruned": False}, (8,)),
    "pruned vectors": ({"entries": 4, "groups": 1, "vector": 2, "pruned": True}, (8, 6)),
    "pruned a number": ({"entries": 4, "groups": 1, "vector": 1, "pruned": 0}, (8, 6)),
}


@pytest.mark.parametrize(("params", "shape"), BAD.values(), ids=BAD.keys())
def test_settings_that_make_no_sense_are_refused(params, shape):
    with pytest.raises(ArtifactError):
        CODEC.predicted_bytes(shape, torch.float32, params)
    parts = {"indices": torch.zeros(shape, dtype=torch.uint8), "table": torch.zeros(1, 4)}
    with pytest.raises(ArtifactError):
        CODEC.decode(parts, params, torch.float32, shape)
    with pytest.raises(ArtifactError):
        PACKED.predicted_bytes(shape, torch.float32, {"codec": "codebook", "params": params})


def test_parts_that_do_not_fit_are_refused():
    tensor, _, encoding = shared((8, 6), 5)
    parts = CODEC.encode(tensor, encoding)
    for bad in (
        {"table": parts["table"]},
        {"indices": parts["indices"]},
        {**parts, "x": parts["table"]},
        {**parts, "indices": parts["indices"].to(torch.int8)},
        {**parts, "indices": parts["indices"][:4]},
        {**parts, "indices": parts["indices"].reshape(-1)},
        {**parts, "indices": parts["indices"] + 1},
        {**parts, "table": parts["table"][0]},
        {**parts, "table": parts["table"].double()},
        {**parts, "table": torch.zeros(1, 4)},
    ):
        with pytest.raises(ArtifactError):
            CODEC.decode(bad, encoding.params, torch.float32, (8, 6))


def test_integers_are_no_parameters_of_a_codebook():
    _, _, encoding = shared((8, 6), 5)
    with pytest.raises(ArtifactError, match="stores no"):
        CODEC.layout((8, 6), torch.int8, encoding)


def affine(bits, shape=(7, 9)):
    generator = torch.Generator().manual_seed(bits)
    low = -(1 << (bits - 1))
    values = torch.randint(low, -low, shape, generator=generator)
    params = {"bits": bits, "axis": None, "group": None}
    return values * 0.5, values, Encoding("affine", params, {"scale": torch.tensor(0.5)})


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers_stand_in_the_stream_lowest_bit_first(bits):
    tensor, values, encoding = affine(bits)
    parts = there_and_back(tensor, packed(encoding))
    number = sum(int(v + (1 << (bits - 1))) << (i * bits) for i, v in enumerate(values.reshape(-1)))
    assert bytes(parts["stream"].numpy()) == number.to_bytes(-(-63 * bits // 8), "little")


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"codec": "affine"},
        {"codec": "affine", "params": []},
        {"codec": "affine", "params": {"bits": 9, "axis": None, "group": None}},
        {"codec": "affine", "params": {"bits": 4, "axis": None, "group": None}, "x": 0},
        {"codec": "sparse", "params": {"form": "dense", "count": 63, "values": None}},
        {"codec": "packed", "params": {"codec": "affine", "params": {}}},
        {"codec": 5, "params": {}},
        {"codec": [], "params": {}},
    ],
    ids=str,
)
def test_packed_settings_that_make_no_sense_are_refused(params):
    parts = {"scale": torch.tensor(0.5), "stream": torch.zeros(32, dtype=torch.uint8)}
    with pytest.raises(ArtifactError):
        PACKED.decode(parts, params, torch.float32, (7, 9))


def test_packed_parts_that_do_not_fit_are_refused():
    tensor, _, encoding = shared((3, 3), 5)
    encoding = packed(encoding)
    parts = PACKED.encode(tensor, encoding)
    stream = parts["stream"]
    beyond = torch.full_like(stream, 255)
    for bad in (stream[:-1], torch.cat((stream, stream)), stream.to(torch.int8), beyond, stream[None]):
        with pytest.raises(ArtifactError):
            PACKED.decode({**parts, "stream": bad}, encoding.params, torch.float32, (3, 3))
    with pytest.raises(ArtifactError):
        PACKED.decode({"table": parts["table"]}, encoding.params, torch.float32, (3, 3))
