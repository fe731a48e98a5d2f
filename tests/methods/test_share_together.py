"""share after and before the other methods: what each promised holds in the file that comes last."""

from pathlib import Path
from typing import Any

import pytest
import torch
from prune_cases import context, net, smooth
from test_share_apply import CASES, VECTORS, back, distinct, many, pruned, tokens
from torch import Tensor

from modelopt_cli.artifact.encodings import is_shared, pruned_names
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.kernels.saturation import never_saturates
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.apply import apply as prune
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.rounding import quantize_weight
from modelopt_cli.methods.quantize.state_dict import apply_to_state as quantize_state
from modelopt_cli.methods.share.apply import apply
from modelopt_cli.methods.share.apply import apply_to_state as share_state
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import Program
from modelopt_cli.program.quantized import Weighted

IMAGES = smooth(96, 3, 12, 12)
SOME = {name: {**CASES, **VECTORS}[name] for name in ("bits", "channels", "vectors", "auto", "auto unfolded")}


def shared(program: Program, folder: Path, images: Tensor = IMAGES, **options: Any) -> Program:
    result = apply(program, ShareConfig(**options), context(images, code="entropy"))
    return back(result.program, folder)


def quantized(program: Program, folder: Path, images: Tensor = IMAGES, **options: Any) -> Program:
    return back(quantize(program, QuantizeConfig(**options), context(images)).program, folder)


def per_channel(weight: Tensor) -> list[int]:
    return [len(row.unique()) for row in weight.detach().flatten(1)]


def few(before: Tensor, after: Tensor) -> None:
    """Values that were equal in an output channel still are, and zeros are zeros."""
    assert not after[before == 0].any()
    for old, new in zip(before.detach().flatten(1), after.flatten(1), strict=True):
        table = {float(a): float(b) for a, b in zip(old, new, strict=True)}
        assert torch.equal(torch.tensor([table[float(value)] for value in old]), new.float())


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("case", SOME)
def test_equal_weights_are_equal_integers(case: str, scheme: str, first: bool, tmp_path: Path) -> None:
    if first and "vector" in SOME[case]:
        pytest.skip("pruned weights are not shared as vectors")
    program = shared(pruned(net()) if first else net(), tmp_path, **SOME[case])
    promised = pruned_names(program.encodings)
    made = quantized(program, tmp_path, scheme=scheme)
    assert pruned_names(made.encodings) == promised
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, Weighted)}
    assert len(layers) == (5 if scheme == "int8" else 1)
    for name, layer in layers.items():
        few(program.get_parameter(f"{name}.weight"), layer.weight)
        assert never_saturates(layer.weight, getattr(layer, "groups", 1))
    for name, weight in weights_of(made).items():  # of layers left in float
        assert torch.equal(weight, program.get_parameter(name))
        assert made.encodings[name].codec == program.encodings[name].codec


def test_shared_layers_left_in_float_keep_their_values_batch_norm_and_all(tmp_path: Path) -> None:
    program = shared(net(), tmp_path, bits=2)
    made = quantized(program, tmp_path, exclude=("stem", "fc"))
    for name in ("stem.weight", "fc.weight"):
        assert torch.equal(made.get_parameter(name), program.get_parameter(name))
        assert made.encodings[name].codec == "codebook"
    assert "bn" in dict(made.named_modules())
    with torch.no_grad():
        exact, got = program(IMAGES), made(IMAGES)
    assert float((exact - got).square().sum() / exact.square().sum()) < 0.05


def by_output(weight: Tensor) -> Tensor:
    """The weight of a transposed convolution of two groups, output channels first."""
    return weight.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": "auto", "bytes": 0.7}], ids=str)
def test_attention_and_layers_without_kernels_keep_what_they_share(
    options: dict[str, Any], tmp_path: Path
) -> None:
    program = shared(many(), tmp_path, tokens(96), **options)
    made = quantized(program, tmp_path, tokens(96))
    attention = made.get_submodule("attention.in_proj")
    assert isinstance(attention, Weighted)
    few(program.get_parameter("attention.in_proj_weight"), attention.weight)
    for name in ("up.weight", "grouped.weight", "deep.weight", "matrix"):
        layer = made.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Weighted):
            turned = by_output if name == "up.weight" else Tensor.clone
            few(turned(program.get_parameter(name)), turned(layer.weight))
            continue
        assert len(made.get_parameter(name).unique()) == len(program.get_parameter(name).unique())
        assert is_shared(made.encodings[name])


def test_int8_weight_leaves_what_takes_less_already(tmp_path: Path) -> None:
    program = shared(net(), tmp_path, bits=3, exclude=("fc",))
    made = quantize(program, QuantizeConfig("int8-weight"), context(IMAGES))
    assert made.skipped == dict.fromkeys(
        ("stem", "body", "grouped", "dw"), "stored as codebook values already"
    )
    found = back(made.program, tmp_path)
    assert distinct(found) == distinct(program) | {"fc.weight": distinct(found)["fc.weight"]}
    assert found.encodings["fc.weight"].codec == "affine"
    with pytest.raises(NothingCompressed, match=r"stored as codebook values already"):
        quantize(shared(net(), tmp_path, bits=3), QuantizeConfig("int8-weight"), context(IMAGES))


