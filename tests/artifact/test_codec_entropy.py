"""The codec `entropy`: there and back, as documented, near the entropy, and safe against hostile files."""

import math
import random

import numpy as np
import pytest
import reference_entropy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.artifact.codecs.blocks import Alphabet, Passes, decode_block, encode_block
from modelopt_cli.artifact.codecs.matrix import MatrixForm, columns_of, decode, encode
from modelopt_cli.artifact.encodings import pruned_encoding
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program import Encoding

CODEC = CODECS["entropy"]


def codebook(integers, entries=None):
    """A float parameter whose indices into a table of integers are these, and its encoding."""
    indices = torch.as_tensor(integers)
    entries = entries or int(indices.max()) + 1
    table = torch.arange(entries).float()[None] - entries // 2
    params = {"entries": entries, "groups": 1, "vector": 1, "pruned": False}
    return table[0][indices.long()], Encoding("codebook", params, {"table": table})


def stored(integers, entries=None):
    """Parameter, encoding with its stream, and all its parts."""
    tensor, encoding = codebook(integers, entries)
    coded = CODEC.offer(tensor, encoding)
    return tensor, coded, CODEC.encode(tensor, coded)


def decoded(parts, params, tensor):
    return CODEC.decode(parts, params, tensor.dtype, tuple(tensor.shape))


def zero_order_bits(integers):
    _, counts = np.unique(np.asarray(integers), return_counts=True)
    return sum(n * math.log2(counts.sum() / n) for n in counts.tolist())


def gaussian(shape, spread, middle, entries, seed=0):
    values = np.random.default_rng(seed).normal(middle, spread, shape)
    return np.clip(np.rint(values), 0, entries - 1).astype(np.int64)


def kernels(rows=96, channels=24, seed=0):
    """Integers like those of a convolution: rows and channels of different sizes, smooth kernels."""
    generator = np.random.default_rng(seed)
    scale = generator.gamma(2.0, 1.0, (rows, 1, 1)) * generator.gamma(2.0, 1.0, (1, channels, 1)) * 1.2
    smooth = generator.normal(size=(rows, channels, 1)) + 0.4 * generator.normal(size=(rows, channels, 9))
    return np.clip(np.rint(smooth * scale), -15, 15).astype(np.int64).reshape(rows, channels, 3, 3) + 15


def rows_of_different_sizes(shape, seed=0):
    spread = np.linspace(0.3, 4, 7)[np.arange(shape[0])[:, None] % 7]
    values = np.random.default_rng(seed).normal(size=shape) * spread
    return np.clip(np.rint(values), -15, 15).astype(np.int64) + 15


def mostly_zero(shape=(40, 60), seed=0):
    generator = np.random.default_rng(seed)
    return np.where(generator.random(shape) < 0.08, generator.integers(0, 31, shape), 15)


MATRICES = {
    "dense": gaussian((24, 50), 2.5, 8, 16),
    "middle between two": gaussian((64, 30), 1.0, 3.5, 8),
    "kernels": kernels(40, 6),
    "mostly zero": mostly_zero(),
    "many symbols": gaussian((20, 30), 40.0, 128, 256),
    "one column": gaussian((1500,), 1.5, 4, 9),
    "few rows": gaussian((3, 400), 1.5, 4, 9),
    "one symbol": np.zeros((20, 30), np.int64),
    "one weight": np.array(3),
    "two phases": gaussian((300, 60), 1.5, 4, 9),
    "rows of different sizes": rows_of_different_sizes((60, 40)),
}


@pytest.mark.parametrize("integers", MATRICES.values(), ids=MATRICES.keys())
def test_a_decoder_written_from_the_page_reads_the_stream(integers):
    tensor, coded, parts = stored(integers, int(integers.max()) + 2)
    found = reference_entropy.decode(bytes(parts["stream"].numpy()), coded.params)
    assert found == integers.reshape(-1).tolist()
    assert torch.equal(decoded(parts, coded.params, tensor), tensor)


def test_the_matrices_above_take_every_branch_of_the_page():
    params = [stored(integers, int(integers.max()) + 2)[1].params for integers in MATRICES.values()]
    assert {p["signed"] for p in params} == {True, False}
    assert len({p["mirror"] for p in params}) > 1
    assert {last > 0 for p in params for _, _, last, _ in p["blocks"]} == {True, False}
    assert any(lanes % 8 and lanes > 8 for p in params for _, lanes, _, _ in p["blocks"])


