"""The page of the benchmark of networks says of every network what was found, and what was not."""

from typing import Any

import pytest

from benchmarks.networks.page import COLUMNS, page, table

WHOLE: dict[str, Any] = {
    "family": "timm",
    "name": "resnet",
    "network": "resnet10t",
    "input": "3x64x64",
    "parameters": 5_440_000,
    "captured": {"whole": True, "apart": 0.0, "reloaded": True},
    "int8": {"layers": [14, 15], "weights": 0.981, "snr": 24.06, "noisy": 37.7, "reloaded": True},
    "pruned": {"parameters": 0.508, "flops": 0.497, "apart": 6e-16, "reloaded": False},
    "code": "abc",
}
PART = {
    "family": "timm",
    "name": "a",
    "captured": {"part": 0.87, "reloaded": True},
    "int8": {"error": "no | layer"},
}
REFUSED = {"family": "video", "name": "b", "captured": {"error": "line 3: looks at\nvalues"}}
STOPPED = {"family": "video", "name": "c", "error": "stopped by its limit of 240 s or 12 GiB"}


def cells(found: dict[str, Any]) -> dict[str, str]:
    line = table(COLUMNS, [found])[-1]
    return dict(zip(COLUMNS, [cell.strip() for cell in line.strip("|").split(" | ")], strict=True))


def test_a_network_that_went_through_everything() -> None:
    assert cells(WHOLE) == {
        "network": "resnet: resnet10t",
        "input": "3x64x64",
        "parameters": "5.44 M",
        "captured": "whole",
        "int8 layers": "14 of 15",
        "int8 weights": "98.1 %",
        "int8, dB": "24.1",
        "noisy input, dB": "37.7",
        "below 30 dB: falls most after": "",
        "pruned: parameters left": "50.8 %",
        "FLOPs left": "49.7 %",
        "reloaded equal": "2 of 3",
        "code": "abc",
    }


@pytest.mark.parametrize(
    ("found", "column", "cell"),
    [
        (PART, "captured", "in part: 87.0 % of the FLOPs"),
        (PART, "int8 layers", "no / layer"),
        (PART, "reloaded equal", "1 of 1"),
        (REFUSED, "captured", "refused: line 3: looks at values"),
        (STOPPED, "captured", "refused: stopped by its limit of 240 s or 12 GiB"),
        (
            WHOLE | {"int8": WHOLE["int8"] | {"fall": ["fc", 30, 24.06]}},
            "below 30 dB: falls most after",
            "fc: 30.0 to 24.1",
        ),
    ],
)
def test_what_fell_short_is_said_in_its_cell(found: dict[str, Any], column: str, cell: str) -> None:
    assert cells(found)[column] == cell


def test_the_summary_counts_and_names_what_is_missing() -> None:
    text = page([WHOLE, PART, REFUSED, STOPPED], {"timm": 3, "video": 2}, "How.")
    assert "| timm: the smallest network of every module | 2 | 1 | 1 | 1 | 1 | 0 | 1 | 1 |" in text
    assert "| torchvision: video | 2 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "Not measured, and left out: 1 of timm: the smallest network of every module." in text


def test_the_page_names_the_cpu_of_every_commit() -> None:
    rows = [
        WHOLE | {"cpu": "EPYC"},
        WHOLE | {"cpu": "Xeon", "code": "def"},
        PART | {"cpu": "Xeon", "code": "123"},
    ]
    assert "measured with. On EPYC: abc; on Xeon: 123, def." in page(rows, {"timm": 3}, "How.")


def test_layers_are_counted_over_a_family_and_over_torchvision_and_those_left_out_have_a_reason() -> None:
    clip = {"family": "video", "name": "d", "int8": {"layers": [9, 10], "left_out": [["no kernel", 1]]}}
    image = {"family": "segmentation", "name": "e", "int8": {"layers": [90, 90]}}
    text = page([WHOLE, PART, clip, image, STOPPED], {"timm": 2, "video": 2, "segmentation": 1}, "How.")
    summary = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if "|" in line
    }
    assert summary["timm: the smallest network of every module"] == "14 of 15, 93.3 %"
    assert summary["torchvision: video"] == "9 of 10, 90.0 %"
    assert summary["torchvision, all of these"] == "99 of 100, 99.0 %"
    assert "\n- resnet: resnet10t: 1 of 15\n- d: 1 of 10, no kernel (1)\n" in text