def test_without_a_graph_it_is_the_same() -> None:
    state = {name: t for name, t in net().state_dict().items() if t.is_floating_point()}
    items = list(share_state(state, ShareConfig(bits=3)).stream.items())
    made, stored = {n: t for n, t, _ in items}, {n: e for n, _, e in items if e.codec != "raw"}
    dynamic = quantize_state(made, QuantizeConfig("int8-dynamic"), {"fc": torch.nn.Linear(1, 1)}, stored)
    after = {name: (tensor, encoding) for name, tensor, encoding in dynamic.stream.items()}
    tensor, encoding = after["fc.weight"]
    few(made["fc.weight"], (tensor / encoding.parts["scale"][:, None]).round())
    assert never_saturates((tensor / encoding.parts["scale"][:, None]).round().to(torch.int8))
    assert torch.equal(after["body.weight"][0], made["body.weight"])
    with pytest.raises(NothingCompressed, match="stored as codebook values already"):
        quantize_state(made, QuantizeConfig("int8-weight"), None, stored)


@pytest.mark.parametrize("columns", [16, 15], ids=["even", "odd"])
def test_no_pair_of_shared_weights_is_pulled_apart(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, columns, 9, generator=generator)
    table = drawn.flatten()[torch.randperm(drawn.numel(), generator=generator)[:16]]
    weight = table[(drawn.unsqueeze(-1) - table).abs().argmin(-1)]
    free, _ = quantize_weight(weight)
    kept, scale = quantize_weight(weight, shared=True)
    values = per_channel(weight)
    if columns % 2 == 0:  # where it may, it does
        assert any(a > b for a, b in zip(per_channel(free), values, strict=True))
    assert all(a <= b for a, b in zip(per_channel(kept), values, strict=True))
    few(weight, kept)
    assert never_saturates(kept)
    error = (kept * scale[:, None, None] - weight).abs().amax((1, 2))
    assert (error <= 0.51 * weight.abs().amax((1, 2)) / 64).all()


GROWING = {"channels", "auto", "auto without data", "auto unfolded"}
"""Ways of sharing that need not keep equal weights equal, and would not here."""


@pytest.mark.parametrize("again", sorted(CASES.keys() - GROWING))
def test_shared_again_a_weight_gets_no_more_values(again: str, tmp_path: Path) -> None:
    program = shared(net(), tmp_path, bits=4)
    before = distinct(program)
    found = shared(program, tmp_path, **CASES[again])
    assert all(count <= before[name] for name, count in distinct(found).items())
    assert [entry["method"] for entry in found.history] == ["share", "share"]


@pytest.mark.parametrize("again", sorted(GROWING))
def test_shared_again_it_is_refused_where_a_weight_would_get_more(again: str, tmp_path: Path) -> None:
    program = shared(net(), tmp_path, bits=4)
    with pytest.raises(
        UsageError, match=r"\w+\.weight: is shared already, and would get \d+ different values"
    ):
        shared(program, tmp_path, **CASES[again])


def test_shared_again_by_as_large_a_table_nothing_changes(tmp_path: Path) -> None:
    program = shared(net(), tmp_path, bits=3)
    for bits in (3, 5, 8):
        found = shared(program, tmp_path, bits=bits)
        assert all(torch.equal(w, program.get_parameter(n)) for n, w in weights_of(found).items())
    assert max(distinct(shared(program, tmp_path, bits=2)).values()) == 4


@pytest.mark.slow
def test_a_pruned_network_stays_pruned_through_all_of_them(tmp_path: Path) -> None:
    config = PruneConfig(structure="unstructured", sparsity=0.7)
    sparse = back(prune(net(), config, context(IMAGES)).program, tmp_path)
    zeros = {name: weight == 0 for name, weight in weights_of(sparse).items()}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 900
    once = shared(sparse, tmp_path, bits=4)
    twice = shared(once, tmp_path, bits=2, weighting="hessian")
    last = quantized(twice, tmp_path)
    for program in (once, twice, last):
        state = program.state_dict()
        for name, mask in zeros.items():
            assert not state[name][mask].any(), name
        assert pruned_names(program.encodings) == pruned_names(sparse.encodings)
    assert max(distinct(twice).values()) <= 4
    assert [entry["method"] for entry in last.history] == ["prune", "share", "share", "quantize"]


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["channels", "layers", "unstructured", "2:4"])
def test_a_shared_network_is_not_pruned(structure: str, tmp_path: Path) -> None:
    options = {} if structure == "2:4" else {"sparsity": 0.5}
    for case in ("bits", "auto"):
        program = shared(net(), tmp_path, **CASES[case])
        with pytest.raises(UsageError) as caught:
            prune(program, PruneConfig(structure=structure, **options), context(IMAGES))  # type: ignore[arg-type]
        codec = program.encodings["stem.weight"].codec
        assert f"is stored as {codec} values, which pruning would change; prune first" in str(caught.value)
