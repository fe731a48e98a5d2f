"""The codec for pruned tensors: there and back, sizes by formula, and no trust in what a file says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_cli.artifact import predicted_bytes, read_tensors, write_tensors
from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.artifact.codecs.bits import pack, pack_mask, unpack, unpack_mask
from modelopt_cli.artifact.codecs.smallest import best_run_bits
from modelopt_cli.artifact.encodings import (
    carry_over,
    compact_state,
    pruned_encoding,
    pruned_names,
    sparse_encoding,
)
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program import Encoding

SPARSE = CODECS["sparse"]
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8]
SHAPES = [(), (1,), (7,), (64,), (5, 8), (3, 4, 3, 3), (4, 6, 1, 2), (2, 0), (0, 3), (2, 3, 10)]
AFFINE = {"bits": 8, "axis": 0, "group": None}


def tensor_of(shape, dtype, density, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=generator)
    values = torch.where(values == 0, 1, values) * (torch.rand(shape, generator=generator) < density)
    return values.to(dtype) if dtype == torch.int8 else (values / 64).to(dtype)


def case(shape, dtype, density, pattern=None):
    tensor = tensor_of(shape, dtype, density, 0)
    return tensor, pruned_encoding(tensor, pattern=pattern)


def case_of_integers():
    tensor, scale = tensor_of((16, 24), torch.float32, 0.2, 0) * 64, torch.arange(1.0, 17)
    tensor *= scale[:, None]
    return tensor, pruned_encoding(tensor, Encoding("affine", AFFINE, {"scale": scale}))


CASES = {
    "single weights": lambda: case((30, 40), torch.float32, 0.1),
    "nothing to gain": lambda: case((5, 8), torch.float16, 1.0),
    "int8": lambda: case((3, 4, 30), torch.int8, 0.05),
    "integers of a scale": case_of_integers,
}


def forms_of(tensor):
    """Settings of every form that can hold a tensor, built by plain loops."""
    shape, yielded = tuple(tensor.shape), []
    axes = [None, *range(tensor.dim())]
    for axis in axes:
        rows = rows_of(tensor.tolist(), shape, axis)
        for block in (1, 3, 8):
            marks = [any(row[i : i + block]) for row in rows for i in range(0, len(row), block)]
            sizes = [len(row[i : i + block]) for row in rows for i in range(0, len(row), block)]
            count = sum(size for size, mark in zip(sizes, marks, strict=True) if mark)
            common = {"axis": axis, "block": block, "count": count}
            yielded.append({"form": "mask", **common})
            bits = max(len(marks) - 1, 0).bit_length()
            yielded.append({"form": "coordinate", **common, "bits": bits, "entries": sum(marks)})
            for width in (1, 5, 24):
                entries, gap = 0, 0
                for mark in marks:
                    gap += 1
                    if mark:
                        entries += 1 + (gap - 1) // (2**width - 1)
                        gap = 0
                yielded.append({"form": "runs", **common, "bits": width, "entries": entries})
        for m in (4, 5):
            n = 1
            for row in rows:
                for i in range(0, len(row) // m * m, m):
                    n = max(n, sum(value != 0 for value in row[i : i + m]))
            if n < m:
                count = sum(len(row) // m * n + len(row) % m for row in rows)
                yielded.append({"form": "n:m", "axis": axis, "n": n, "m": m, "count": count})
    yielded.append({"form": "dense", "count": tensor.numel()})
    return [{**form, "values": None} for form in yielded]


def rows_of(nested, shape, axis):
    array = np.array(nested, dtype=object).reshape(shape)
    if axis is not None:
        return np.moveaxis(array, axis, -1).reshape(-1, shape[axis]).tolist() if array.size else []
    if not array.size:
        return []
    return array.reshape(shape[0] if len(shape) > 1 else 1, -1).tolist()


def is_looked_for(params, shape):
    """Whether a form is among those that are compared: patterns along two directions, the rest along one."""
    axis = params.get("axis")
    length = shape[axis] if axis is not None else math.prod(shape[1:] if len(shape) > 1 else shape)
    if params["form"] == "n:m" or params.get("block", 1) > 1:
        fits = params.get("m") == 4 or (params.get("block") == 8 and length >= 8)
        return fits and axis in ((None, 1) if len(shape) > 2 else (None,))
    return axis is None


def read_as_documented(values, stream, params, shape):
    """docs/format.md in plain Python: the elements in row-major order."""
    form = params["form"]
    if form == "dense":
        return list(values)
    index = np.arange(math.prod(shape)).reshape(shape)
    rows = rows_of(index.tolist(), shape, params["axis"])
    bits = [byte >> j & 1 for byte in stream for j in range(8)]

    def number(width):
        return sum(bits.pop(0) << j for j in range(width))

    size = params["m"] if form == "n:m" else params["block"]
    blocks = [row[i : i + size] for row in rows for i in range(0, len(row), size)]
    places = []
    if form == "n:m":
        width = (size - 1).bit_length()
        for block in blocks:
            whole = len(block) == size
            places += [block[number(width)] for _ in range(params["n"])] if whole else block
    elif form == "mask":
        for block in blocks:
            places += block if bits.pop(0) else []
    elif form == "coordinate":
        for _ in range(params["entries"]):
            places += blocks[number(params["bits"])]
    else:
        at = 0
        for _ in range(params["entries"]):
            entry = number(params["bits"])
            at += entry
            if entry < 2 ** params["bits"] - 1:
                places += blocks[at]
                at += 1
    assert not any(bits)
    assert len(bits) < 8
    dense = [0] * math.prod(shape)
    for place, value in zip(places, values, strict=True):
        dense[place] = value
    return dense


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(TYPES),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.6, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_every_form_gives_back_every_tensor_and_means_what_the_page_says(shape, dtype, density, seed):
    tensor = tensor_of(shape, dtype, density, seed)
    for params in forms_of(tensor):
        encoding = Encoding("sparse", params)
        parts = SPARSE.encode(tensor, encoding)
        back = SPARSE.decode(parts, params, dtype, shape)
        assert back.dtype == dtype
        assert back.is_contiguous()
        assert torch.equal(back, tensor), params
        stream = parts["positions"].tolist() if "positions" in parts else []
        told = read_as_documented(parts["values"].tolist(), stream, params, shape)
        assert told == tensor.flatten().tolist(), params
        stored = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
        layout = SPARSE.layout(shape, dtype, encoding)
        assert stored == {name: (spec.dtype, spec.shape) for name, spec in layout.items()}
        assert SPARSE.predicted_bytes(shape, dtype, params) == sum(part.nbytes for part in parts.values())


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(TYPES),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_chosen_form_is_the_smallest_of_all_and_smaller_than_plain(shape, dtype, density, seed):
    tensor = tensor_of(shape, dtype, density, seed)
    found = sparse_encoding(tensor)
    sizes = [
        SPARSE.predicted_bytes(shape, dtype, params)
        for params in forms_of(tensor)
        if is_looked_for(params, shape)
    ]
    if found is None:
        assert min(sizes) >= tensor.nbytes
        return
    size = SPARSE.predicted_bytes(shape, dtype, found.params)
    assert size < tensor.nbytes
    assert size <= min(sizes)
    parts = SPARSE.encode(tensor, found)
    assert torch.equal(SPARSE.decode(parts, found.params, dtype, shape), tensor)


def test_sizes_by_hand():
    """10 % of 1,000,000 float32 weights: which form wins at which density, and its bytes."""
    n, rng = 1_000_000, np.random.default_rng(0)
    for density, expected in [(0.5, "mask"), (0.1, "runs"), (0.01, "runs")]:
        index = np.sort(rng.choice(n, int(n * density), replace=False))
        tensor = torch.zeros(1000, 1000)
        tensor.view(-1)[torch.from_numpy(index)] = 1.5
        found = sparse_encoding(tensor)
        params, nonzero = found.params, len(index)
        size = SPARSE.predicted_bytes((1000, 1000), torch.float32, params)
        assert params["form"] == expected
        assert params["count"] == nonzero
        gaps = np.diff(index, prepend=-1) - 1
        by_width = {k: nonzero + int((gaps // (2**k - 1)).sum()) for k in range(1, 25)}
        runs = min(math.ceil(k * entries / 8) for k, entries in by_width.items())
        assert size == 4 * nonzero + {"mask": n // 8, "runs": runs}[expected]
        if expected == "runs":
            assert params["entries"] == by_width[params["bits"]]
            entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
            assert entropy * n / 8 < runs < 1.12 * entropy * n / 8


def two_of_four(out, columns, seed=0, n=2, m=4):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    order = torch.rand(out, columns // m, m, generator=generator).argsort(-1)
    return (weight.view(out, -1, m) * (order < n)).view(out, columns)


def test_two_of_four_takes_two_bits_for_each_weight_kept():
    weight = two_of_four(32, 64)
    for tensor, itemsize in (
        (weight, 4),
        (weight.half(), 2),
        ((weight * 40).clamp(-99, 99).to(torch.int8), 1),
    ):
        exact = tensor if itemsize > 1 else torch.where(weight != 0, torch.where(tensor == 0, 1, tensor), 0)
        found = sparse_encoding(exact.to(tensor.dtype))
        assert (found.params["form"], found.params["n"], found.params["m"]) == ("n:m", 2, 4)
        size = SPARSE.predicted_bytes((32, 64), tensor.dtype, found.params)
        assert size == 32 * 64 // 2 * itemsize + 32 * 64 // 2 * 2 // 8


def test_two_of_four_along_the_input_channels_of_a_convolution():
    """Groups of four channels at one kernel position; what exceeds a multiple of four is kept whole."""
    weight = two_of_four(8 * 9, 16).view(8, 3, 3, 16).permute(0, 3, 1, 2)
    found = sparse_encoding(weight, pattern="2:4")
    assert found.params == {
        "form": "n:m",
        "axis": 1,
        "n": 2,
        "m": 4,
        "count": weight.numel() // 2,
        "values": None,
    }
    uneven = torch.cat((weight, torch.ones(8, 2, 3, 3)), 1)
    found = sparse_encoding(uneven, pattern="2:4")
    assert found.params["count"] == weight.numel() // 2 + 8 * 2 * 9
    back = SPARSE.decode(SPARSE.encode(uneven, found), found.params, uneven.dtype, tuple(uneven.shape))
    assert torch.equal(back, uneven)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (1, 8), (2, 8), (1, 16), (3, 32)])
def test_other_patterns_are_found(n, m):
    weight = two_of_four(64, 64, n=n, m=m)
    found = sparse_encoding(weight, pattern=f"{n}:{m}")
    assert (found.params["form"], found.params["n"], found.params["m"]) == ("n:m", n, m)
    again = sparse_encoding(weight, found)
    assert again.params == found.params


def test_blocks_of_four_are_written_as_blocks():
    generator = torch.Generator().manual_seed(0)
    keep = (torch.rand(64, 32, generator=generator) < 0.2).repeat_interleave(4, 1)
    weight = torch.randn(64, 128, generator=generator) * keep
    found = sparse_encoding(weight)
    assert found.params["block"] == 4
    single = {"form": "mask", "axis": None, "block": 1, "count": int(keep.sum()), "values": None}
    assert SPARSE.predicted_bytes((64, 128), torch.float32, found.params) < SPARSE.predicted_bytes(
        (64, 128), torch.float32, single
    )
    kernel = weight.view(64, 4, 4, 8).permute(0, 3, 1, 2)  # blocks along the input channels
    assert sparse_encoding(kernel, pattern="block:4").params["axis"] == 1


def test_a_few_scattered_weights_are_written_as_coordinates():
    """A single weight at the end of 2^k: a run length of k bits would need its escape."""
    weight = torch.zeros(16, 16)
    weight[15, 15] = 1.0
    found = sparse_encoding(weight)
    assert found.params["form"] == "coordinate"
    assert SPARSE.predicted_bytes((16, 16), torch.float32, found.params) == 4 + 1


def affine_tensor(shape=(16, 24), density=0.3, dtype=torch.float32, seed=0):
    steps = tensor_of(shape, torch.int8, density, seed)
    scale = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) + 0.1
    weight = (steps.float() * scale.view(-1, *[1] * (len(shape) - 1))).to(dtype)
    return weight, steps, Encoding("affine", AFFINE, {"scale": scale})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_steps_are_stored_where_the_values_are_affine(dtype):
    weight, steps, encoding = affine_tensor(dtype=dtype)
    found = sparse_encoding(weight, encoding)
    assert found.params["values"] == AFFINE
    parts = SPARSE.encode(weight, found)
    assert parts["values"].dtype == torch.int8
    assert torch.equal(parts["values"], steps[steps != 0])
    assert torch.equal(parts["scale"], encoding.parts["scale"])
    assert torch.equal(SPARSE.decode(parts, found.params, dtype, (16, 24)), weight)
    size = SPARSE.predicted_bytes((16, 24), dtype, found.params, ("scale",))
    assert size == sum(part.nbytes for part in parts.values())
    affine = CODECS["affine"].predicted_bytes((16, 24), dtype, AFFINE)
    positions = 16 * 24 // 8 if found.params["form"] == "mask" else parts["positions"].numel()
    assert size == int((steps != 0).sum()) + positions + 4 * 16 < affine
    assert sparse_encoding(weight, found).params == found.params  # once more from what it is now


def test_few_zeros_are_marked_all_the_same():
    weight = torch.ones(16, 16)
    weight[3, 4] = 0
    assert sparse_encoding(weight) is None
    marked = pruned_encoding(weight)
    assert marked.params == {"form": "dense", "count": 256, "values": None}
    assert SPARSE.encode(weight, marked).keys() == {"values"}
    assert SPARSE.predicted_bytes((16, 16), torch.float32, marked.params) == weight.nbytes
    for nothing in (torch.tensor([True]), torch.tensor([1])):
        assert sparse_encoding(nothing) is None
        with pytest.raises(ModeloptError, match="cannot be marked"):
            pruned_encoding(nothing)


def test_nan_stays_and_a_negative_zero_comes_back_as_zero():
    weight = torch.zeros(4, 64)
    weight[0, 0], weight[1, 1], weight[2, 2] = float("nan"), float("inf"), -0.0
    found = sparse_encoding(weight)
    back = SPARSE.decode(SPARSE.encode(weight, found), found.params, torch.float32, (4, 64))
    assert found.params["count"] == 2
    assert back[0, 0].isnan()
    assert back[1, 1].isinf()
    assert not back[2, 2].signbit()


def test_a_large_empty_tensor_takes_the_room_that_guards_readers():
    weight = torch.zeros(1024, 1024)
    found = sparse_encoding(weight)
    assert found.params["form"] == "mask"
    parts = SPARSE.encode(weight, found)
    assert torch.equal(SPARSE.decode(parts, found.params, torch.float32, (1024, 1024)), weight)
    tiny = {"form": "runs", "axis": None, "block": 1, "count": 0, "bits": 1, "entries": 0, "values": None}
    none = {"values": torch.zeros(0), "positions": torch.zeros(0, dtype=torch.uint8)}
    assert SPARSE.decode(none, tiny, torch.float32, (64, 64)).numel() == 4096
    for shape in ((64, 65), (1 << 40, 1 << 19)):
        with pytest.raises(ArtifactError, match="so few bytes"):
            SPARSE.decode(none, tiny, torch.float32, shape)


@given(st.integers(1, 32), st.lists(st.integers(0, 2**32 - 1), max_size=40))
@settings(max_examples=100, deadline=None)
def test_numbers_of_any_width_are_packed_lowest_bit_first(bits, numbers):
    entries = np.array([number % 2**bits for number in numbers], dtype=np.int64)
    whole = sum(int(entry) << i * bits for i, entry in enumerate(entries))
    stream = pack(entries, bits)
    assert bytes(stream.tolist()) == whole.to_bytes(-(-len(entries) * bits // 8), "little")
    assert unpack(stream, len(entries), bits).tolist() == entries.tolist()


def test_long_streams_are_packed_in_pieces():
    entries = np.arange((1 << 20) + 11) % 8
    stream = pack(entries, 3)
    assert len(stream) == -(-len(entries) * 3 // 8)
    assert np.array_equal(unpack(stream, len(entries), 3), entries)
    mask = torch.from_numpy(entries % 2 == 1)
    assert torch.equal(unpack_mask(pack_mask(mask), len(mask)), mask)


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=30, unique=True))
@settings(max_examples=100, deadline=None)
def test_the_width_of_runs_is_the_best_one(places):
    index = np.array(sorted(places))
    gaps = np.diff(index, prepend=-1) - 1
    bits, entries = best_run_bits(index)
    every = {k: len(index) + sum(int(gap) // (2**k - 1) for gap in gaps) for k in range(1, 25)}
    assert entries == every[bits]
    assert -(-bits * entries // 8) == min(-(-k * n // 8) for k, n in every.items())


def test_an_encoding_of_other_zeros_is_refused():
    weight = two_of_four(8, 64)
    found = sparse_encoding(weight)
    full = torch.ones(8, 64)
    with pytest.raises(ModeloptError, match="other zeros than its encoding") as caught:
        SPARSE.encode(full, sparse_encoding(weight.masked_fill(torch.rand(8, 64) < 0.5, 0)))
    assert caught.value.exit_code == 4
    with pytest.raises(ModeloptError, match="other zeros"):
        SPARSE.encode(full, found)


# --- what a hostile file may say -----------------------------------------------------------------------

MASK = {"form": "mask", "axis": None, "block": 1, "count": 3, "values": None}
COORDINATE = {**MASK, "form": "coordinate", "bits": 4, "entries": 3}
RUNS = {**COORDINATE, "form": "runs", "bits": 2, "entries": 4}
N_OF_M = {"form": "n:m", "axis": None, "n": 1, "m": 4, "count": 3, "values": None}
SHAPE = (3, 4)
THREE = torch.tensor([1.0, 2.0, 3.0])


def bits_of(*entries, bits):
    return pack(np.array(entries), bits)


STREAMS = {
    "mask": (MASK, bits_of(0b1100_0000_0001, bits=12)),
    "coordinate": (COORDINATE, bits_of(0, 10, 11, bits=4)),
    "runs": (RUNS, bits_of(0, 3, 3, 3, 0, 0, bits=2)),
    "n:m": (N_OF_M, bits_of(0, 1, 3, bits=2)),
}
STREAMS["runs"] = ({**RUNS, "entries": 6}, STREAMS["runs"][1])


@pytest.mark.parametrize("form", STREAMS)
def test_the_streams_below_are_good_to_begin_with(form):
    params, stream = STREAMS[form]
    back = SPARSE.decode({"values": THREE, "positions": stream}, params, torch.float32, SHAPE)
    assert back[back != 0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("form", STREAMS)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"form": "zip"}, "unknown form"),
        ({"form": ["mask"]}, "unknown form"),
        ({"axis": 2}, "axis"),
        ({"axis": -1}, "axis"),
        ({"axis": True}, "axis"),
        ({"axis": "0"}, "axis"),
        ({"count": -1}, "count"),
        ({"count": 13}, "count"),
        ({"count": 3.0}, "count"),
        ({"count": True}, "count"),
        ({"count": 2}, "count|values|entries|positions"),
        ({"values": 7}, "values must be"),
        ({"values": {"bits": 8}}, "affine"),
        ({"x": 1}, "needs exactly"),
        ({"block": 0}, "block|needs exactly"),
        ({"block": 1 << 40}, "block|needs exactly"),
        ({"bits": 33}, "bits|needs exactly"),
        ({"bits": -1}, "bits|needs exactly"),
        ({"bits": 5}, "positions|needs exactly"),
        ({"entries": 13}, "entries|needs exactly"),
        ({"entries": -1}, "entries|needs exactly"),
        ({"entries": 1}, "positions|needs exactly"),
        ({"n": 4}, "n must be|needs exactly"),
        ({"n": 0}, "n must be|needs exactly"),
        ({"m": 1}, "m must be|needs exactly"),
        ({"m": 1 << 30}, "m must be|needs exactly"),
        ({"n": 2}, "count|needs exactly"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_hostile_settings_are_refused(form, change, what):
    params, stream = STREAMS[form]
    with pytest.raises(ArtifactError, match=what):
        SPARSE.decode({"values": THREE, "positions": stream}, {**params, **change}, torch.float32, SHAPE)


BYTE = torch.zeros(1, dtype=torch.uint8)
BAD_STREAMS = {
    "mask of too many": (MASK, bits_of(0b1111, bits=12), "not as many"),
    "mask of too few": (MASK, bits_of(0b11, bits=12), "not as many"),
    "mask with more bits": (MASK, bits_of(0b1_0000_0000_0011, bits=13), "not zero"),
    "coordinates out of order": (COORDINATE, bits_of(0, 11, 10, bits=4), "increasing"),
    "coordinates twice": (COORDINATE, bits_of(0, 10, 10, bits=4), "increasing"),
    "coordinates beyond": (COORDINATE, bits_of(0, 10, 12, bits=4), "beyond"),
    "coordinates with more bits": (COORDINATE, bits_of(0, 10, 11, 1, bits=4), "not zero"),
    "coordinates of no bits": ({**COORDINATE, "bits": 0}, BYTE[:0], "increasing"),
    "runs beyond": (RUNS, bits_of(2, 3, 3, 2, bits=2), "beyond|not as many"),
    "runs far beyond": ({**RUNS, "count": 4}, bits_of(2, 2, 2, 2, bits=2), "values|not as many"),
    "runs that end nowhere": (RUNS, bits_of(0, 0, 0, 3, bits=2), "ends nowhere"),
    "runs of too few": (RUNS, bits_of(3, 0, 3, 0, bits=2), "not as many"),
    "runs with more bits": ({**RUNS, "bits": 3}, bits_of(1, 1, 1, 0, 1, bits=3), "not as many|not zero"),
    "n:m out of its group": ({**N_OF_M, "m": 3, "count": 6}, bits_of(3, 0, 0, bits=2), "outside|values"),
    "n:m with more bits": (N_OF_M, bits_of(0, 1, 3, 1, bits=2), "not zero"),
    "stream too short": (MASK, BYTE, "positions"),
    "stream too long": (MASK, torch.zeros(3, dtype=torch.uint8), "positions"),
    "stream of another type": (MASK, torch.zeros(2, dtype=torch.int8), "positions"),
}


@pytest.mark.parametrize(("params", "stream", "what"), BAD_STREAMS.values(), ids=BAD_STREAMS.keys())
def test_hostile_positions_are_refused(params, stream, what):
    with pytest.raises(ArtifactError, match=what):
        SPARSE.decode({"values": THREE, "positions": stream}, params, torch.float32, SHAPE)


def test_groups_must_be_in_order_and_blocks_hold_something():
    params = {**N_OF_M, "n": 2, "count": 6}
    values = torch.arange(1.0, 7.0)
    for pair in ((1, 0), (2, 2)):
        stream = bits_of(*pair, 0, 1, 0, 1, bits=2)
        with pytest.raises(ArtifactError, match="increasing"):
            SPARSE.decode({"values": values, "positions": stream}, params, torch.float32, SHAPE)
    with pytest.raises(ArtifactError, match="outside its group"):
        SPARSE.decode(
            {"values": torch.ones(2), "positions": bits_of(3, 0, bits=2)},
            {**N_OF_M, "m": 3, "count": 2},
            torch.float32,
            (2, 3),
        )
    for params, stream in STREAMS.values():
        if params["form"] != "n:m":
            zero = {"values": torch.tensor([1.0, 0.0, 3.0]), "positions": stream}
            with pytest.raises(ArtifactError, match="nothing but zeros"):
                SPARSE.decode(zero, params, torch.float32, SHAPE)


BAD_PARTS = {
    "no values": ({"positions": STREAMS["mask"][1]}, MASK),
    "no positions": ({"values": THREE}, MASK),
    "unknown part": ({"values": THREE, "positions": STREAMS["mask"][1], "x": THREE}, MASK),
    "scale of plain values": ({"values": THREE, "positions": STREAMS["mask"][1], "scale": THREE}, MASK),
    "values of another type": ({"values": THREE.half(), "positions": STREAMS["mask"][1]}, MASK),
    "values in another shape": ({"values": THREE.view(1, 3), "positions": STREAMS["mask"][1]}, MASK),
    "positions of everything": (
        {"values": torch.ones(12), "positions": BYTE},
        {"form": "dense", "count": 12, "values": None},
    ),
    "dense of less": ({"values": THREE}, {"form": "dense", "count": 3, "values": None}),
    "affine without a scale": (
        {"values": THREE.to(torch.int8), "positions": STREAMS["mask"][1]},
        {**MASK, "values": AFFINE},
    ),
    "affine with a zero point": (
        {"values": THREE.to(torch.int8), "positions": STREAMS["mask"][1], "scale": THREE,
         "zero_point": THREE.to(torch.int8)},
        {**MASK, "values": AFFINE},
    ),
    "affine of floats": (
        {"values": THREE, "positions": STREAMS["mask"][1], "scale": THREE},
        {**MASK, "values": AFFINE},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "params"), BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_hostile_parts_are_refused(parts, params):
    with pytest.raises(ArtifactError):
        SPARSE.decode(parts, params, torch.float32, SHAPE)
    with pytest.raises(ArtifactError, match="stores no"):
        SPARSE.decode(parts, params, torch.int64, SHAPE)


# --- in files ------------------------------------------------------------------------------------------


def test_files_hold_pruned_tensors_and_say_so(tmp_path):
    steps, scaled = affine_tensor()[0], affine_tensor()[2]
    state = {
        "a.weight": two_of_four(16, 64),
        "b.weight": tensor_of((8, 4, 3, 3), torch.float32, 0.05, 1),
        "c.weight": steps,
        "d.weight": tensor_of((32, 32), torch.int8, 0.2, 2),
        "e.weight": torch.ones(3, 3),
        "bias": torch.ones(4),
    }
    names = [name for name in state if name != "bias"]
    encodings = compact_state(state, {"c.weight": scaled}, names)
    assert pruned_names(encodings) == set(names)
    path = tmp_path / "net.safetensors"
    written = write_tensors(state, encodings, path)
    assert written.file_bytes == path.stat().st_size == predicted_bytes(state, encodings)
    plain = predicted_bytes(state, {"c.weight": scaled})
    assert written.file_bytes < plain
    found = read_tensors(path)
    assert all(torch.equal(found.state[name], value) for name, value in state.items())
    assert {name: e.params for name, e in found.encodings.items()} == {
        name: e.params for name, e in encodings.items()
    }
    again = write_tensors(found.state, found.encodings, tmp_path / "again")
    assert again.sha256 == written.sha256
    assert compact_state(found.state, found.encodings).keys() == encodings.keys()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_tensor_of_zeros_alone_is_written_and_read(dtype, tmp_path):
    state = {"zero.weight": torch.zeros(64, 64, dtype=dtype), "bias": torch.ones(2)}
    encodings = compact_state(state, {}, ["zero.weight"])
    assert encodings["zero.weight"].params["count"] == 0
    written = write_tensors(state, encodings, tmp_path / "zero")
    assert written.file_bytes < predicted_bytes(state)
    assert torch.equal(read_tensors(tmp_path / "zero").state["zero.weight"], state["zero.weight"])


def test_what_was_pruned_stays_pruned_under_new_values_and_names():
    before = {"a": two_of_four(16, 64, n=3, m=32), "gone": torch.zeros(4, 4), "whole": torch.ones(2)}
    earlier = compact_state(before, {}, ["a", "gone"], "3:32")  # no group that is looked for unasked
    after = {"b": (before["a"].sign() * 9).to(torch.int8), "whole": torch.ones(2)}
    found = carry_over(before, earlier, after, {}, {"a": "b"})
    assert found.keys() == {"b"}
    assert found["b"].params["m"] == 32
    after["b"][before["a"] == 0] = 1
    with pytest.raises(ModeloptError, match="b: a weight that was pruned is not zero any more"):
        carry_over(before, earlier, after, {}, {"a": "b"})
