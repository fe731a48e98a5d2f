"""The codec ``affine``: lossless where the values fit, an error where they do not, sizes exact."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program import Encoding

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = {
    "tensor": (None, None),
    "axis 0": (0, None),
    "axis 1": (1, None),
    "group": (None, 4),
    "short group": (None, 5),
}


def quantized(shape, dtype, bits, axis, group, zero_point, seed=0):
    """A tensor on an affine grid, built with plain broadcasting, and the encoding that describes it."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if axis is not None:
        coarse = (shape[axis],)
        expand = [shape[axis] if i == axis else 1 for i in range(len(shape))]
    elif group is not None:
        coarse = (*shape[:-1], -(-shape[-1] // group))
        expand = None
    else:
        coarse, expand = (), [1] * len(shape)
    scale = torch.rand(coarse, generator=generator) + 0.01
    zero = torch.randint(low, high + 1, coarse, generator=generator)
    values = torch.randint(low, high + 1, shape, generator=generator)

    def spread(part):
        if expand is not None:
            return part.reshape(expand)
        return part.repeat_interleave(group, -1)[..., : shape[-1]]

    offset = spread(zero) if zero_point else torch.tensor(0)
    weights = ((values - offset).float() * spread(scale)).to(dtype)
    parts = {"scale": scale, **({"zero_point": zero.to(torch.int8)} if zero_point else {})}
    return weights, values, Encoding("affine", {"bits": bits, "axis": axis, "group": group}, parts)


def case(*settings):
    weights, _, encoding = quantized(*settings)
    return weights, encoding


CASES = {
    "int8 by row": lambda: case((12, 7, 3), torch.float32, 8, 0, None, False),
    "int4 by group with zero points": lambda: case((6, 10), torch.bfloat16, 4, None, 4, True),
    "scalar": lambda: case((), torch.float64, 2, None, None, False),
}


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("axis", "group"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("bits", range(2, 9))
def test_affine_recovers_the_integers_exactly(bits, axis, group, zero_point):
    weights, values, encoding = quantized((6, 7, 3, 9), torch.float32, bits, axis, group, zero_point)
    parts = CODECS["affine"].encode(weights, encoding)
    assert parts["values"].dtype == torch.int8
    assert torch.equal(parts["values"].long(), values)
    back = CODECS["affine"].decode(parts, encoding.params, weights.dtype, tuple(weights.shape))
    assert torch.equal(back, weights)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("axis", "group"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_affine_gives_back_every_float_type_bit_for_bit(dtype, axis, group):
    for zero_point, seed in itertools.product([False, True], range(5)):
        weights, _, encoding = quantized((6, 7, 3, 9), dtype, 8, axis, group, zero_point, seed)
        parts = CODECS["affine"].encode(weights, encoding)
        back = CODECS["affine"].decode(parts, encoding.params, dtype, tuple(weights.shape))
        assert back.dtype == dtype
        assert torch.equal(back, weights)


@given(
    scale=st.floats(2**-100, 2**100, width=32),
    values=st.lists(st.integers(-128, 127), min_size=1, max_size=20),
)
@settings(max_examples=300, deadline=None)
def test_affine_is_exact_for_any_scale(scale, values):
    steps = torch.tensor(values, dtype=torch.int8)
    encoding = Encoding("affine", {"bits": 8, "axis": None, "group": None}, {"scale": torch.tensor(scale)})
    parts = CODECS["affine"].encode(steps.float() * torch.tensor(scale), encoding)
    assert torch.equal(parts["values"], steps)


def test_affine_keeps_zeros_zero_even_where_a_channel_has_scale_zero():
    weights = torch.tensor([[0.0, 0.0], [0.5, -0.0]])
    params = {"bits": 8, "axis": 0, "group": None}
    encoding = Encoding("affine", params, {"scale": torch.tensor([0.0, 0.25])})
    parts = CODECS["affine"].encode(weights, encoding)
    assert parts["values"].tolist() == [[0, 0], [2, 0]]
    assert torch.equal(CODECS["affine"].decode(parts, params, torch.float32, (2, 2)), weights)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)], ids=str)
def test_affine_takes_scalars_and_empty_tensors(shape):
    encoding = Encoding("affine", {"bits": 8, "axis": None, "group": None}, {"scale": torch.tensor(2.0)})
    parts = CODECS["affine"].encode(torch.full(shape, 6.0), encoding)
    assert CODECS["affine"].decode(parts, encoding.params, torch.float32, shape).shape == shape


def test_affine_accepts_scales_kept_in_broadcast_shape():
    weights, values, encoding = quantized((4, 3), torch.float32, 8, 0, None, False)
    broadcast = Encoding("affine", encoding.params, {"scale": encoding.parts["scale"].reshape(4, 1)})
    parts = CODECS["affine"].encode(weights, broadcast)
    assert parts["scale"].shape == (4,)
    assert torch.equal(parts["values"].long(), values)


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([0.1, 0.25]),
        torch.tensor([0.25, 0.25 + 2**-20]),
        torch.tensor([0.25, 128 * 0.25]),
        torch.tensor([0.25, float("inf")]),
        torch.tensor([0.25, float("nan")]),
    ],
    ids=["off the grid", "nearly on the grid", "out of range", "infinite", "nan"],
)
def test_affine_refuses_values_that_it_would_change(weights):
    encoding = Encoding("affine", {"bits": 8, "axis": None, "group": None}, {"scale": torch.tensor(0.25)})
    with pytest.raises(ModeloptError) as caught:
        CODECS["affine"].encode(weights, encoding)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("bits", "zero"), [(8, 128), (4, 8), (4, -9), (8, 0.5)])
