"""Makes ``import torchvision`` and its detectors work where its C++ extension cannot be loaded.

PyPI's torchvision wheel is built for CUDA. Next to a CPU-only torch its ``_C.so`` does not load, so the
operators it would define do not exist, and ``torchvision._meta_registrations`` fails on the first two
of them: "operator torchvision::nms does not exist". Two schemas are enough for the import to pass (torch
2.13.0, torchvision 0.28.0). Detectors need two operators besides: non-maximum suppression, which gets a
kernel in plain torch, and RoI align, whose Python form torchvision would compile at the first call.

The finder below waits for the submodules that need something. By the first of them torchvision has tried
its own extension, so that all this is done only if that failed, and nothing here imports torch before
torchvision does.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_TRIGGER = "torchvision._meta_registrations"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []  # a schema lives as long as the Library that defined it


class TorchvisionFinder(MetaPathFinder):
    """Finds nothing itself; defines what is missing just before or after a submodule is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns None, so that the ordinary finders load the module, but for those that are changed."""
        if fullname in (_TRIGGER, *_CHANGES) and not _extension_loaded():
            if fullname == _TRIGGER:
                _define_schemas()
            else:
                return _changing(PathFinder.find_spec(fullname, path, target), _CHANGES[fullname])
        return None


def install() -> None:
    """Put the finder in front of the others, once."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


def has_operators() -> bool:
    """True if torchvision's own C++ operators are available; imports torchvision."""
    import torchvision.extension

    return bool(torchvision.extension._has_ops())


def suppressed(boxes: "Tensor", scores: "Tensor", threshold: float) -> "Tensor":
    """Non-maximum suppression, as torchvision defines it: of boxes that overlap the best scored one stays.

    Args:
        boxes: ``(N, 4)``: left, top, right, bottom.
        scores: ``(N,)``; of equal ones the earlier box comes first.
        threshold: a box goes if its intersection over union with one that stays is larger.

    Returns:
        Indices of the boxes that stay, int64, by descending score.
    """
    import torch

    order: Tensor = torch.sort(scores, descending=True, stable=True).indices
    corners = boxes[order]
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    kept = []
    while len(order):
        kept.append(order[:1])
        first, rest = corners[0], corners[1:]
        sides = torch.minimum(first[2:], rest[:, 2:]) - torch.maximum(first[:2], rest[:, :2])
        common = sides.clamp(min=0).prod(1)
        # The extension compares in double precision; what is NaN, of two empty boxes, stays.
        stays = ~((common / (areas[0] + areas[1:] - common)).double() > threshold)
        order, corners, areas = order[1:][stays], rest[stays], areas[1:][stays]
    return torch.cat(kept) if kept else order


def pooled(
    features: "Tensor", rois: "Tensor", scale: float, height: int, width: int, samples: int, aligned: bool
) -> "Tensor":
    """RoI align: means of bilinear samples in a grid over each region (He et al., Mask R-CNN, 2017).

    Args:
        features: ``(N, C, H, W)``.
        rois: ``(K, 5)``: number of the image, then left, top, right, bottom.
        scale: of the feature map against the image.
        height: rows of the grid.
        width: columns of the grid.
        samples: along each side of each of its cells.
        aligned: pixels have their centres at half coordinates.

    Returns:
        ``(K, C, height, width)``.
    """
    import torch.nn.functional as F

    left, top, right, bottom = (rois[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(1)
    least = -float("inf") if aligned else 1.0
    y, by_row = _taps(top, (bottom - top).clamp(min=least), height, samples, features.shape[2])
    x, by_column = _taps(left, (right - left).clamp(min=least), width, samples, features.shape[3])
    above = rois[:, 0].long() * features.shape[2]
    rows = (above[:, None, None] + y)[:, :, None, :, None] * features.shape[3] + x[:, None, :, None, :]
    weights = by_row[:, :, None, :, None] * by_column[:, None, :, None, :]
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
    means = F.embedding_bag(
        rows.flatten(3).flatten(0, 2),
        pixels,
        mode="sum",
        per_sample_weights=weights.flatten(3).flatten(0, 2).to(pixels.dtype),
    )
    result: Tensor = means.unflatten(0, (len(rois), height, width)).permute(0, 3, 1, 2)
    return result.contiguous()


def _taps(start: "Tensor", length: "Tensor", cells: int, samples: int, size: int) -> "tuple[Tensor, Tensor]":
    """Pixels along one side that each cell of each region reads, and their weights: ``(K, cells, taps)``."""
    import torch

    step, numbers = (length / cells)[:, None, None], torch.arange(samples, device=start.device)
    corners = start[:, None, None] + torch.arange(cells, device=start.device)[:, None] * step
    places = corners + (numbers + 0.5) * (step / samples)
    inside = (places >= -1) & (places <= size)
    places = places.clamp(0, size - 1)
    low = places.long()
    share = places - low
    weights = torch.stack((1 - share, share), -1) * inside[..., None] / samples
    return torch.stack((low, (low + 1).clamp(max=size - 1)), -1).flatten(2), weights.flatten(2)


def _extension_loaded() -> bool:
    extension = sys.modules.get("torchvision.extension")
    return extension is None or bool(extension._has_ops())


def _define_schemas() -> None:
    import torch

    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            if name == "nms":
                library.impl(name, suppressed, "CPU")
            _libraries.append(library)


def _changing(spec: ModuleSpec | None, change: Callable[[Any], None]) -> ModuleSpec | None:
    """A module's spec whose loader changes the module once it is loaded."""
    if spec is not None and spec.loader is not None:
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
    return spec


def _without_extension(module: Any) -> None:
    """Let ``nms`` be called; what else asks for the extension is refused by torch itself."""
    module._assert_has_ops = lambda: None


def _uncompiled(module: Any) -> None:
    """Compute RoI align by ``pooled``; torchvision would compile its own, which takes half a minute."""
    adaptive = module._roi_align.__wrapped__

    def align(
        features: "Tensor", rois: "Tensor", scale: float, height: int, width: int, samples: int, aligned: bool
    ) -> "Tensor":
        compute = pooled if samples > 0 else adaptive
        result: Tensor = compute(features, rois, scale, height, width, samples, aligned)
        return result

    module._roi_align = align


_CHANGES: dict[str, Callable[[Any], None]] = {
    "torchvision.ops.boxes": _without_extension,
    "torchvision.ops.roi_align": _uncompiled,
}
