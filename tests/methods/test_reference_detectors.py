"""Distances between detectors that were captured in parts: what the parts return for the same inputs."""

import copy

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.data import open_data
from modelopt_cli.errors import CaptureError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.reference_outputs import ReferenceOutputs
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.partition import capture_parts

SAMPLE = InputSpec((3, 8, 8))
FACTOR = 1.01


class Finder(nn.Module):
    """Finds the cells of an image whose score is above zero, the best first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), nn.Conv2d(5, 5, 1)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return [self._found(cells) for cells in self.head(self.backbone(images)).flatten(2).movedim(1, 2)]

    def _found(self, cells: Tensor) -> dict[str, Tensor]:
        best = cells[cells[:, 0] > 0].sort(dim=0, descending=True).values
        return {"boxes": best[:, 1:], "scores": best[:, 0], "labels": best[:, 0].long()}


def times(program: Program, factor: float) -> Program:
    """A copy of a detector whose head gives a multiple of what it gave."""
    made = copy.deepcopy(program)
    with torch.no_grad():
        for parameter in made.get_submodule("head").parameters():
            parameter.mul_(factor)
    return made


def test_the_noise_of_parts_is_their_distance() -> None:
    data = open_data("synthetic:3x8x8?n=10", input_spec=SAMPLE, labels=False)
    torch.manual_seed(0)
    program = capture_parts(Finder().eval(), SAMPLE, CaptureError("values"))
    assert program is not None
    outputs = ReferenceOutputs.of(program, data, Context(batch_size=4), 10)
    assert [call.path for call in outputs.calls] == ["backbone", "head"] * 3
    assert [len(part) for part in outputs.original] == [4, 4, 4, 4, 2, 2]
    assert outputs.compare(times(program, 1)) == (0, pytest.approx(1))
    # The backbone computes the same, and the head's noise is the square of a hundredth.
    distance, cosine = outputs.compare(times(program, FACTOR))
    assert distance == pytest.approx((FACTOR - 1) ** 2 / 2, rel=1e-3)
    assert cosine == pytest.approx(1)
    _, cosine = outputs.compare(times(program, -1))
    assert cosine == pytest.approx(0.5)  # one of the two points the other way, which counts as 0
