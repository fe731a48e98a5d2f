"""What can be asked of prune, and that everything wrong with a request is said at once."""

import json

import pytest

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.structures import SparsityPattern
from modelopt_cli.methods.prune.target_figures import TARGETS


def test_config_without_a_target_says_which_there_are_when_asked() -> None:
    with pytest.raises(UsageError, match="how much") as caught:
        _ = PruneConfig().target
    assert all(name in str(caught.value) for name in TARGETS)


@pytest.mark.parametrize(("text", "pattern"), [("2:4", (2, 4)), ("1:16", (1, 16))])
def test_config_reads_patterns(text: str, pattern: tuple[int, int]) -> None:
    assert PruneConfig(structure=text).pattern == SparsityPattern(keep=pattern[0], group=pattern[1])


def test_config_a_pattern_implies_its_sparsity() -> None:
    assert PruneConfig(structure="1:4").target == ("sparsity", 0.75)
    assert PruneConfig(structure="2:4", sparsity=0.5).target == ("sparsity", 0.5)


@pytest.mark.parametrize(
    ("settings", "allocation"),
    [
        ({}, "global"),
        ({"structure": "unstructured"}, "global"),
        ({"structure": "2:4"}, "uniform"),
        ({"structure": "unstructured", "criterion": "wanda"}, "uniform"),
        ({"criterion": "random", "allocation": "erk"}, "erk"),
    ],
    ids=str,
)
def test_config_auto_suits_structure_and_criterion(settings: dict[str, str], allocation: str) -> None:
    assert PruneConfig(**settings).chosen_allocation == allocation  # type: ignore[arg-type]


WRONG = {
    "structure": ({"structure": "chanels"}, ["chanels", "channels"]),
    "pattern-order": ({"structure": "4:2"}, ["4:2", "removes nothing"]),
    "names": (
        {"criterion": "no-such", "allocation": "even", "schedule": "slow"},
        ["'no-such'", "'even'", "'slow'", "gradual"],
    ),
    "fractions": ({"sparsity": 1.0}, ["sparsity", "below 1"]),
    "nan": ({"flops": float("nan")}, ["flops"]),
    "zero": ({"params": 0.0}, ["params", "above 0"]),
    "counts": ({"rounds": 0, "round_to": 0, "block": 1}, ["rounds", "round_to", "block"]),
    "two-targets": ({"sparsity": 0.5, "flops": 0.5}, ["sparsity", "flops", "one target"]),
    "pattern-target": ({"structure": "2:4", "bytes": 0.5}, ["fixes the sparsity at 0.5"]),
    "pattern-allocation": ({"structure": "2:4", "allocation": "erk"}, ["uniform", "erk"]),
    "zeros-flops": ({"structure": "unstructured", "flops": 0.5}, ["flops", "zeros"]),
    "zeros-latency": ({"structure": "block", "latency": 0.5}, ["latency", "faster"]),
    "criterion-family": ({"structure": "unstructured", "criterion": "fpgm"}, ["fpgm", "weights", "wanda"]),
    "criterion-channels": ({"criterion": "obs"}, ["obs", "channels", "taylor"]),
    "layers-allocation": ({"structure": "layers", "allocation": "lamp"}, ["lamp", "layers"]),
    "gradual-channels": ({"schedule": "gradual"}, ["gradual", "iterative"]),
    "gradual-criterion": (
        {"structure": "unstructured", "schedule": "gradual", "criterion": "wanda"},
        ["gradual", "wanda"],
    ),
    "gradual-bytes": ({"structure": "block", "schedule": "gradual", "bytes": 0.5}, ["sparsity", "bytes"]),
    "no-rounds": ({"rounds": 5}, ["rounds has no meaning without schedule='iterative'"]),
    "no-block": ({"structure": "2:4", "block": 8}, ["block has no meaning without structure='block'"]),
    "no-rounding": (
        {"structure": "unstructured", "round_to": 3},
        ["round_to has no meaning without structure='channels'"],
    ),
    "several": (
        {"structure": "unstructured", "latency": 0.5, "criterion": "fpgm", "allocation": "sensitivity"},
        ["latency", "fpgm"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_config_refuses_with_all_reasons(case: str) -> None:
    settings, words = WRONG[case]
    with pytest.raises(UsageError) as caught:
        PruneConfig(**settings)  # type: ignore[arg-type]
    assert [word for word in words if word not in str(caught.value)] == []
    assert caught.value.exit_code == 2


def test_config_goes_into_json_and_back() -> None:
    config = PruneConfig(structure="block", bytes=0.25, include=("a*", "b"), skip_last=True)
    found = json.loads(json.dumps(config.as_dict()))
    found["bn_recalibration"] = found.pop("reestimate")  # as older files call it
    assert PruneConfig(**found) == config