def test_the_page_covers_several_blocks_and_hands_too_few_words_on(monkeypatch):
    monkeypatch.setattr("modelopt_cli.artifact.codecs.matrix.MOST_SYMBOLS", 1000)
    tensor, coded, parts = stored(gaussian((90, 40), 1.5, 4, 9))
    assert len(coded.params["blocks"]) == 4
    found = reference_entropy.decode(bytes(parts["stream"].numpy()), coded.params)
    assert found == (tensor.long() + 4).reshape(-1).tolist()
    assert torch.equal(decoded(parts, coded.params, tensor), tensor)
    # The last row has fewer words than 30 lanes begin with.
    alphabet, passes = Alphabet(1, 0, True, 2), Passes(61, 30, 1)
    block = (np.random.default_rng(0).random((61, 20)) < 0.1).astype(np.int16)
    stream = encode_block(block, passes, alphabet)
    written = {"blocks": [[61, 30, 1, len(stream)]], "center": 0, "columns": 20}
    written |= {"reach": 1, "mirror": 0, "signed": True, "lag": 2}
    assert reference_entropy.decode(bytes(stream), written) == block.reshape(-1).tolist()
    assert np.array_equal(decode_block(stream, passes, 20, alphabet), block)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_matrix_comes_back(data):
    shape = data.draw(st.lists(st.integers(1, 12), max_size=4).map(tuple))
    entries = data.draw(st.sampled_from([1, 2, 3, 7, 16, 200, 256]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    skew = data.draw(st.sampled_from([0.3, 1, 4]))
    values = np.random.default_rng(seed).random(shape) ** skew * entries
    tensor, coded, parts = stored(values.astype(np.int64), entries)
    assert torch.equal(decoded(parts, coded.params, tensor), tensor)
    size = sum(part.nbytes for part in parts.values())
    predicted = CODEC.predicted_bytes(tuple(tensor.shape), tensor.dtype, coded.params, tuple(coded.parts))
    assert predicted == size
    layout = CODEC.layout(tuple(tensor.shape), tensor.dtype, Encoding("entropy", coded.params, coded.parts))
    assert {name: (spec.dtype, spec.shape) for name, spec in layout.items()} == {
        name: (part.dtype, tuple(part.shape)) for name, part in parts.items()
    }


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 12),
    reach=st.sampled_from([0, 1, 2, 17, 300, 2048]),
    mirror=st.sampled_from([-1, 0, 1]),
    signed=st.booleans(),
    lag=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_way_to_pass_a_block_comes_back(rows, columns, reach, mirror, signed, lag, data):
    reach = max(reach, abs(mirror))
    last = data.draw(st.integers(0, rows - 1))
    passes = Passes(rows, data.draw(st.integers(1, rows - last)), last)
    alphabet = Alphabet(reach, mirror, signed, lag)
    seed = data.draw(st.integers(0, 2**32 - 1))
    low, high = max(-reach, mirror - reach), min(reach, reach + mirror)
    block = np.random.default_rng(seed).integers(low, high + 1, (rows, columns)).astype(np.int16)
    stream = encode_block(block, passes, alphabet)
    assert np.array_equal(decode_block(stream, passes, columns, alphabet), block)


def affine_parameter(zero_point, shape=(20, 33)):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(shape, generator=generator) * 20).round().clamp(-60, 60)
    scale = torch.rand(shape[0], generator=generator) + 0.1
    parts = {"scale": scale}
    if zero_point:
        parts["zero_point"] = torch.randint(-60, 60, (shape[0],), generator=generator, dtype=torch.int8)
        values -= parts["zero_point"][:, None]
    return values * scale[:, None], Encoding("affine", {"bits": 8, "axis": 0, "group": None}, parts)


def pruned_parameter(dtype, share=0.1):
    generator = torch.Generator().manual_seed(0)
    dense = (torch.randn(64, 3, 5, 5, generator=generator) * 30).to(dtype)
    weights = dense * (torch.rand(dense.shape, generator=generator) < share).to(dtype)
    return weights, pruned_encoding(weights)


def pruned_affine():
    tensor, encoding = affine_parameter(False, (64, 90))
    tensor = tensor * (torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < 0.2)
    return tensor, pruned_encoding(tensor, encoding)


