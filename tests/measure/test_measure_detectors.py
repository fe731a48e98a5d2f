"""How near two detectors are: their boxes do not belong together by place, what their parts compute does."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.measure import EvalOptions, EvaluatedModel, Evaluation, evaluate
from modelopt_cli.program import InputSpec
from modelopt_cli.program.partition import capture_parts

SAMPLE = InputSpec((3, 8, 8))
FACTOR = 1.01
APART = "boxes of two networks do not belong together one by one"


class Finder(nn.Module):
    """Finds the cells of an image whose score is above zero, the best first, and then refines their boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), nn.Conv2d(5, 5, 1)
        self.refine = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        cells = self.head(self.backbone(images)).flatten(2).movedim(1, 2)
        return [self._found(image) for image in cells]

    def _found(self, cells: Tensor) -> dict[str, Tensor]:
        best = cells[cells[:, 0] > 0].sort(dim=0, descending=True).values
        return {"boxes": self.refine(best[:, 1:]), "scores": best[:, 0], "labels": best[:, 0].long()}


def finder() -> Finder:
    torch.manual_seed(0)
    return Finder().eval()


def measured(changed: Callable[[Finder], None], *, whole: bool = False) -> Evaluation:
    """A detector next to a changed one, compared on noise."""
    models: list[Any] = []
    for place in range(2):
        network = finder()
        if place:
            changed(network)
        made = network if whole else capture_parts(network, SAMPLE, CaptureError("values"))
        assert made is not None
        models.append(EvaluatedModel(f"{place}.pth", made, None if whole else made, 0, input=SAMPLE))
    return evaluate(models, None, EvalOptions(runs=0, memory=False, baseline=0))


def head_times(network: Finder) -> None:
    """The head's outputs, scores among them, are one hundredth larger; boxes that are refined are others."""
    with torch.no_grad():
        network.head.weight.mul_(FACTOR)
        network.head.bias.mul_(FACTOR)


def order_of_boxes(network: Finder) -> None:
    """The backbone computes the same, the head finds other cells."""
    with torch.no_grad():
        network.head.weight.neg_()
        network.head.bias.neg_()


@pytest.mark.parametrize(
    ("changed", "decibels", "cosine"),
    [(head_times, -20 * math.log10(FACTOR - 1), 1.0), (order_of_boxes, 10 * math.log10(1 / 4), -1.0)],
)
def test_each_part_is_compared_on_what_reaches_it_in_the_baseline(changed, decibels, cosine) -> None:
    evaluation = measured(changed)
    likeness = evaluation.comparisons[0].fidelity
    assert likeness is not None
    assert likeness.snr_db.keys() == likeness.cosine.keys() == {"backbone", "head", "refine"}
    assert likeness.snr_db["backbone"] == likeness.snr_db["refine"] == 200  # although it sees other boxes
    assert likeness.snr_db["head"] == pytest.approx(decibels, abs=1e-3)
    assert likeness.cosine["head"] == pytest.approx(cosine)
    assert not likeness.kl
    assert evaluation.notes == (
        f"1.pth: {APART}; signal to noise and cosine are of what its parts (backbone, head, refine) "
        "return for what reaches them in 0.pth",
    )


def test_boxes_alone_are_not_compared() -> None:
    evaluation = measured(head_times, whole=True)
    assert evaluation.comparisons[0].fidelity is None
    assert evaluation.notes == (f"1.pth: {APART}; they are not compared",)
