"""torchvision's networks: classification, segmentation, detection, video and optical flow."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.networks.network import Network, images, prepared
from modelopt_cli.program import InputSpec

_TESTS = str(Path(__file__).parents[2] / "tests" / "program")
FRAMES, SIDE = 8, 64
"""Size of a video."""
REGIONS = {
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 50,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 10,
}
ANCHORS = {"score_thresh": 0.0, "topk_candidates": 50, "detections_per_img": 10}
"""Boxes that detectors of two stages and of one keep, of any score: those of random weights are alike."""


def names(part: str) -> list[str]:
    """Names of the networks of ``torchvision.models``, or of one of its modules."""
    from torchvision import models

    return list(models.list_models(getattr(models, part, models)))


def classification(name: str, kind: str | None) -> Network:
    """A classification network for small images; the four largest have fewer or narrower blocks."""
    sys.path.insert(0, _TESTS)
    from program_networks import _REDUCED, _make, side

    torch.manual_seed(0)
    return _on_images(name, _make(name), side(name), _REDUCED.get(name, ""))


def segmentation(name: str, kind: str | None) -> Network:
    """A segmentation network with 21 classes for images of 64x64."""
    return _on_images(name, _get(name, weights_backbone=None), 64)


def _on_images(name: str, model: nn.Module, side: int, note: str = "") -> Network:
    make = _images(side)
    return prepared(Network(name, model.eval(), InputSpec((3, side, side)), make, note))


def _images(side: int) -> Callable[[int, int], Tensor]:
    return lambda count, seed: images(count, side, seed)


def detection(name: str, kind: str | None) -> Network:
    """A detector for images of 96x128, which SSD makes larger itself; it finds 10 boxes."""
    sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    boxes = REGIONS if "rcnn" in name else ANCHORS
    model = _get(name, weights_backbone=None, **sizes, **boxes).eval()

    def pictures(count: int, seed: int) -> Tensor:
        return (0.5 + 0.2 * images(count, 128, seed)[:, :, :96]).clamp(0, 1)

    return prepared(Network(name, model, InputSpec((3, 96, 128)), pictures))


def video(name: str, kind: str | None) -> Network:
    """A video network for clips of 8 frames of 64x64; 16 of 224x224 where it takes no others."""
    from torchvision.models.video import mvit

    small = partial(_smaller, mvit.MViT)
    with mock.patch.object(mvit, "MViT", small):
        model = _get(name)
    frames, side = (16, 224) if name == "s3d" else (FRAMES, SIDE)

    def clips(count: int, seed: int) -> Tensor:
        return images(count, side, seed, channels=3 * frames).unflatten(1, (3, frames))

    return prepared(Network(name, model.eval(), InputSpec((3, frames, side, side)), clips))


def _smaller(kind: type[nn.Module], **options: Any) -> nn.Module:
    """MViT for smaller videos: its size is fixed where it is built."""
    return kind(**options | {"spatial_size": (SIDE, SIDE), "temporal_size": FRAMES})


def optical_flow(name: str, kind: str | None) -> Network:
    """RAFT on pairs of images of 128x128, with 2 of its 12 updates."""

    class Flow(nn.Module):
        """RAFT, whose number of updates is an argument."""

        def __init__(self) -> None:
            super().__init__()
            self.raft = _get(name)

        def forward(self, image1: Tensor, image2: Tensor) -> Any:
            return self.raft(image1, image2, num_flow_updates=2)

    def pairs(count: int, seed: int) -> dict[str, Tensor]:
        first = images(count, 128, seed)
        return {"image1": first.clamp(-1, 1), "image2": first.roll((2, 1), (2, 3)).clamp(-1, 1)}

    second = InputSpec((3, 128, 128), name="image2")
    spec = InputSpec((3, 128, 128), name="image1", others=(second,))
    return prepared(Network(name, Flow().eval(), spec, pairs, "2 of its 12 updates"))


def _get(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]