def vectors():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, 3000, 2, generator=generator)
    index = (torch.randn(2, 30, 64, generator=generator) * 30).abs().long()
    tensor = torch.stack([table[g][index[g]].reshape(30, 128) for g in range(2)]).reshape(60, 128)
    return tensor, Encoding(
        "codebook", {"entries": 3000, "groups": 2, "vector": 2, "pruned": False}, {"table": table}
    )


INNER = {
    "affine": lambda: affine_parameter(False),
    "affine with zero points": lambda: affine_parameter(True),
    "sparse floats": lambda: pruned_parameter(torch.float32),
    "sparse bfloat16": lambda: pruned_parameter(torch.bfloat16),
    "sparse int8": lambda: pruned_parameter(torch.int8),
    "narrow": lambda: (
        torch.arange(600).remainder(16).sub(8).to(torch.int8).view(20, 30),
        Encoding("narrow", {"bits": 4}),
    ),
    "sparse, all stored": lambda: pruned_parameter(torch.float32, 1.0),
    "sparse affine": pruned_affine,
    "vectors": vectors,
    "raw int8": lambda: (pruned_parameter(torch.int8)[0], Encoding("raw")),
}


def offered(make):
    tensor, encoding = make()
    return tensor, CODEC.offer(tensor, encoding)


CASES = {name: lambda make=make: offered(make) for name, make in INNER.items()}


@pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())
def test_every_codec_of_integers_comes_back(make):
    tensor, encoding = make()
    coded = CODEC.offer(tensor, encoding)
    parts = CODEC.encode(tensor, coded)
    assert torch.equal(decoded(parts, coded.params, tensor), tensor)
    assert sum(part.nbytes for part in parts.values()) == CODEC.predicted_bytes(
        tuple(tensor.shape), tensor.dtype, coded.params, tuple(coded.parts)
    )


def test_a_transposed_view_is_coded_as_the_tensor_it_shows():
    tensor, encoding = affine_parameter(True)
    view = tensor.t().contiguous().t()
    coded, same = CODEC.offer(view, encoding), CODEC.offer(tensor, encoding)
    assert torch.equal(coded.parts["stream"], same.parts["stream"])
    assert coded.params == same.params


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_nothing_is_made_of_an_empty_tensor(shape):
    assert CODEC.offer(*codebook(np.zeros(shape, np.int64), 4)) is None


def test_other_codecs_and_too_many_symbols_are_left_alone():
    assert CODEC.offer(torch.ones(3), Encoding("raw")) is None
    table = torch.arange(5000.0 * 2).reshape(1, 5000, 2)
    encoding = Encoding(
        "codebook", {"entries": 5000, "groups": 1, "vector": 2, "pruned": False}, {"table": table}
    )
    assert CODEC.offer(table.reshape(50, 200), encoding) is None


def test_an_encoding_without_its_stream_is_a_mistake():
    tensor, coded, _ = stored(MATRICES["dense"])
    with pytest.raises(ModeloptError, match="without its stream"):
        CODEC.encode(tensor, Encoding("entropy", coded.params, {"table": coded.parts["table"]}))


def test_the_same_integers_give_the_same_bytes():
    (_, first, a), (_, second, b) = stored(kernels()), stored(kernels())
    assert first.params == second.params
    assert torch.equal(a["stream"], b["stream"])


# --- size -----------------------------------------------------------------------------------------------

SKEWS = {
    "two, even": ([1, 1], (120, 100)),
    "two, one in ten": ([9, 1], (120, 100)),
    "two, one in fifty": ([49, 1], (400, 100)),
    "three": ([1, 8, 2], (120, 100)),
    "five, even": ([1] * 5, (120, 100)),
    "sixteen, even": ([1] * 16, (160, 90)),
    "sixteen, bell": ([math.exp(-(((i - 7.5) / 3) ** 2)) for i in range(16)], (120, 100)),
    "sixteen, falling": ([0.7**i for i in range(16)], (120, 100)),
    "sixty-four, bell": ([math.exp(-(((i - 32) / 12) ** 2)) for i in range(64)], (300, 100)),
    "kernels of 3x3": ([math.exp(-(((i - 4) / 2) ** 2)) for i in range(9)], (64, 30, 3, 3)),
    "one column": ([1, 2, 4, 2, 1], (12000,)),
    "few long rows": ([1, 2, 4, 2, 1], (8, 2000)),
}


