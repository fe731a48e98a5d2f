"""COCO's JSON of boxes: they stay with their picture, classes by name or number, and bad files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.errors import DataError
from modelopt_cli.tasks import parse_task

WIDTH, HEIGHT = 40, 30
BOXES = [[4, 6, 12, 8], [30, 20, 10, 10]]
"""Left, top, width, height of the bright rectangles."""


def content(boxes: Any = BOXES, **annotation: Any) -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 3, "file_name": "b.png"},
        ],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": 5 - 3 * i, "bbox": box, "iscrowd": i} | annotation
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 5, "name": "Traffic Light"}, {"id": 2, "name": "dog"}],
    }


def written(root: Path, given: Any = None) -> str:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for left, top, width, height in BOXES:
        pixels[top : top + height, left : left + width] = 255
    Image.fromarray(pixels).save(root / "a.png")
    Image.new("L", (WIDTH, HEIGHT)).save(root / "b.png")
    text = given if isinstance(given, str) else json.dumps(given or content())
    (root / "c.json").write_text(text)
    return f"coco:{root / 'c.json'}@{root}"


def opened(text: str, names: Any = None, **overrides: Any) -> Data:
    data = open_data(text, overrides=PreprocessOverrides(channels=1, **overrides), labels=False)
    return data.with_targets(parse_task("detect").targets(names))


def extent(bright: torch.Tensor) -> list[float]:
    """Left, top, right and bottom of what is bright."""
    rows, columns = (bright.any(1 - axis).nonzero().flatten() for axis in (0, 1))
    return [float(each) for each in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


CUTS: dict[str, Any] = {
    "as it is": {},
    "twice as large": {"resize": (2 * HEIGHT, 2 * WIDTH)},
    "half as wide": {"resize": (HEIGHT, WIDTH // 2)},
    "middle": {"crop": 30},
    "larger than the picture": {"crop": 40},
    "half, then the middle": {"resize": (HEIGHT // 2, WIDTH // 2), "crop": 14},
}


@pytest.mark.parametrize("overrides", CUTS.values(), ids=CUTS)
def test_boxes_are_cut_and_resized_with_their_pictures(tmp_path: Path, overrides: Any) -> None:
    images, targets = next(opened(written(tmp_path), interpolation="nearest", **overrides).batches(2))
    boxes = targets[0]["boxes"]
    assert len(boxes) == 2
    for box in boxes.tolist():
        left, top, right, bottom = map(int, box)
        mask = torch.zeros(images.shape[2:], dtype=torch.bool)
        mask[top:bottom, left:right] = images[0, 0, top:bottom, left:right] > 0.5
        assert extent(mask) == box
        assert mask[top:bottom, left:right].all()
    assert images[0].sum() == sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes.tolist())
    assert targets[1]["boxes"].shape == (0, 4)


def test_what_is_cropped_away_is_left_out_with_its_label(tmp_path: Path) -> None:
    (target,) = next(opened(written(tmp_path), crop=16).batches(1))[1]
    assert target["boxes"].tolist() == [[0, 0, 4, 7]]
    assert target["labels"].tolist() == [5]
    assert target["iscrowd"].tolist() == [False]


LABELS = {
    "ids where the network has no names": ("", None, [5, 2]),
    "the network's numbers where it has names": ("", ("-", "dog", "cat", "traffic_light"), [3, 1]),
    "ids all the same": ("?labels=ids", ("-", "dog", "cat", "traffic_light"), [5, 2]),
    "in order": ("?labels=order", ("a", "b"), [1, 0]),
    "names": ("?labels=names", ("traffic light", "dog"), [0, 1]),
}


@pytest.mark.parametrize(("option", "names", "labels"), LABELS.values(), ids=LABELS)
def test_categories_become_classes(tmp_path: Path, option: str, names: Any, labels: Any) -> None:
    data = opened(written(tmp_path) + option, names)
    assert data.source.task == "detect"
    assert next(data.batches(1))[1][0]["labels"].tolist() == labels


def changed(**parts: Any) -> dict[str, Any]:
    return {**content(), **parts}


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "c.json: is not JSON"),
    "a list": ("[]", "c.json: is no JSON object"),
    "no images": (changed(images=[]), "c.json: holds no images"),
    "no list of images": (changed(images=3), "c.json: has no list of images"),
    "no annotations": (changed(annotations=None), "c.json: has no list of annotations"),
    "missing file": (changed(images=[{"id": 7, "file_name": "x.png"}]), "x.png: no such file; it is image 7"),
    "image without id": (changed(images=[{"file_name": "a.png"}]), "image 0: has no id"),
    "two of an id": (
        changed(images=[{"id": 7, "file_name": "a.png"}] * 2),
        "image 1: has the id 7, which another",
    ),
    "image id beyond 64 bits": (
        changed(images=[{"id": 2**63, "file_name": "a.png"}]),
        "image 0: has the id 9223372036854775808, above 9223372036854775807",
    ),
    "category id beyond 64 bits": (
        {**content(category_id=2**70), "categories": [{"id": 2**70, "name": "dog"}]},
        f"category 0: has the id {2**70}, above",
    ),
    "width as text": (
        changed(images=[{"id": 7, "file_name": "a.png", "width": "40", "height": 30}]),
        "image 0: width is '40', not a number; write the pixels",
    ),
    "endless height": (
        changed(images=[{"id": 7, "file_name": "a.png", "height": float("inf")}]),
        "image 0: height is inf, not a number",
    ),
    "file outside": (
        changed(images=[{"id": 7, "file_name": "sub/../../a.png"}]),
        "image 0: file_name sub/../../a.png leads outside",
    ),
    "file elsewhere": (
        changed(images=[{"id": 7, "file_name": "/etc/passwd"}]),
        "image 0: file_name /etc/passwd leads outside",
    ),
    "category without name": (changed(categories=[{"id": 1}]), "category 0: has no name"),
    "unknown image": (content(image_id=8), "annotation 0: is of image 8, which is not in the file"),
    "an id that is none": (content(image_id=[7]), "annotation 0: is of image [7], which is not"),
    "unknown category": (content(category_id=9), "annotation 0: is of category 9, which is not in the file"),
    "a category that is no number": (
        {**content(category_id=True), "categories": [{"id": 1, "name": "dog"}]},
        "annotation 0: is of category True, which is not in the file",
    ),
    "a crowd in words": (content(iscrowd="yes"), "annotation 0: has iscrowd 'yes'; give 0 or 1"),
    "no width": (content([[4, 6, 0, 8]]), "annotation 0: bbox 4, 6, 0, 8 has no width"),
    "negative height": (content([[4, 6, 3, -8]]), "annotation 0: bbox 4, 6, 3, -8 has no width or no height"),
    "outside": (content([[30, 6, 12, 8]]), "annotation 0: bbox 30, 6, 12, 8 reaches outside image"),
    "outside of an image without size": (
        content([[30, 6, 12, 8]], image_id=3),
        "b.png: box 30, 6, 42, 14 reaches outside the image, 40x30 pixels",
    ),
    "three numbers": (content([[4, 6, 3]]), "annotation 0: has no bbox of four finite numbers"),
    "NaN": (content([[4, 6, 3, float("nan")]]), "annotation 0: has no bbox of four finite numbers"),
    "huge": (content([[4, 6, 3, 10**400]]), "annotation 0: has no bbox of four finite numbers"),
    "other size": (
        changed(images=[{"id": 7, "file_name": "a.png", "width": 80, "height": 60}]),
        "a.png: is 30x40, and 60x80 in the table of images",
    ),
}


@pytest.mark.parametrize(("given", "part"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, given: Any, part: str) -> None:
    with pytest.raises(DataError) as caught:
        list(opened(written(tmp_path, given)).batches(2))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_files_may_be_absolute_or_lead_over_links(tmp_path: Path) -> None:
    """As long as they are in the folder, or the folder's owner linked what is elsewhere."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "folder").symlink_to("in")
    written(tmp_path / "in")
    (tmp_path / "b.png").write_bytes((tmp_path / "in" / "b.png").read_bytes())
    (tmp_path / "in" / "link.png").symlink_to("../b.png")
    names = [str(tmp_path / "folder" / "a.png"), str(tmp_path / "in" / "a.png"), "sub/../a.png", "link.png"]
    images = [{"id": 7 + i, "file_name": name} for i, name in enumerate(names)]
    (tmp_path / "c.json").write_text(json.dumps(changed(images=images)))
    data = opened(f"coco:{tmp_path / 'c.json'}@{tmp_path / 'folder'}", ("dog", "traffic light"))
    assert [len(each["boxes"]) for each in next(data.batches(4))[1]] == [2, 0, 0, 0]


