"""Drawn shapes, with their masks and boxes; a U-Net and a detector to train on them."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.real import Samples

SIDE, CELL = 48, 8
HALF = SIDE // 2
KINDS = ("disc", "square", "triangle")
"""Classes from 1; 0 is the ground."""


def masks(n: int = 200, seed: int = 0) -> Samples:
    """Images ``(3, 48, 48)`` from 0 to 1, and the class of each pixel."""
    drawn = [scene(seed * 100_000 + place) for place in range(n)]
    return Samples([image for image, _, _ in drawn], [mask for _, mask, _ in drawn])


def boxes(n: int = 200, seed: int = 0) -> Samples:
    """The same images, and boxes in pixels with their classes."""
    drawn = [scene(seed * 100_000 + place) for place in range(n)]
    return Samples([image for image, _, _ in drawn], [found for _, _, found in drawn])


def scene(seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """An image of one to three shapes that do not overlap, its mask and its boxes."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (SIDE, SIDE), tuple(draw.integers(0, 256, 3).tolist()))
    mask = Image.new("L", (SIDE, SIDE))
    corners = [(x, y) for x in (0, HALF) for y in (0, HALF)]
    boxes, labels = [], []
    for place in draw.permutation(4)[: draw.integers(1, 4)]:
        size = int(draw.integers(10, 22))
        left, top = (int(draw.integers(at, at + HALF - size)) for at in corners[place])
        kind, colour = int(draw.integers(3)), tuple(draw.integers(0, 256, 3).tolist())
        for canvas, ink in ((image, colour), (mask, kind + 1)):
            shape(ImageDraw.Draw(canvas), kind, (left, top, left + size, top + size), ink)
        boxes.append((left, top, left + size + 1, top + size + 1))
        labels.append(kind + 1)
    pixels = np.asarray(image, np.float32) / 255 + draw.normal(0, 0.08, (SIDE, SIDE, 3))
    return (
        torch.from_numpy(np.clip(pixels, 0, 1)).permute(2, 0, 1).float(),
        torch.from_numpy(np.asarray(mask).copy()).long(),
        {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)},
    )


def shape(canvas: ImageDraw.ImageDraw, kind: int, box: tuple[int, int, int, int], ink: object) -> None:
    """Fill a shape into its box."""
    left, top, right, bottom = box
    if kind == 0:
        canvas.ellipse(box, ink)
    elif kind == 1:
        canvas.rectangle(box, ink)
    else:
        canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], ink)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Two steps down, two up by transposed convolutions, with skips (Ronneberger et al., MICCAI 2015)."""

    def __init__(self, width: int = 12, classes: int = len(KINDS) + 1) -> None:
        super().__init__()
        self.top = block(3, width)
        self.middle = block(width, 2 * width, 2)
        self.bottom = nn.Sequential(block(2 * width, 4 * width, 2), block(4 * width, 4 * width))
        self.up_middle = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join_middle = block(4 * width, 2 * width)
        self.up_top = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join_top = block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 4, H, W)``."""
        top = self.top(x)
        middle = self.middle(top)
        below = self.up_middle(self.bottom(middle))
        below = self.up_top(self.join_middle(torch.cat([middle, below], 1)))
        return self.head(self.join_top(torch.cat([top, below], 1)))


def unet() -> nn.Module:
    """For ``segment``."""
    return UNet()


class Detector(nn.Module):
    """One box for each of 6 x 6 cells, with a class or none, as DETR returns them.

    A box belongs to the cell of its middle.
    """

    def __init__(self, width: int = 12, classes: int = len(KINDS) + 1) -> None:
        super().__init__()
        steps = ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 2), (4, 1))
        channels = [3, *(width * times for times, _ in steps)]
        layers = zip(channels, channels[1:], (stride for _, stride in steps), strict=False)
        self.body = nn.Sequential(*(block(*layer) for layer in layers))
        self.classes = nn.Conv2d(4 * width, classes + 1, 1)
        self.corners = nn.Conv2d(4 * width, 4, 1)
        steps = (torch.arange(SIDE // CELL) + 0.5) * CELL / SIDE
        centre = torch.stack([steps.repeat(SIDE // CELL), steps.repeat_interleave(SIDE // CELL)], 1)
        self.register_buffer("centre", centre, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits ``(N, 36, 5)``, the last of them for no object, and boxes: middle and size, from 0 to 1."""
        seen = self.body(images)
        logits = self.classes(seen).flatten(2).transpose(1, 2)
        parts = self.corners(seen).flatten(2).transpose(1, 2)
        middle = self.centre + (parts[..., :2].sigmoid() - 0.5) * 2 * CELL / SIDE
        return {"logits": logits, "pred_boxes": torch.cat([middle, parts[..., 2:].sigmoid()], 2)}


def assigned(targets: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The cell of each box: image and cell ``(K,)``, class ``(K,)``, and the box as the network gives it."""
    if isinstance(targets, dict):  # images with as many boxes each
        targets = [dict(zip(targets, parts, strict=True)) for parts in zip(*targets.values(), strict=True)]
    corners = torch.cat([target["boxes"] for target in targets]) / SIDE
    rows = torch.cat([torch.full_like(target["labels"], row) for row, target in enumerate(targets)])
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    column, line = (middle * (SIDE // CELL)).long().clamp(max=SIDE // CELL - 1).unbind(1)
    boxes = torch.cat([middle, corners[:, 2:] - corners[:, :2]], 1)
    return (
        torch.stack([rows, line * (SIDE // CELL) + column]),
        torch.cat([t["labels"] for t in targets]),
        boxes,
    )


def recall(outputs: dict[str, Tensor], targets: Any) -> Tensor:
    """Boxes of each image whose cell has the right class, in percent."""
    (rows, cells), labels, _ = assigned(targets)
    right = (outputs["logits"].argmax(2)[rows, cells] == labels).double()
    count = torch.bincount(rows, minlength=len(outputs["logits"]))
    return 100 * torch.bincount(rows, right, minlength=len(count)) / count


def loss(outputs: dict[str, Tensor], targets: Any) -> Tensor:
    """Cross-entropy of the cells' classes, and the distance of boxes in the cells that have one."""
    (rows, cells), labels, boxes = assigned(targets)
    wanted = torch.full(outputs["logits"].shape[:2], len(KINDS) + 1)
    wanted[rows, cells] = labels
    weight = torch.tensor([1.0] * (len(KINDS) + 1) + [0.2])
    classes = F.cross_entropy(outputs["logits"].flatten(0, 1), wanted.flatten(), weight)
    return classes + 5 * F.l1_loss(outputs["pred_boxes"][rows, cells], boxes)


recall.loss, recall.unit = loss, " %"


def detector() -> nn.Module:
    """For ``detect``; it is trained by ``recall``."""
    return Detector()
