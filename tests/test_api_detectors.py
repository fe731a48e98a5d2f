"""torchvision's detectors, captured in parts: int8, back from the file, evaluated and trained by boxes."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

import modelopt_cli as mo
from modelopt_cli.artifact import read_program
from modelopt_cli.errors import CaptureError
from modelopt_cli.kernels import prepare
from modelopt_cli.program import InputSpec
from modelopt_cli.program.partition import capture_parts

pytestmark = pytest.mark.slow
SMALL = {"weights": None, "weights_backbone": None, "num_classes": 3}
SIDES = SMALL | {"min_size": 64, "max_size": 96}
REGIONS = SIDES | {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 4}
TWO_STAGES = ["backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"]
DETECTORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": (REGIONS, TWO_STAGES),
    "ssdlite320_mobilenet_v3_large": (SMALL, ["backbone", "head"]),
    "ssd300_vgg16": (SMALL, ["backbone", "head"]),
}


def with_statistics(network: nn.Module) -> nn.Module:
    """A network whose batch norms know their inputs; without, the values of random weights vanish."""
    norms = [layer for layer in network.eval().modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = None
        layer.reset_running_stats()
        layer.train()
    with torch.no_grad():
        network(torch.rand(4, 3, 64, 96))
    return network.eval()


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def build(name: str) -> nn.Module:
    options, _ = DETECTORS[name]
    make: Callable[..., nn.Module] = getattr(detection, name)
    return make(**options)


@pytest.mark.parametrize("name", DETECTORS)
def test_int8_and_back(name, tmp_path):
    torch.manual_seed(0)
    network, images = with_statistics(build(name)), torch.rand(2, 3, 64, 96)
    program = capture_parts(network, InputSpec((3, 64, 96)), CaptureError("values"))
    with torch.no_grad():
        assert equal(program(images), network(images))
        result = mo.quantize(program, calibration=[images])
        parts = result.as_dict()["parts"]
        assert sorted(parts["submodules"]) == sorted(DETECTORS[name][1])
        assert parts["flops"] > 0.99
        assert parts["parameters"] == 1
        assert result.coverage.fraction == 1
        # Of the output that has the least, of a dozen: random weights, 70 layers deep.
        assert result.snr_db > 0
        mo.save(result, tmp_path / "int8.safetensors")
        again = prepare(read_program(tmp_path / "int8.safetensors", build(name)))
        assert equal(again(images), result.program(images))


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(build("fasterrcnn_mobilenet_v3_large_320_fpn"))


def pictures() -> list[tuple[Tensor, list[dict[str, Tensor]]]]:
    """Two batches of two."""
    draw = torch.Generator().manual_seed(0)
    target = {"boxes": torch.tensor([[8.0, 8, 40, 48], [50, 10, 80, 40]]), "labels": torch.tensor([1, 2])}
    return [(torch.rand(2, 3, 64, 96, generator=draw), [target, target]) for _ in range(2)]


def test_boxes_are_judged_and_learned(detector):
    data = pictures()
    run = partial(
        mo.train, task="detect", example_inputs=torch.rand(2, 3, 64, 96), optimizer="adamw", lr=1e-4
    )
    trained = run(detector, train=data, epochs=2, batch_size=2, evaluate=False)
    before, after = detector.state_dict(), trained.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.startswith("backbone") for name in changed)
    assert any(name.startswith("roi_heads.box_predictor") for name in changed)
    table = mo.evaluate([detector, trained.program], data=data, task="detect", latency_runs=0)
    figures = [model["metrics"] for model in json.loads(json.dumps(table.as_dict()))["models"]]
    assert all(0 <= each["map50"] <= 100 for each in figures)