@pytest.mark.parametrize(("weights", "shape"), SKEWS.values(), ids=SKEWS.keys())
def test_independent_weights_take_at_most_two_percent_more_than_their_entropy(weights, shape):
    chances = np.array(weights, float) / sum(weights)
    integers = np.random.default_rng(0).choice(len(chances), shape, p=chances)
    _, _, parts = stored(integers, len(chances))
    assert parts["stream"].numel() * 8 <= 1.02 * zero_order_bits(integers)


def test_structure_makes_a_stream_smaller_than_the_entropy_of_its_integers():
    for integers, most in ((kernels(), 0.8), (rows_of_different_sizes((300, 60)), 0.94)):
        _, _, parts = stored(integers)
        assert parts["stream"].numel() * 8 < most * zero_order_bits(integers)


def test_a_large_even_alphabet_has_its_middle_between_two_integers():
    integers = gaussian((300, 100), 2.5, 7.5, 16)
    tensor, encoding = codebook(integers, 16)
    coded = CODEC.offer(tensor, encoding)
    assert coded.params["mirror"] in (-1, 1) or not coded.params["signed"]
    assert coded.parts["stream"].numel() * 8 <= 1.01 * zero_order_bits(integers)


def test_rows_are_those_of_the_last_dimensions_that_leave_enough_of_them():
    assert columns_of((64, 3, 3, 3)) == 27
    assert columns_of((4, 16, 3, 3)) == 9
    assert columns_of((1, 5000)) == 1
    assert columns_of((5000,)) == 1
    assert columns_of((8, 1 << 16)) == 1
    assert columns_of(()) == 1


# --- hostile files --------------------------------------------------------------------------------------

