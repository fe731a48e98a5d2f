"""Pairs of images: masks and pictures that stay with their picture through cropping and resizing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.errors import DataError
from modelopt_cli.tasks import parse_task

COUNT = 3


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "L") -> Any:
    """Writes a picture of black and white pixels, and returns them, ``(H, W)`` or ``(H, W, 3)``."""
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    pixels = 255 * np.random.default_rng(seed).integers(0, 2, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def pairs(root: Path, target: Callable[[Any], Image.Image], **given: Any) -> str:
    for folder in ("in", "out"):
        (root / folder).mkdir()
    for number in range(COUNT):
        pixels = noise(root / "in" / f"{number}.png", number, **given)
        target(pixels).save(root / "out" / f"{number}.png")
    return f"pairs:{root / 'in'}@{root / 'out'}"


def thresholded(pixels: Any) -> Image.Image:
    return Image.fromarray((pixels > 127).astype(np.uint8))


def opened(text: str, task: str | None = None, **overrides: Any) -> Data:
    data = open_data(text, overrides=PreprocessOverrides(**overrides), labels=False)
    return parse_task(task or data.source.task or "").read_targets(data)


CUTS = {
    "as it is": {},
    "crop": {"crop": 17},
    "larger than the picture": {"crop": 36},
    "short side": {"resize": 20, "interpolation": "nearest"},
    "resize and crop": {"resize": 23, "crop": 16, "interpolation": "nearest"},
    "fraction": {"crop": 0.7, "resize": (33, 33), "interpolation": "nearest"},
}


@pytest.mark.parametrize("overrides", CUTS.values(), ids=CUTS)
def test_masks_are_cut_and_resized_with_their_pictures(tmp_path: Path, overrides: Any) -> None:
    data = opened(pairs(tmp_path, thresholded), **overrides)
    images, masks = next(data.batches(COUNT))
    assert images.shape == (COUNT, 1, *masks.shape[1:])
    inside = masks != -100
    assert torch.equal(masks[inside], (images[:, 0] > 0.5).long()[inside])
    assert inside.all() == (overrides.get("crop") != 36)
    assert inside.float().mean() > 0.8
    assert len(masks.unique()) == 2 + (overrides.get("crop") == 36)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_masks_are_resized_by_the_nearest_pixel_whatever_their_pictures_are(
    tmp_path: Path, interpolation: str
) -> None:
    text = pairs(tmp_path, indexed("L"))
    masks = next(opened(text, resize=20, interpolation=interpolation).batches(COUNT))[1]
    assert torch.equal(masks, next(opened(text, resize=20, interpolation="nearest").batches(COUNT))[1])
    assert masks.unique().tolist() == [0, 3]


@pytest.mark.parametrize("overrides", [{}, {"resize": 20}, {"resize": (25, 21), "crop": 18}], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_cut_and_resized_with_their_pictures_and_not_normalised(
    tmp_path: Path, mode: str, overrides: Any
) -> None:
    text = pairs(tmp_path, Image.fromarray, mode=mode)
    mean, std = (0.5, 0.25)
    data = opened(text, "restore", mean=(mean,), std=(std,), **overrides)
    images, targets = next(data.batches(COUNT))
    torch.testing.assert_close(images * std + mean, targets)
    assert targets.max() == 1
    larger = opened(text, "restore?peak=255", **overrides)
    assert torch.equal(next(larger.batches(COUNT))[1], (targets * 255).round())


def test_a_target_may_be_a_whole_number_of_times_larger(tmp_path: Path) -> None:
    def doubled(pixels: Any) -> Image.Image:
        return Image.fromarray(pixels.repeat(2, 0).repeat(2, 1))

    data = opened(pairs(tmp_path, doubled), "restore", crop=16)
    images, targets = next(data.batches(COUNT))
    assert targets.shape == (COUNT, 1, 32, 32)
    assert torch.equal(targets[:, :, ::2, ::2], images)
    assert torch.equal(targets[:, :, 1::2, 1::2], images)
    (tmp_path / "out" / "0.png").unlink()
    doubled(np.full((30, 40), 128, np.uint8)).save(tmp_path / "out" / "0.png")
    resized = next(opened(data.name, "restore", resize=24, crop=16).batches(1))[1]
    torch.testing.assert_close(resized, torch.full((1, 1, 32, 32), 128 / 255))


def indexed(mode: str) -> Callable[[Any], Image.Image]:
    def make(pixels: Any) -> Image.Image:
        ids = (pixels > 127).astype(np.uint16 if mode == "I;16" else np.uint8) * (
            300 if mode == "I;16" else 3
        )
        image = Image.fromarray(ids)
        if mode == "P":
            image = Image.fromarray(ids, mode="L").convert("L")
            image.putpalette([255, 0, 0] * 256)
        return image

    return make


@pytest.mark.parametrize(("mode", "class_"), [("P", 3), ("L", 3), ("I;16", 300)])
def test_masks_are_palette_grey_or_16_bit_images_and_say_so(tmp_path: Path, mode: str, class_: int) -> None:
    data = opened(pairs(tmp_path, indexed(mode)))
    assert data.source.task == "segment"
    assert next(data.batches(COUNT))[1].unique().tolist() == [0, class_]


def test_pictures_say_that_they_are_to_be_restored(tmp_path: Path) -> None:
    text = pairs(tmp_path, Image.fromarray, mode="RGB")
    assert open_data(text, labels=False).source.task == "restore"
    assert open_data(f"{text}?target=mask", labels=False).source.task == "segment"
    smooth = Image.fromarray(np.arange(1200, dtype=np.uint16).astype(np.uint8).reshape(30, 40))
    smooth.save(tmp_path / "out" / "0.png")
    assert open_data(text, labels=False).source.task == "restore"


def test_pixel_values_may_be_named_for_the_classes(tmp_path: Path) -> None:
    text = pairs(tmp_path, Image.fromarray)
    assert (
        "out/0.png holds 0 and 255: if 255 is a class, add ?classes=0,255"
        in open_data(text, labels=False).notes[0]
    )
    ignored = next(opened(text, "segment").batches(COUNT))[1]
    assert ignored.unique().tolist() == [-100, 0]
    named = opened(f"{text}?classes=255,0", "segment")
    assert named.notes == ()
    images, masks = next(named.batches(COUNT))
    assert torch.equal(masks, (images[:, 0] < 0.5).long())
    with pytest.raises(DataError, match=r"out/0.png: mask holds 255, and \?classes=0,7 does not"):
        opened(f"{text}?classes=0,7", "segment")
    for wrong in ("", "a", "1,", "0,-1", "0,\uff11"):
        with pytest.raises(DataError, match=f"classes is '{wrong}'; write the pixel values"):
            open_data(f"{text}?classes={wrong}", labels=False)
    with pytest.raises(DataError, match="names the pixel value 2 twice; write the pixel values"):
        open_data(f"{text}?classes=0,1,2,2", labels=False)
    with pytest.raises(DataError, match=r"target is 'bogus'; choose from mask, image$"):
        open_data(f"{text}?target=bogus", labels=False)


def test_patterns_pair_what_stands_for_their_stars(tmp_path: Path) -> None:
    for place in ("a/x", "b/y"):
        (tmp_path / place).parent.mkdir()
        noise(tmp_path / f"{place}_image.png", 0)
        noise(tmp_path / f"{place}_ids.png", 1)
    source = open_data(f"pairs:{tmp_path}/**/*_image.png@{tmp_path}/**/*_ids.png", labels=False).source
    assert [source.where(i) for i in range(2)] == [
        f"{tmp_path}/{place}_image.png with {tmp_path}/{place}_ids.png" for place in ("a/x", "b/y")
    ]


def bad(name: str, make: Callable[[Path], Any], part: str) -> Any:
    return pytest.param(make, part, id=name)


def rgb(root: Path) -> None:
    noise(root / "out" / "1.png", 0, mode="RGB")


def jpeg(root: Path) -> None:
    (root / "out" / "1.png").unlink()
    Image.new("L", (40, 30)).save(root / "out" / "1.jpg")


BAD = [
    bad("no target", lambda root: (root / "out" / "1.png").unlink(), "in/1.png: has no target called '1'"),
    bad("no input", lambda root: (root / "in" / "1.png").unlink(), "out/1.png: has no input called '1'"),
    bad("two of a name", lambda root: noise(root / "in" / "1.bmp", 0), "has the name of"),
    bad("unreadable", lambda root: (root / "out" / "1.png").write_bytes(b"x"), "out/1.png: is not an image"),
    bad(
        "other size",
        lambda root: noise(root / "out" / "1.png", 0, (30, 30)),
        "mask is 30x30, the image 30x40",
    ),
    bad("colours", rgb, "out/1.png: mask has mode RGB"),
    bad("jpeg", jpeg, "out/1.jpg: mask is a JPEG"),
    bad(
        "class of 16 bits",
        lambda root: Image.new("I;16", (40, 30), 40000).save(root / "out" / "1.png"),
        "class 40000",
    ),
    bad("class", lambda root: Image.new("L", (40, 30), 7).save(root / "out" / "1.png"), "mask holds class 7"),
]


@pytest.mark.parametrize(("spoil", "part"), BAD)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, spoil: Any, part: str) -> None:
    text = pairs(tmp_path, thresholded)
    spoil(tmp_path)
    with pytest.raises(DataError) as caught:
        list(opened(text, "segment").fits(3).batches(2))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["pairs:in", "pairs:in@", "pairs:@out"])
def test_two_sides_are_needed(text: str) -> None:
    with pytest.raises(DataError, match="names one of two places"):
        open_data(text)


def test_a_picture_of_no_whole_number_of_times_the_size_is_refused(tmp_path: Path) -> None:
    text = pairs(tmp_path, lambda pixels: Image.new("RGB", (60, 45)))
    with pytest.raises(DataError, match="target is 45x60, the image 30x40"):
        opened(text, "restore")


def test_targets_that_are_not_read_are_not_decoded(tmp_path: Path) -> None:
    text = pairs(tmp_path, thresholded)
    (tmp_path / "out" / "1.png").write_bytes(b"x")
    images, labels = next(open_data(text, labels=False).batches(COUNT))
    assert isinstance(images, Tensor)
    assert labels.tolist() == [-1] * COUNT


def test_other_files_in_a_folder_are_said(tmp_path: Path) -> None:
    text = pairs(tmp_path, thresholded)
    (tmp_path / "out" / "notes.txt").touch()
    (note,) = open_data(text, labels=False).notes
    assert note.endswith("out: left out files that are not read as images: 1 .txt")


def test_datasets_of_pictures_have_masks_and_boxes_in_them(tmp_path: Path) -> None:
    """As torchvision's VOCSegmentation and detection's references give them."""
    pixels = noise(tmp_path / "a.png", 0)

    class Pictures(torch.utils.data.Dataset[Any]):
        def __init__(self, target: Any) -> None:
            self.target = target

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return Image.fromarray(pixels), self.target

    def first(target: Any, task: str) -> Any:
        chosen = PreprocessOverrides(crop=20, interpolation="nearest")
        data = open_data(as_samples(Pictures(target), "data"), overrides=chosen, labels=False)
        return next(data.with_targets(parse_task(task).targets()).batches(1))

    for mask in (thresholded(pixels), torch.from_numpy(pixels > 127).long()):
        images, masks = first(mask, "segment")
        assert torch.equal(masks, (images[:, 0] > 0.5).long())
    _, (boxes,) = first({"boxes": [[0, 0, 12, 8], [0, 0, 2, 2]], "labels": [1, 2]}, "detect")
    assert boxes["boxes"].tolist() == [[0, 0, 2, 3]]
    assert boxes["labels"].tolist() == [1]
