"""The operators that torchvision's detectors need where its C++ extension cannot be loaded."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, nms, roi_align

from modelopt_cli._torchvision import has_operators, pooled, suppressed


def boxes_of(count: int, seed: int = 0) -> Tensor:
    corners = torch.randint(0, 20, (count, 4), generator=torch.Generator().manual_seed(seed)).float()
    corners[:, 2:] += corners[:, :2] + 1
    return corners


def by_brute_force(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """The definition in words; an overlap is rounded to float32."""

    def overlap(a: list[float], b: list[float]) -> float:
        sides = [max(0.0, min(a[2 + i], b[2 + i]) - max(a[i], b[i])) for i in (0, 1)]
        areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        return float(np.float32(sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])))

    corners, kept = boxes.tolist(), list[int]()
    for place in sorted(range(len(corners)), key=lambda i: -float(scores[i])):  # stable
        if all(overlap(corners[place], corners[other]) <= threshold for other in kept):
            kept.append(place)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7])
def test_suppression_is_the_definition(threshold: float) -> None:
    boxes = boxes_of(120)
    scores = torch.randint(0, 12, (120,), generator=torch.Generator().manual_seed(1)) / 12  # with ties
    expected = by_brute_force(boxes, scores, threshold)
    assert suppressed(boxes, scores, threshold).tolist() == expected
    assert nms(boxes, scores, threshold).tolist() == expected
    assert 1 < len(expected) < 120


def test_threshold_is_not_rounded() -> None:
    """An overlap of 0.3 in float32 is more than 0.3."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [7, 0, 13, 1], [0, 0, 3, 1]])
    scores = torch.tensor([3.0, 2.0, 1.0])
    assert float(box_iou(boxes[:1], boxes[2:])) > 0.3
    assert suppressed(boxes, scores, 0.3).tolist() == [0, 1]


def test_suppression_of_no_box_and_of_empty_ones() -> None:
    assert suppressed(torch.empty(0, 4), torch.empty(0), 0.5).tolist() == []
    assert suppressed(torch.zeros(2, 4), torch.tensor([1.0, 2.0]), 0.5).tolist() == [1, 0]
    assert suppressed(boxes_of(1), torch.ones(1), 0.5).dtype == torch.int64


def test_classes_are_suppressed_apart() -> None:
    boxes, classes = boxes_of(30), torch.arange(30) % 3
    scores = torch.rand(30, generator=torch.Generator().manual_seed(2))
    apart = [
        places[i]
        for c in range(3)
        for places in [(classes == c).nonzero().flatten().tolist()]
        for i in by_brute_force(boxes[places], scores[places], 0.2)
    ]
    assert sorted(batched_nms(boxes, scores, classes, 0.2).tolist()) == sorted(apart)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_regions_are_pooled_as_by_torchvision(samples: int, aligned: bool) -> None:
    """Its own Python form, run as it is, is the reference; gradients agree, too."""
    reference = sys.modules["torchvision.ops.roi_align"]._roi_align
    if has_operators():
        reference = reference.__wrapped__
    else:
        closure = dict(zip(reference.__code__.co_freevars, reference.__closure__, strict=True))
        reference = closure["adaptive"].cell_contents
    features = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(3), requires_grad=True)
    rois = torch.cat([torch.arange(12)[:, None] % 2, boxes_of(12) * 0.8], 1)
    rois[:, 1:] = rois[:, 1:].clamp(max=33)
    settings = (0.25, 3, 2, samples, aligned)
    expected, actual = reference(features, rois, *settings), pooled(features, rois, *settings)
    torch.testing.assert_close(actual, expected)
    slopes = [torch.autograd.grad(x.square().sum(), features)[0] for x in (expected, actual)]
    torch.testing.assert_close(slopes[1], slopes[0])
    assert pooled(features, rois[:0], *settings).shape == (0, 3, 3, 2)


def test_what_lies_outside_counts_as_zero() -> None:
    ones, far = torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 40, 40, 44, 44]])
    assert pooled(ones, far, 1.0, 2, 2, 2, False).abs().max() == 0
    assert roi_align(ones, far - torch.tensor([0, 40, 40, 40, 40]), 2, 1.0, 2).eq(1).all()