BAD = {
    "no settings": lambda p: p.clear(),
    "unknown setting": lambda p: p.update(x=1),
    "no codec": lambda p: p.update(codec=None),
    "raw inside": lambda p: p.update(codec="raw"),
    "entropy inside": lambda p: p.update(codec="entropy"),
    "settings no object": lambda p: p.update(params=[]),
    "center a text": lambda p: p.update(center="0"),
    "center huge": lambda p: p.update(center=1 << 40),
    "center elsewhere": lambda p: p.update(center=9),
    "columns zero": lambda p: p.update(columns=0),
    "columns true": lambda p: p.update(columns=True),
    "columns huge": lambda p: p.update(columns=1 << 40),
    "columns others": lambda p: p.update(columns=25),
    "reach negative": lambda p: p.update(reach=-1),
    "reach huge": lambda p: p.update(reach=1 << 12),
    "mirror two": lambda p: p.update(mirror=2),
    "signed a number": lambda p: p.update(signed=1),
    "lag zero": lambda p: p.update(lag=0),
    "lag huge": lambda p: p.update(lag=1 << 16),
    "blocks no list": lambda p: p.update(blocks=5),
    "no blocks": lambda p: p.update(blocks=[]),
    "block no list": lambda p: p.update(blocks=[7]),
    "block short": lambda p: p["blocks"][0].pop(),
    "rows missing": lambda p: p["blocks"][0].__setitem__(0, 23),
    "rows zero": lambda p: p["blocks"].append([0, 1, 0, 0]),
    "rows huge": lambda p: p["blocks"][0].__setitem__(0, 1 << 60),
    "lanes zero": lambda p: p["blocks"][0].__setitem__(1, 0),
    "lanes beyond rows": lambda p: p["blocks"][0].__setitem__(1, 25),
    "last all rows": lambda p: p["blocks"][0].__setitem__(2, 24),
    "last negative": lambda p: p["blocks"][0].__setitem__(2, -1),
    "bytes negative": lambda p: p["blocks"][0].__setitem__(3, -2),
    "bytes more": lambda p: p["blocks"][0].__setitem__(3, p["blocks"][0][3] + 2),
    "bytes fewer": lambda p: p["blocks"][0].__setitem__(3, p["blocks"][0][3] - 2),
    "a block too many": lambda p: p["blocks"].append([1, 1, 0, 4]),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_settings_that_no_writer_makes_are_refused(change):
    tensor, coded, parts = stored(MATRICES["dense"])
    params = {**coded.params, "blocks": [list(block) for block in coded.params["blocks"]]}
    change(params)
    with pytest.raises(ArtifactError):
        decoded(parts, params, tensor)


def test_a_small_file_cannot_claim_a_large_tensor_or_many_steps():
    tensor, encoding = codebook(np.zeros((1000, 1000), np.int64), 4)
    settings_ = {"center": 0, "columns": 1000, "reach": 1, "mirror": 0, "signed": False, "lag": 2}
    params = {"codec": "codebook", "params": encoding.params, **settings_}
    parts = {"table": encoding.parts["table"], "stream": torch.zeros(8, dtype=torch.uint8)}
    with pytest.raises(ArtifactError, match="so few bytes"):
        decoded(parts, {**params, "blocks": [[1000, 250, 0, 8]]}, tensor)
    with pytest.raises(ArtifactError, match="too few lanes"):
        decoded(parts, {**params, "blocks": [[1000, 1, 0, 8]]}, tensor)


@pytest.mark.parametrize("integers", [MATRICES["dense"], MATRICES["two phases"]], ids=["one", "two phases"])
def test_a_truncated_or_extended_stream_is_refused(integers):
    tensor, coded, parts = stored(integers)
    (block,) = coded.params["blocks"]
    stream = parts["stream"]
    more = torch.ones(2, dtype=torch.uint8)
    for other in (stream[:-2], stream[:-1], stream[:0], stream[2:], torch.cat((stream, more)), stream[:-4]):
        params = {**coded.params, "blocks": [[*block[:3], len(other)]]}
        with pytest.raises(ArtifactError):
            decoded({**parts, "stream": other}, params, tensor)


@pytest.mark.parametrize("integers", [MATRICES["dense"], MATRICES["two phases"]], ids=["one", "two phases"])
def test_a_flipped_bit_is_refused_or_decodes_to_entries_of_the_table(integers):
    tensor, coded, parts = stored(integers)
    generator, outcomes = random.Random(0), {"refused": 0, "decoded": 0}
    for _ in range(60):
        stream = parts["stream"].clone()
        stream[generator.randrange(len(stream))] ^= 1 << generator.randrange(8)
        try:
            found = decoded({**parts, "stream": stream}, coded.params, tensor)
        except ArtifactError:
            outcomes["refused"] += 1
        else:
            assert found.shape == tensor.shape
            assert torch.isin(found, parts["table"]).all()
            outcomes["decoded"] += 1
    assert outcomes["refused"] > 50


@given(st.binary(min_size=4, max_size=400))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused_or_decoded(noise):
    form = MatrixForm(0, 5, Alphabet(3, 0, True, 2), [(Passes(12, 4, 2), len(noise))])
    try:
        found = decode(np.frombuffer(noise, np.uint8), form, (-3, 3), np.int8)
    except ArtifactError:
        return
    assert found.shape == (12, 5)


def test_integers_that_the_inner_codec_cannot_have_are_refused():
    form, stream = encode(gaussian((30, 20), 1.5, 4, 9).astype(np.uint8), 4)
    assert decode(stream, form, (0, 8), np.uint8).max() <= 8
    with pytest.raises(ArtifactError, match="exceed 0 to 6"):
        decode(stream, form, (0, 6), np.uint8)


def test_parts_that_do_not_fit_are_refused():
    tensor, coded, parts = stored(MATRICES["dense"])
    for bad in (
        {"table": parts["table"]},
        {"stream": parts["stream"]},
        {**parts, "x": parts["table"]},
        {**parts, "stream": parts["stream"].to(torch.int8)},
        {**parts, "stream": parts["stream"][None]},
        {**parts, "table": parts["table"].double()},
    ):
        with pytest.raises(ArtifactError):
            decoded(bad, coded.params, tensor)


@pytest.mark.parametrize("name", ["sparse floats", "sparse affine", "sparse int8"])
def test_a_sparse_parameter_has_the_zeros_that_its_settings_say(name):
    tensor, encoding = INNER[name]()
    coded = CODEC.offer(tensor, encoding)
    parts = CODEC.encode(tensor, coded)
    other = encoding.params["count"] - 1
    params = {**coded.params, "params": {**encoding.params, "count": other}}
    if "values" in parts:
        parts["values"] = parts["values"][:-1]
    with pytest.raises(ArtifactError, match="as many"):
        decoded(parts, params, tensor)


def test_a_stored_zero_is_no_stored_value():
    tensor, encoding = pruned_parameter(torch.float32)
    coded = CODEC.offer(tensor, encoding)
    parts = CODEC.encode(tensor, coded)
    parts["values"] = parts["values"].clone()
    parts["values"][3] = 0
    with pytest.raises(ArtifactError, match="zeros"):
        decoded(parts, coded.params, tensor)
