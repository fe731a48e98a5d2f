"""share on networks with a graph: what their files promise, read back."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_cases import Samples, captured, context, net, smooth
from torch import Tensor, nn

from modelopt_cli.artifact import predicted_bytes, read_program, write_program
from modelopt_cli.artifact.coding import CODINGS
from modelopt_cli.artifact.encodings import compact, pruned_names
from modelopt_cli.errors import ModeloptError, NothingCompressed, UsageError
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.share import one_size
from modelopt_cli.methods.share.apply import apply
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import Program

LAYERS = ("stem", "body", "grouped", "dw", "fc")
AUTO = {"bits": "auto", "bytes": 0.75}


class Many(nn.Module):
    """Embedding, attention, a bare matrix, 1d, transposed, grouped and depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 12, 4, stride=2, groups=2)
        self.norm = nn.BatchNorm1d(12)
        self.grouped, self.deep = nn.Conv1d(12, 12, 3, groups=3), nn.Conv1d(12, 12, 3, groups=12)
        self.one, self.two, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.matrix = nn.Parameter(torch.randn(12, 12) / 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False)[0].transpose(1, 2)
        x = torch.relu(self.deep(self.grouped(torch.relu(self.norm(self.up(x)))))).mean(2)
        out: Tensor = self.head(self.two(torch.relu(self.one(x @ self.matrix))))
        return out


def many() -> Program:
    torch.manual_seed(0)
    return captured(Many(), 6, 8)


def tokens(n: int) -> Tensor:
    return torch.randn(n, 6, 8, generator=torch.Generator().manual_seed(1))


def shared(program: Program, images: Tensor | None = None, **options: Any) -> MethodResult:
    inputs = smooth(96, 3, 12, 12) if images is None else images
    return apply(program, ShareConfig(**options), context(inputs, code="entropy"))


def back(program: Program, folder: Path, code: Any = "entropy") -> Program:
    """Written, and read as anyone will."""
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    assert write_program(program, path, code=code).file_bytes == predicted_bytes(program, code=code)
    found = read_program(path)
    for name, tensor in program.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.encodings.keys() == program.encodings.keys()
    assert found.history == program.history
    return found


def pruned(program: Program, density: float = 0.4) -> Program:
    """With most of every weight zero, and marked as pruned."""
    weights = weights_of(program)
    with torch.no_grad():
        for weight in weights.values():
            weight.masked_fill_(weight.abs() < weight.abs().flatten().quantile(1 - density), 0)
    program.encodings = compact(program, list(weights))
    return program


def distinct(program: Program) -> dict[str, int]:
    return {name: len(weight.unique()) for name, weight in weights_of(program).items()}


CASES: dict[str, dict[str, Any]] = {
    "bits": {"bits": 3},
    "centroids": {"centroids": 5, "init": "exact"},
    "rate": {"bits": 4, "rate": 0.05},
    "fisher": {"bits": 3, "weighting": "fisher"},
    "hessian": {"bits": 3, "weighting": "hessian"},
    "hessian in groups": {"bits": 2, "weighting": "hessian", "scope": "channels", "group": 4},
    "hessian for all": {"bits": 3, "weighting": "hessian", "scope": "network"},
    "channels": {"bits": 2, "scope": "channels", "group": 2},
    "network": {"bits": 3, "scope": "network"},
    "folded": {"bits": 3, "fold": True},
    "auto": {"bits": "auto", "bytes": 0.75},
    "auto without data": {"bits": "auto", "bytes": 0.75, "weighting": "none"},
    "auto unfolded": {"bits": "auto", "bytes": 0.75, "fold": False},
}
VECTORS: dict[str, dict[str, Any]] = {
    "vectors": {"bits": 4, "vector": 3},
    "weighted vectors": {"bits": 4, "vector": 3, "weighting": "hessian"},
    "vectors by fisher": {"bits": 3, "vector": 3, "weighting": "fisher", "scope": "channels", "group": 4},
}


