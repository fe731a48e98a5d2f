"""What lies in a picture moves with it: masks, pictures and boxes, by every augmentation."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.errors import UsageError
from modelopt_cli.tasks import parse_task
from modelopt_cli.training import memory
from modelopt_cli.training.augment import Affine, Moved
from modelopt_cli.training.catalog import AUGMENTATIONS
from modelopt_cli.training.loader import Batch, training_batches
from modelopt_cli.training.random_numbers import uniform

COUNT, SIZE = 6, 32
RANDOM = [name for name, row in AUGMENTATIONS.items() if row.is_random]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Black and white noise, what is white in it, and a white rectangle on black with its box."""
    generator = np.random.default_rng(0)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "it"}]}
    for folder in ("noise", "white", "rectangle"):
        (tmp_path / folder).mkdir()
    for number in range(COUNT):
        pixels = 255 * generator.integers(0, 2, (SIZE, SIZE), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{number}.png")
        Image.fromarray(pixels // 255).save(tmp_path / "white" / f"{number}.png")
        box = [10, 12, 11, 7]
        pixels = np.zeros((SIZE, SIZE), np.uint8)
        pixels[12:19, 10:21] = 255
        Image.fromarray(pixels).save(tmp_path / "rectangle" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png"})
        content["annotations"].append({"id": number, "image_id": number, "category_id": 1, "bbox": box})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path


def opened(text: str, task: str) -> Data:
    chosen = PreprocessOverrides(
        channels=1, mean=(0.5,), std=(0.25,), interpolation="nearest", input_size=SIZE
    )
    data = open_data(text, overrides=chosen, labels=False)
    return data.with_targets(parse_task(task).targets())


def batches(data: Data, augment: str, epochs: int = 4, **given: Any) -> Iterator[Batch]:
    for epoch in range(epochs):
        yield from training_batches(data, batch_size=4, epoch=epoch, seed=3, augment=augment, **given)


@pytest.mark.parametrize("augment", ["cifar", "imagenet"])
@pytest.mark.parametrize("kept", [True, False], ids=["in memory", "read again"])
def test_a_mask_stays_the_threshold_of_its_picture(
    pictures: Path, augment: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(memory, "IN_MEMORY", 0)
    data = opened(f"pairs:{pictures / 'noise'}@{pictures / 'white'}", "segment")
    seen, still = 0, opened(data.name, "segment")
    for batch in batches(data, augment):
        masks, images = batch.labels, batch.inputs
        assert isinstance(masks, Tensor)
        assert isinstance(images, Tensor)
        inside = masks != -100
        assert torch.equal(masks[inside], (images[:, 0] > 0).long()[inside])
        assert images[:, 0][~inside].eq(-2).all()
        seen += int((images != torch.stack([still.get(int(i))[0] for i in batch.samples])).sum())
    assert seen > 1000


@pytest.mark.parametrize("augment", RANDOM)
def test_a_target_picture_moves_like_its_picture(pictures: Path, augment: str) -> None:
    data = opened(f"pairs:{pictures / 'noise'}@{pictures / 'noise'}", "restore")
    for batch in batches(data, augment):
        torch.testing.assert_close(batch.inputs * 0.25 + 0.5, batch.labels, rtol=0, atol=1e-6)


def test_targets_count_in_the_memory_that_is_kept(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(f"pairs:{pictures / 'noise'}@{pictures / 'noise'}", "restore")
    monkeypatch.setattr(memory, "IN_MEMORY", 2 * 4 * COUNT * SIZE * SIZE)
    assert memory.in_memory(data) is not None
    monkeypatch.setattr(memory, "IN_MEMORY", 2 * 4 * COUNT * SIZE * SIZE - 1)
    assert memory.in_memory(replace(data)) is None


def test_masks_are_turned_as_torchvision_turns_them() -> None:
    masks = torch.randint(0, 5, (40, 24, 20), generator=torch.Generator().manual_seed(0))
    numbers = uniform(5, 0, np.arange(40), Affine.draws)
    augment = Affine(torch.zeros(1, 1, 1))
    moved = Moved(augment, numbers, (24, 20)).masks(masks)
    angle, right, down, scale = augment.drawn(numbers, 24, 20)
    different = 0
    for i, mask in enumerate(masks):
        theirs = F.affine(
            tv_tensors.Mask(mask + 1),
            angle=angle[i].item(),
            translate=[right[i].item(), down[i].item()],
            scale=scale[i].item(),
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.NEAREST,
        )
        expected = torch.where(theirs == 0, -100, theirs - 1)
        different += int((moved[i] != expected).sum())
    assert different <= masks.numel() // 1000  # a pixel between two, rounded in float32


def extent(bright: Tensor) -> Tensor:
    """Left, top, right and bottom of what is bright."""
    rows, columns = (bright.any(axis).nonzero().flatten() for axis in (1, 0))
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


@pytest.mark.parametrize(("augment", "tolerance"), [("cifar", 0.0), ("mnist", 1.5), ("imagenet", 1.0)])
def test_a_box_stays_around_what_is_bright(pictures: Path, augment: str, tolerance: float) -> None:
    data = opened(f"coco:{pictures / 'boxes.json'}@{pictures / 'rectangle'}", "detect")
    boxes = set()
    for batch in batches(data, augment):
        for image, target in zip(batch.inputs, batch.labels, strict=True):
            bright = image[0] > 0
            if not bright.any():
                continue
            (box,) = target["boxes"]
            assert target["labels"].tolist() == [1]
            torch.testing.assert_close(box, extent(bright), rtol=0, atol=tolerance)
            boxes.add(tuple(box.tolist()))
    assert len(boxes) > 10


def test_boxes_that_are_moved_out_are_left_out() -> None:
    image = torch.zeros(1, 16, 16)
    target = {"boxes": [[0.0, 0, 1, 1], [6, 6, 9, 9]], "labels": [1, 2], "iscrowd": [0, 1]}
    data = open_data(as_samples([(torch.stack([image] * 8), [target] * 8)], "data"), labels=False)
    data = data.with_targets(parse_task("detect").targets())
    found = [t["labels"].tolist() for batch in batches(data, "cifar", 20) for t in batch.labels]
    assert {tuple(each) for each in found} == {(1, 2), (2,)}


def test_a_stream_of_masks_moves_too() -> None:
    class Streamed(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            images = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
            return iter([(x, (x[0] > 0).long()) for x in images])

    data = open_data(as_samples(Streamed(), "train"), labels=False)
    data = data.with_targets(parse_task("segment").targets())
    for batch in batches(data, "cifar"):
        inside = batch.labels != -100
        assert torch.equal(batch.labels[inside], (batch.inputs[:, 0] > 0).long()[inside])


def test_targets_of_one_s_own_move_by_their_form(pictures: Path) -> None:
    data = opened(f"pairs:{pictures / 'noise'}@{pictures / 'white'}", "net.py:metric")
    for batch in batches(data, "cifar"):
        inside = batch.labels != -100
        assert torch.equal(batch.labels[inside], (batch.inputs[:, 0] > 0).long()[inside])
    numbers = replace(data, targets=Numbers())
    assert next(batches(numbers, "cifar")).labels.tolist() == [1.0] * 4
    with pytest.raises(UsageError, match="does not know how these targets move"):
        next(batches(replace(data, targets=Maps()), "cifar"))


class Numbers(type(parse_task("net.py:metric").targets())):  # type: ignore[misc]
    """Targets that do not lie in the picture."""

    value: Any = 1.0

    def check(self, raw: Any, inputs: Any, classes: int | None) -> Any:
        return self.value


class Maps(Numbers):
    """Targets of another size than the picture."""

    value = torch.zeros(3, 3, 3)


def test_target_pictures_of_another_size_are_not_moved(pictures: Path) -> None:
    for number in range(COUNT):
        Image.new("L", (2 * SIZE, 2 * SIZE)).save(pictures / "white" / f"{number}.png")
    data = opened(f"pairs:{pictures / 'noise'}@{pictures / 'white'}", "restore")
    with pytest.raises(UsageError, match="augment: targets are 64x64, the pictures 32x32"):
        next(batches(data, "cifar"))
    assert next(batches(data, "imagenet")).labels.shape == (4, 1, 64, 64)
