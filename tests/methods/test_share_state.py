"""Sharing tensors without a graph, one at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelopt_cli.artifact import predicted_bytes, write_stream
from modelopt_cli.artifact.encodings import compact_state, pruned_names
from modelopt_cli.artifact.reader import read_tensors
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.context import StreamResult
from modelopt_cli.methods.share.apply import apply_to_state
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import Encoding


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(12, 6, 3, 3, generator=generator),
        "conv.bias": torch.randn(12, generator=generator),
        "fc.weight": torch.randn(10, 48, generator=generator).half(),
        "attn.in_proj_weight": torch.randn(9, 4, generator=generator).bfloat16(),
        "double.weight": torch.randn(4, 4, generator=generator).double(),
        "embed": torch.randn(4, 4, generator=generator),
        "ids.weight": torch.arange(16).view(4, 4),
        "empty.weight": torch.zeros(0, 4),
        "norm.num_batches_tracked": torch.tensor(7),
    }


def run(result: StreamResult) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
    items = list(result.stream.items())
    return {name: t for name, t, _ in items}, {name: e for name, _, e in items if e.codec != "raw"}


@pytest.mark.parametrize("code", ["plain", "packed", "entropy"])
def test_every_weight_gets_few_values_and_the_size_is_known(
    code: Any, state: dict[str, Tensor], tmp_path: Path
) -> None:
    result = apply_to_state(state, ShareConfig(bits=3))
    size = predicted_bytes(result.stream, code=code)
    assert write_stream(result.stream, tmp_path / "out", code=code).file_bytes == size
    stored = read_tensors(tmp_path / "out")
    assert list(stored.state) == list(state)
    for name in ("conv.weight", "fc.weight", "attn.in_proj_weight"):
        found, before = stored.state[name], state[name]
        assert found.dtype == before.dtype
        entries = found.double().unique()
        assert len(entries) == 8
        away = (before.double() - found.double()).abs()
        step = 2.0**-7 if before.dtype == torch.bfloat16 else 2.0**-10
        assert (away <= (before.double().unsqueeze(-1) - entries).abs().amin(-1) + 4 * step).all()
        assert stored.encodings[name].codec == "codebook"
        del state[name]
    assert all(torch.equal(stored.state[name], tensor) for name, tensor in state.items())
    assert result.coverage.compressed == 3


def test_what_is_left_has_a_reason(state: dict[str, Tensor]) -> None:
    result = apply_to_state(state, ShareConfig(bits=3, exclude=("fc",)))
    assert result.skipped == {
        "double": "its type is float64",
        "embed": "not called a weight",
        "fc": "matched by --exclude",
    }
    assert {layer.name for layer in result.coverage.layers if layer.compressed} == {"conv", "attn"}


def test_pruned_zeros_stay_zeros(state: dict[str, Tensor]) -> None:
    for name in ("conv.weight", "fc.weight"):
        state[name] = state[name].masked_fill(state[name].abs() < 0.7, 0)
    earlier = compact_state(state, {}, ["conv.weight", "fc.weight"])
    made, encodings = run(apply_to_state(state, ShareConfig(bits=2), 0, earlier))
    assert pruned_names(encodings) == {"conv.weight", "fc.weight"}
    for name in earlier:
        assert not made[name][state[name] == 0].any()
        assert len(made[name].unique()) <= 4
    with pytest.raises(NothingCompressed, match="pruned, and pruned weights are shared one by one"):
        apply_to_state({n: state[n] for n in earlier}, ShareConfig(bits=2, vector=2), 0, earlier)


def test_shared_again_a_weight_gets_no_more_values(state: dict[str, Tensor]) -> None:
    made, encodings = run(apply_to_state(state, ShareConfig(bits=2)))
    for again in (ShareConfig(bits=4), ShareConfig(bits=2), ShareConfig(bits=1)):
        twice, _ = run(apply_to_state(made, again, 0, encodings))
        for name in encodings:
            assert len(twice[name].unique()) == min(4, again.size)
            if again.size >= 4:
                assert torch.equal(twice[name], made[name])
    for wider in ({"bits": 3, "vector": 2}, {"bits": 1, "scope": "channels"}):
        result = apply_to_state(made, ShareConfig(**wider), 0, encodings)  # type: ignore[arg-type]
        with pytest.raises(
            UsageError, match=r"is shared already, and would get \d+ different values instead"
        ):
            run(result)


def test_tied_tensors_stay_tied() -> None:
    one = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    result = apply_to_state({"a.weight": one, "b.weight": one}, ShareConfig(bits=2))
    assert result.stream.tied == {"b.weight": "a.weight"}
    assert [name for name, _, _ in result.stream.items()] == ["a.weight"]


@pytest.mark.parametrize("has_network", [False, True])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": "auto", "ratio": 9.0}, "bits='auto' needs a network that can be traced"),
        ({"bits": 4, "weighting": "hessian"}, "weighting='hessian' needs a network that can be traced"),
        ({"bits": 4, "weighting": "fisher"}, "weighting='fisher' needs a network that can be traced"),
        ({"bits": 4, "scope": "network"}, "scope='network' needs a network that can be traced"),
        ({}, "nothing says how large the codebooks are"),
        ({"bits": 4, "include": ("cnv",)}, "include 'cnv' matches no layer"),
    ],
    ids=str,
)
def test_what_needs_a_graph_is_refused(
    options: dict[str, Any], says: str, has_network: bool, state: dict[str, Tensor]
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        apply_to_state(state, ShareConfig(**options), has_network=has_network)
    if "needs a network" in says:
        assert ("with arch" in str(caught.value)) is not has_network


def test_nothing_to_share_is_an_error(state: dict[str, Tensor]) -> None:
    with pytest.raises(NothingCompressed, match=r"no layer can be shared \(double: its type is float64\)"):
        apply_to_state({"double.weight": state["double.weight"]}, ShareConfig(bits=2))
    with pytest.raises(NothingCompressed, match="there is no layer with weights that could be shared"):
        apply_to_state({"conv.bias": state["conv.bias"]}, ShareConfig(bits=2))
    with pytest.raises(NothingCompressed, match=r"rows of 3 weights cannot be cut into vectors of 2"):
        apply_to_state({"a.weight": torch.ones(4, 3)}, ShareConfig(bits=2, vector=2))


def test_progress_counts_the_tensors(state: dict[str, Tensor]) -> None:
    seen: list[tuple[int, int | None]] = []
    run(apply_to_state(state, ShareConfig(bits=2), progress=lambda done, total: seen.append((done, total))))
    assert seen == [(n, len(state)) for n in range(1, len(state) + 1)]