def most(options: dict[str, Any], rows: int) -> int:
    """Different values that a weight may have."""
    if options["bits" if "bits" in options else "centroids"] == "auto":
        return 255 * rows
    tables = -(-rows // options.get("group", rows))
    return int(ShareConfig(**options).size * tables * options.get("vector", 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", {**CASES, **VECTORS})
def test_weights_have_few_values_and_the_network_still_answers(case: str, tmp_path: Path) -> None:
    options, program = {**CASES, **VECTORS}[case], net()
    before = copy.deepcopy(program.state_dict())
    result = shared(program, **options)
    for name, tensor in program.state_dict().items():
        assert torch.equal(tensor, before[name])
    found = back(result.program, tmp_path)
    left = {"fc"} if "vector" in options else set()  # its rows of 12 can be cut, those of `dw` by 9 too
    assert result.skipped == {}
    assert coverage(found).fraction == 1.0 or left
    for name, weight in weights_of(found).items():
        assert len(weight.unique()) <= most(options, len(weight)), name
    x = smooth(32, 3, 12, 12, seed=5)
    with torch.no_grad():
        exact, got = program(x), found(x)
    assert float((exact - got).square().sum() / exact.square().sum()) < 0.2
    entry = found.history[-1]
    assert (entry["method"], entry["coverage"]) == ("share", {"compressed": 5, "total": 5})
    assert entry["config"] == ShareConfig(**options).as_dict()
    assert ("target" in entry) == (options.get("bits") == "auto")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pruned_zeros_stay_zeros(case: str, tmp_path: Path) -> None:
    program = pruned(net())
    found = back(shared(program, **CASES[case]).program, tmp_path)
    assert pruned_names(found.encodings) == pruned_names(program.encodings)
    for name, weight in weights_of(program).items():
        assert not found.get_parameter(name)[weight == 0].any(), name
        assert found.get_parameter(name).any(), name


def test_pruned_weights_are_not_shared_as_vectors() -> None:
    with pytest.raises(NothingCompressed, match="pruned weights are shared one by one"):
        shared(pruned(net()), bits=3, vector=3)


@cache
def shared_once(case: str) -> Program:
    return shared(net(), **{**CASES, **VECTORS}[case]).program


@pytest.mark.parametrize("code", CODINGS)
@pytest.mark.parametrize("case", ["bits", "vectors", "auto"])
def test_sizes_are_known_under_every_code_and_shrink(case: str, code: Any, tmp_path: Path) -> None:
    made = shared_once(case)
    back(made, tmp_path, code)
    order = [predicted_bytes(made, code=each) for each in CODINGS]
    assert order[0] >= order[1] > order[2]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bits", "hessian", "channels", "auto", "weighted vectors"])
def test_the_same_twice_gives_the_same_bytes(case: str, tmp_path: Path) -> None:
    options = {**CASES, **VECTORS}[case]
    made = [shared(net(), **options).program for _ in range(2)]
    first, again = (write_program(each, tmp_path / str(i), code="entropy") for i, each in enumerate(made))
    assert first.sha256 == again.sha256


def test_one_table_serves_the_whole_network() -> None:
    for options in (CASES["network"], CASES["hessian for all"]):
        found = shared(net(), **options).program
        values = torch.cat([weight.flatten() for weight in weights_of(found).values()]).unique()
        assert len(values) == 8


def test_hessian_is_nearer_to_the_answers_than_rounding() -> None:
    program, x = net(), smooth(256, 3, 12, 12, seed=5)
    images = smooth(256, 3, 12, 12)
    away = {}
    for weighting in ("none", "hessian"):
        found = shared(program, images, bits=2, weighting=weighting).program
        with torch.no_grad():
            away[weighting] = float((program(x) - found(x)).square().mean())
    assert away["hessian"] < 0.6 * away["none"]


def test_a_rate_counts_next_to_errors_in_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [
        predicted_bytes(shared(net(), bits=4, weighting="hessian", rate=rate).program, code="entropy")
        for rate in (0, 0.03, 0.3)
    ]
    assert sizes[0] - 50 > sizes[1] > sizes[2] + 50
    with monkeypatch.context() as patch:  # with the same tables, but levels that cost nothing
        patch.setattr(one_size, "price_of_bit", lambda weight, config: 0.0)
        free = shared(net(), bits=4, weighting="hessian", rate=0.3).program
        assert predicted_bytes(free, code="entropy") > sizes[2] + 20
    many_tables = {"scope": "channels", "group": 4, "weighting": "hessian"}
    assert len(shared(net(), bits=2, rate=0.1, **many_tables).program.encodings) == 5


KINDS: list[dict[str, Any]] = [
    {"bits": 2},
    {"bits": 2, "weighting": "hessian"},
    {"bits": 2, "weighting": "hessian", "scope": "channels", "group": 100},
    {"bits": 2, "weighting": "hessian", "scope": "channels", "group": 4},
    AUTO,
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_all_kinds_of_weights_are_shared(options: dict[str, Any], tmp_path: Path) -> None:
    program = many()
    found = back(shared(program, tokens(96), **options).program, tmp_path)
    names = {"attention.in_proj_weight", "attention.out_proj.weight", "matrix"}
    names |= {f"{layer}.weight" for layer in ("up", "grouped", "deep", "one", "head")}
    assert weights_of(found).keys() == names
    assert names <= found.encodings.keys()
    assert found.get_submodule("two").weight is found.get_submodule("one").weight
    for weight in weights_of(found).values() if options["bits"] == 2 else ():
        assert len(weight.unique()) <= most(options, len(weight))
    with torch.no_grad():
        exact, got = program(tokens(8)), found(tokens(8))
    assert float((exact - got).square().sum() / exact.square().sum()) < 0.3


def test_folding_is_a_choice() -> None:
    program = net()
    norm: Any = program.get_submodule("bn")
    norm.running_var.uniform_(0.1, 3.0)
    kinds = {
        fold: [type(module).__name__ for module in shared(program, bits=4, fold=fold).program.modules()]
        for fold in (False, True)
    }
    assert "BatchNorm2d" in kinds[False]
    assert "BatchNorm2d" not in kinds[True]


def test_layers_left_keep_their_weights_and_are_listed() -> None:
    program = net()
    result = shared(program, bits=2, exclude=("body",), skip_first=True, skip_last=True)
    assert result.skipped == {"body": "matched by --exclude", "stem": "first layer", "fc": "last layer"}
    for layer in result.skipped:
        name = f"{layer}.weight"
        assert torch.equal(result.program.get_parameter(name), program.get_parameter(name))
        assert name not in result.program.encodings
    covered = coverage(result.program)
    assert (covered.compressed, covered.total) == (2, 5)
    assert result.program.history[-1]["skipped"] == result.skipped


def test_rows_that_cannot_be_cut_are_left_with_the_reason() -> None:
    result = shared(net(), bits=3, vector=4)
    assert result.skipped["stem"] == "rows of 27 weights cannot be cut into vectors of 4"
    assert set(result.skipped) == {"stem", "dw"}


def test_what_was_pruned_in_a_layer_left_alone_stays_pruned(tmp_path: Path) -> None:
    program = pruned(net())
    for options in ({"bits": 3}, {"bits": 3, "fold": True}, AUTO):
        found = back(shared(program, exclude=("stem",), **options).program, tmp_path)
        assert "stem.weight" in pruned_names(found.encodings)
        assert not found.get_parameter("stem.weight")[program.get_parameter("stem.weight") == 0].any()


def test_a_lost_zero_is_an_error_and_not_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    real = one_size.cluster_all

    def careless(weights: Any, config: Any, seed: Any) -> Any:
        found = real(weights, config, seed)
        for each in found.values():
            each.codebooks.add_(0.5)
        return found

    monkeypatch.setattr(one_size, "cluster_all", careless)
    with pytest.raises(ModeloptError, match="not zero any more") as caught:
        shared(pruned(net()), bits=3)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing says how large the codebooks are; give bits or centroids"),
        ({"bits": 3, "weighting": "fisher"}, "weighting fisher needs data to calibrate on"),
        ({"bits": 3, "weighting": "hessian"}, "weighting hessian needs data to calibrate on"),
        ({**AUTO, "weighting": "hessian"}, "weighting hessian needs data to calibrate on"),
        (
            {**AUTO, "weighting": "fisher"},
            "bits='auto' excludes weighting fisher; use weighting none or hessian",
        ),
        ({"bits": "auto", "max_drop": 1.0}, "max_drop is measured on data; give calibration or data"),
        ({"bits": 3, "include": ("cnv",)}, "include 'cnv' matches no layer"),
    ],
    ids=str,
)
def test_what_is_missing_is_said_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply(net(), ShareConfig(**options), Context())
    assert str(caught.value).startswith(says)


def test_a_network_without_weights_has_nothing_to_share() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    with pytest.raises(NothingCompressed, match="no layer with weights that could be shared"):
        shared(captured(Plain(), 3, 4, 4), bits=3)


@pytest.mark.slow
def test_the_history_names_the_data_only_where_they_were_looked_at() -> None:
    for options, named in (({"bits": 3}, False), ({"bits": 3, "weighting": "hessian"}, True), (AUTO, True)):
        assert ("calibration" in shared(net(), **options).program.history[-1]) is named
    samples = Samples(smooth(4, 3, 12, 12))
    assert samples.passes == []
    apply(net(), ShareConfig(bits=3), Context(data=samples))  # type: ignore[arg-type]
    assert samples.passes == []