def test_the_largest_id_is_a_class(tmp_path: Path) -> None:
    given = {**content(category_id=2**63 - 1), "categories": [{"id": 2**63 - 1, "name": "dog"}]}
    target = next(opened(written(tmp_path, given) + "?labels=ids").batches(1))[1][0]
    assert target["labels"].tolist() == [2**63 - 1] * 2


def test_names_that_the_network_does_not_have_are_refused(tmp_path: Path) -> None:
    text = written(tmp_path)
    with pytest.raises(DataError, match=r"the network has no class 'Traffic Light'; coco.*labels=ids"):
        opened(text, ("dog", "cat"))
    with pytest.raises(DataError, match="the network has none"):
        opened(f"{text}?labels=names")
    with pytest.raises(DataError, match="names one of two places; write coco:FILE@DIR"):
        open_data(text.partition("@")[0])


def test_boxes_that_are_not_read_may_be_anything(tmp_path: Path) -> None:
    text = written(tmp_path, content([[4, 6, 0, 8]]))
    assert next(open_data(text, labels=False).batches(2))[1].tolist() == [-1, -1]


def test_groups_are_not_learned() -> None:
    from modelopt_cli.tasks.detection import to_find

    make: Callable[..., Any] = torch.tensor
    target = {
        "boxes": make([[0.0, 0, 1, 1], [1, 1, 2, 2]]),
        "labels": make([3, 4]),
        "iscrowd": make([True, False]),
    }
    (found,) = to_find([target])
    assert found["boxes"].tolist() == [[1, 1, 2, 2]]
    assert found["labels"].tolist() == [4]
