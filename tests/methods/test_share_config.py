"""What the settings of share refuse, and what they mean."""

import json

import pytest

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.share.config import ShareConfig

WRONG = {
    "scope": ({"bits": 4, "scope": "layer"}, "scope: 'layer' is not one of tensor, channels, network"),
    "init": ({"bits": 4, "init": "random"}, "init: 'random' is not one of linear, density, kmeans++, exact"),
    "tune": ({"bits": 4, "tune": "soft"}, "tune: 'soft' is not one of fixed, epoch, dkm"),
    "weighting": ({"bits": 4, "weighting": "l2"}, "weighting: 'l2' is not one of none, fisher, hessian"),
    "bits and centroids": ({"bits": 4, "centroids": 9}, "bits and centroids exclude each other"),
    "no bits": ({"bits": 0}, "bits: must be 1 to 8, or auto, not 0"),
    "many bits": ({"bits": 9}, "bits: must be 1 to 8, or auto, not 9"),
    "other bits": ({"bits": "four"}, "bits: 'four' is neither a number nor auto"),
    "true bits": ({"bits": True}, "bits: True is not an integer or a text"),
    "vector bits": ({"bits": 17, "vector": 2}, "bits: must be 1 to 16, or auto, not 17"),
    "one centroid": ({"centroids": 1}, "centroids: must be at least 2, not 1"),
    "many centroids": ({"centroids": 257}, "centroids: must be at most 256, not 257"),
    "vector centroids": ({"centroids": 65537, "vector": 2}, "centroids: must be at most 65536, not 65537"),
    "group": ({"bits": 4, "scope": "channels", "group": 0}, "group: must be at least 1, not 0"),
    "group of none": ({"bits": 4, "group": 2}, "group has no meaning without scope channels"),
    "vector": ({"bits": 4, "vector": 65}, "vector: must be at least 1 and at most 64, not 65"),
    "rate": ({"bits": 4, "rate": -0.1}, "rate: must be at least 0 and at most 100, not -0.1"),
    "infinite rate": ({"bits": 4, "rate": float("inf")}, "rate: inf is not a finite number"),
    "no rate": ({"bits": 4, "rate": float("nan")}, "rate: nan is not a finite number"),
    "bytes": ({"bits": "auto", "bytes": 1.0}, "bytes: must be above 0 and below 1, not 1"),
    "ratio": ({"bits": "auto", "ratio": 1.0}, "ratio: must be above 1, not 1"),
    "drop": ({"bits": "auto", "max_drop": -1.0}, "max_drop: must be a number from 0, not -1"),
    "samples": ({"bits": 4, "calibration_samples": 0}, "calibration_samples: must be at least 1, not 0"),
    "two budgets": ({"bits": "auto", "bytes": 0.1, "ratio": 9.0}, "bytes, ratio exclude each other"),
    "a budget for nothing": ({"bits": 4, "ratio": 9.0}, "ratio has no meaning without bits='auto'"),
    "auto vectors": ({"bits": "auto", "ratio": 9.0, "vector": 4}, "bits='auto' excludes vector"),
    "auto scope": ({"bits": "auto", "ratio": 9.0, "scope": "network"}, "bits='auto' excludes"),
    "auto rate": ({"bits": "auto", "ratio": 9.0, "rate": 0.1}, "bits='auto' excludes"),
    "vectors of all": ({"bits": 4, "vector": 4, "scope": "network"}, "vector excludes scope network"),
    "a start for vectors": (
        {"bits": 4, "vector": 4, "init": "exact"},
        "init has no meaning with bits='auto'",
    ),
    "a start for auto": ({"bits": "auto", "ratio": 9.0, "init": "exact"}, "init has no meaning with"),
    "auto by fisher": (
        {"bits": "auto", "ratio": 9.0, "weighting": "fisher"},
        "bits='auto' excludes weighting fisher; use weighting none or hessian",
    ),
    "auto assigned again": (
        {"bits": "auto", "ratio": 9.0, "tune": "dkm"},
        "tune dkm assigns weights again, without the bits that bits='auto' counts; use tune fixed",
    ),
    "rated vectors": ({"bits": 4, "vector": 4, "rate": 0.1}, "vector excludes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused_in_one_line(case: str) -> None:
    options, says = WRONG[case]
    with pytest.raises(UsageError) as caught:
        ShareConfig(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_nothing_said_about_size_is_an_error_only_when_it_is_asked_for() -> None:
    with pytest.raises(UsageError, match="nothing says how large the codebooks are; give bits or centroids"):
        ShareConfig().size  # noqa: B018
    with pytest.raises(UsageError, match="bits='auto' needs a budget; give one of bytes, ratio, max_drop"):
        ShareConfig(bits="auto").budget  # noqa: B018
    assert ShareConfig(bits=3).size == 8
    assert ShareConfig(centroids=5).size == 5
    assert ShareConfig(bits=12, vector=4).size == 4096


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"bytes": 0.1}, ("bytes", 0.1)),
        ({"ratio": 8.0}, ("bytes", 0.125)),
        ({"max_drop": 0.5}, ("max_drop", 0.5)),
        ({"max_drop": 0.0}, ("max_drop", 0.0)),
    ],
)
def test_a_ratio_is_a_fraction_the_other_way_round(
    options: dict[str, float], target: tuple[str, float]
) -> None:
    row, limit = ShareConfig(bits="auto", **options).budget  # type: ignore[arg-type]
    assert (row.metric, limit) == target


def test_only_auto_folds_unless_it_is_told() -> None:
    assert ShareConfig(bits="auto", ratio=8.0).folds
    assert not ShareConfig(bits=4).folds
    assert ShareConfig(bits=4, fold=True).folds
    assert not ShareConfig(bits="auto", ratio=8.0, fold=False).folds


def test_the_history_can_be_written() -> None:
    config = ShareConfig(bits=4, include=("a*", "b"))
    recorded = json.loads(json.dumps(config.as_dict()))
    assert recorded["include"] == ["a*", "b"]
    recorded["centroids"] = recorded.pop("entries")  # as older files call it
    assert ShareConfig(**{**recorded, "include": ("a*", "b"), "exclude": ()}) == config