def test_affine_refuses_a_zero_point_outside_its_range(bits, zero):
    parts = {"scale": torch.tensor(1.0), "zero_point": torch.tensor(zero)}
    with pytest.raises(ModeloptError, match="zero point"):
        CODECS["affine"].encode(
            torch.zeros(3), Encoding("affine", {"bits": bits, "axis": None, "group": None}, parts)
        )


BAD_PARAMS = {
    "bits missing": {"axis": 0, "group": None},
    "unknown setting": {"bits": 8, "axis": 0, "group": None, "x": 1},
    "one bit": {"bits": 1, "axis": 0, "group": None},
    "nine bits": {"bits": 9, "axis": 0, "group": None},
    "bits true": {"bits": True, "axis": 0, "group": None},
    "bits a fraction": {"bits": 8.0, "axis": 0, "group": None},
    "axis too large": {"bits": 8, "axis": 2, "group": None},
    "axis negative": {"bits": 8, "axis": -1, "group": None},
    "axis a text": {"bits": 8, "axis": "0", "group": None},
    "axis and group": {"bits": 8, "axis": 0, "group": 2},
    "group zero": {"bits": 8, "axis": None, "group": 0},
    "group huge": {"bits": 8, "axis": None, "group": 1 << 70},
}


@pytest.mark.parametrize("params", BAD_PARAMS.values(), ids=BAD_PARAMS.keys())
def test_affine_refuses_hostile_settings(params):
    parts = {"values": torch.zeros(2, 3, dtype=torch.int8), "scale": torch.ones(2)}
    with pytest.raises(ArtifactError):
        CODECS["affine"].decode(parts, params, torch.float32, (2, 3))


VALUES, SCALE = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)
BAD_PARTS = {
    "no values": {"scale": SCALE},
    "no scale": {"values": VALUES},
    "unknown part": {"values": VALUES, "scale": SCALE, "x": SCALE},
    "values of another shape": {"values": VALUES.reshape(3, 2), "scale": SCALE},
    "values of another type": {"values": VALUES.to(torch.uint8), "scale": SCALE},
    "values too large": {"values": VALUES + 8, "scale": SCALE},
    "scale too long": {"values": VALUES, "scale": torch.ones(3)},
    "scale in broadcast shape": {"values": VALUES, "scale": SCALE.reshape(2, 1)},
    "scale of another type": {"values": VALUES, "scale": SCALE.to(torch.int32)},
    "zero point of another type": {"values": VALUES, "scale": SCALE, "zero_point": SCALE},
    "zero point too large": {
        "values": VALUES,
        "scale": SCALE,
        "zero_point": torch.full((2,), -9, dtype=torch.int8),
    },
}


@pytest.mark.parametrize("parts", BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_affine_refuses_hostile_parts(parts):
    with pytest.raises(ArtifactError):
        CODECS["affine"].decode(parts, {"bits": 4, "axis": 0, "group": None}, torch.float32, (2, 3))


def test_affine_refuses_integers_and_shapes_that_overflow():
    params = {"bits": 8, "axis": None, "group": 1}
    with pytest.raises(ArtifactError, match=r"stores no torch\.int64"):
        CODECS["affine"].decode({"values": VALUES, "scale": SCALE}, params, torch.int64, (2, 3))
    hostile = {"values": torch.empty(0, dtype=torch.int8), "scale": torch.empty(0)}
    with pytest.raises(ArtifactError):
        CODECS["affine"].decode(hostile, params, torch.float32, (1 << 62, 4))


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("axis", "group"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_affine_predicts_its_bytes_exactly(axis, group, zero_point):
    weights, _, encoding = quantized((6, 7, 3, 9), torch.float32, 8, axis, group, zero_point)
    stored = sum(part.nbytes for part in CODECS["affine"].encode(weights, encoding).values())
    optional = ("zero_point",) if zero_point else ()
    shape = tuple(weights.shape)
    assert CODECS["affine"].predicted_bytes(shape, torch.float32, encoding.params, optional) == stored


def test_affine_writes_the_integers_that_a_method_hands_over():
    weights, values, encoding = quantized((6, 7), torch.float32, 8, 0, None, False)
    weights[0], encoding.parts["scale"][0] = (
        0,
        0,
    )  # any integers of this row stand for zeros
    handed = replace(encoding, integers=values.to(torch.int8))
    parts = CODECS["affine"].encode(weights, handed)
    assert torch.equal(parts["values"], handed.integers)
    assert not torch.equal(CODECS["affine"].encode(weights, encoding)["values"], handed.integers)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda integers: integers + 1, "do not stand for its values"),
        (lambda integers: integers[:3], "another type or shape"),
        (lambda integers: integers.int(), "another type or shape"),
    ],
    ids=["other values", "other shape", "other type"],
)
def test_affine_refuses_integers_that_are_not_those_of_the_values(change, says):
    weights, values, encoding = quantized((6, 7), torch.float32, 4, 0, None, False)
    wrong = replace(encoding, integers=change(values.clamp(-8, 6).to(torch.int8)))
    with pytest.raises(ModeloptError, match=says):
        CODECS["affine"].encode(weights, wrong)
