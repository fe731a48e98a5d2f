"""Kinds of data from the shell: trained on, quantized with, measured on; and bad input in one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

CODE = """
import torch
from torch import nn

def convolutions(inputs=3, outputs=2):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1))

def rows(inputs=3, outputs=2):
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))

def pooled(outputs=2):
    return nn.Sequential(convolutions(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))

class Detector(nn.Module):
    # Finds one bright square by the mean place of what is bright; learns its class, its size and a score.

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, images, targets=None):
        weight = (20 * images).flatten(2).softmax(2).unflatten(2, images.shape[2:])[:, 0]
        places = torch.arange(images.shape[2]) + 0.5
        y, x = (weight.sum(2) * places).sum(1), (weight.sum(1) * places).sum(1)
        found = self.head(self.features(images).relu().amax((2, 3)))
        half = 1 + nn.functional.softplus(found[:, 2])
        boxes = torch.stack([x - half, y - half, x + half, y + half], 1)
        if targets is not None:
            labels = torch.cat([target["labels"] for target in targets])
            wanted = torch.cat([target["boxes"] for target in targets])
            return {
                "class": nn.functional.cross_entropy(found[:, :2], labels),
                "box": nn.functional.smooth_l1_loss(boxes, wanted),
            }
        scores, labels = found[:, :2].softmax(1).max(1)
        return [
            {"boxes": box[None], "scores": score[None], "labels": label[None]}
            for box, score, label in zip(boxes, scores, labels)
        ]
"""
TRAINED = ("--epochs", "2", "--batch-size", "4", "--val-fraction", "0.25", "--lr", "0.02")
QUIET = ("--latency-runs", "0", "-q")
Run = Callable[..., Any]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks, and pictures whose masks say where they are bright."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "net.py").write_text(CODE)
    scope: dict[str, Any] = {}
    exec(CODE, scope)  # noqa: S102 -- our own text, a few lines above
    torch.save(scope["convolutions"]().state_dict(), "net.pth")
    torch.save(scope["pooled"]().state_dict(), "pooled.pth")
    torch.save(scope["Detector"]().state_dict(), "detector.pth")
    for side in ("in", "ids", "out"):
        Path(side).mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((18, 18), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture)
        Image.fromarray(pixels).save(f"in/{number}.png")
        Image.fromarray((pixels[..., 0] > 127).astype(np.uint8)).save(f"ids/{number}.png")
        picture.save(f"out/{number}.png")
    draw_squares(generator)
    numbers = generator.standard_normal((24, 3))
    lines = [
        f"in/{i % 12}.png,{a},{b},{c},{2 * a - b},{a + c},{int(a > 0)},{int(b > c)}"
        for i, (a, b, c) in enumerate(numbers)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["path,a,b,c,p,q,m,n", *lines]))
    return tmp_path


def draw_squares(generator: np.random.Generator) -> None:
    """Pictures of one square each, dim or bright, and COCO's JSON of where they are."""
    Path("squares").mkdir()
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 0, "name": "dim"}, {"id": 1, "name": "bright"}],
    }
    for number in range(12):
        pixels = np.zeros((32, 32), np.uint8)
        top, left = (2 * int(each) for each in generator.integers(2, 9, 2))
        pixels[top : top + 8, left : left + 8] = 120 + 120 * (number % 2)
        Image.fromarray(pixels).save(f"squares/{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": 32, "height": 32})
        box = {"image_id": number, "category_id": number % 2, "bbox": [left, top, 8, 8], "id": number}
        content["annotations"].append(box)
    Path("squares.json").write_text(json.dumps(content))


def result(found: Any) -> Any:
    assert found.code == 0, found.err
    return json.loads(found.out)


SEGMENT = ("--arch", "net.py:convolutions", "--input-size", "16")
RESTORE = ("--arch", "net.py:convolutions?outputs=3", "--input-size", "16")
ROWS = ("--arch", "net.py:rows")
POOLED = ("--arch", "net.py:pooled", "--input-size", "16")
KINDS = {
    "masks": ((*SEGMENT, "--augment", "cifar"), "pairs:in@ids", "segment", "miou"),
    "pictures": ((*RESTORE, "--augment", "imagenet"), "pairs:in@out", "restore", "psnr"),
    "several labels": (ROWS, "csv:t.csv?inputs=a,b,c&labels=m,n", "multilabel", "map"),
    "numbers": (ROWS, "csv:t.csv?inputs=a,b,c&labels=p,q", "regress", "mae"),
    "several labels of images": (POOLED, "csv:t.csv?labels=m,n", "multilabel", "f1"),
}


@pytest.mark.parametrize(("how", "data", "task", "metric"), KINDS.values(), ids=KINDS)
def test_data_say_the_task_and_go_through_every_command(
    there: Path, modelopt: Run, how: Any, data: str, task: str, metric: str
) -> None:
    made = modelopt("train", *how, "--train", data, "--data", data, *TRAINED, "-o", "t.safetensors", "--json")
    trained = result(made)["evaluation"]
    assert trained["task"] == f"{task} (of {data})"
    words = ("--data", data, "--calibration", data, "-o", "q.safetensors", "--json", *QUIET)
    quantized = result(modelopt("quantize", "t.safetensors", *words))["evaluation"]
    assert quantized["task"] == f"{task} (recorded)"
    assert quantized["models"][0]["metrics"] == trained["models"][-1]["metrics"]
    again = result(modelopt("eval", "q.safetensors", "--data", data, "--json", *QUIET))
    assert again["models"][0]["metrics"] == quantized["models"][1]["metrics"]
    assert again["models"][0]["metrics"][metric] > 0


DETECT = ("--arch", "net.py:Detector", "--input-shape", "1x16x16")
BOXES = "coco:squares.json@squares"


@pytest.mark.slow
def test_boxes_say_the_task_and_are_learned_found_and_kept_by_int8_weights(
    there: Path, modelopt: Run
) -> None:
    pytest.importorskip("pycocotools")
    learned = (
        "--train",
        BOXES,
        "--epochs",
        "25",
        "--batch-size",
        "4",
        "--optimizer",
        "adamw",
        "--lr",
        "0.05",
    )
    words = ("-o", "t.safetensors", "--data", BOXES, "--val-fraction", "0", "--json", *QUIET)
    trained = result(modelopt("train", *DETECT, *learned, *words))["evaluation"]
    assert trained["task"] == f"detect (of {BOXES})"
    assert trained["models"][-1]["metrics"]["map50"] > 90
    words = ("--scheme", "int8-weight", "-o", "q.safetensors", "--data", BOXES, "--json", *QUIET)
    quantized = result(modelopt("quantize", "t.safetensors", *DETECT[:2], *words))["evaluation"]
    again = result(modelopt("eval", "q.safetensors", *DETECT[:2], "--data", BOXES, "--json", *QUIET))
    assert again["task"] == "detect (recorded)"
    assert again["models"][0]["metrics"] == quantized["models"][1]["metrics"]


def exchange(old: str, new: str) -> None:
    Path("squares.json").write_text(Path("squares.json").read_text().replace(old, new))


BAD: dict[str, tuple[str, Callable[[], Any], str]] = {
    "no partner": ("pairs:in@ids", lambda: Path("ids/3.png").unlink(), "in/3.png: has no target called '3'"),
    "mask of another size": (
        "pairs:in@ids",
        lambda: Image.new("L", (9, 9)).save("ids/3.png"),
        "in/3.png with ids/3.png: mask is 9x9, the image 18x18",
    ),
    "damaged mask": (
        "pairs:in@ids",
        lambda: Path("ids/3.png").write_bytes(b"x"),
        "ids/3.png: is not an image",
    ),
    "mask of an unknown class": (
        "pairs:in@ids",
        lambda: Image.new("L", (18, 18), 9).save("ids/3.png"),
        "in/3.png with ids/3.png: mask holds class 9, ",
    ),
    "coloured mask": (
        "pairs:in@ids?target=mask",
        lambda: Image.new("RGB", (18, 18)).save("ids/3.png"),
        "ids/3.png: mask has mode RGB, and not one value for each pixel",
    ),
    "NaN in a target": (
        "csv:t.csv?labels=p,q",
        lambda: Path("t.csv").write_text("path,p,q\nin/0.png,1,2\nin/1.png,1,nan\n"),
        "t.csv line 3: q is 'nan', not a finite number",
    ),
    "box outside": (
        BOXES,
        lambda: exchange('"bbox": [', '"bbox": [9'),
        "squares.json: annotation 0: bbox 9",
    ),
    "unknown category": (
        BOXES,
        lambda: exchange('"category_id": 1', '"category_id": 4'),
        "squares.json: annotation 1: is of category 4, which is not in the file",
    ),
    "other number of labels": (
        "csv:t.csv?labels=m,n,m2",
        lambda: Path("t.csv").write_text("path,m,n,m2\nin/0.png,1,0,0\nin/1.png,1,0,0\n"),
        "3 classes",
    ),
}

NETWORKS = {
    "pairs": (SEGMENT, "net.pth"),
    "csv": (POOLED, "pooled.pth"),
    "coco": (DETECT, "detector.pth"),
}


@pytest.mark.parametrize(
    ("data", "spoil", "message"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (case[0] == BOXES))
        for name, case in BAD.items()
    ],
)
def test_bad_data_ends_every_command_in_one_line(
    there: Path, modelopt: Run, data: str, spoil: Callable[[], Any], message: str
) -> None:
    spoil()
    before = sorted(there.rglob("*"))
    how, file = NETWORKS[data.partition(":")[0]]
    for words in (
        ("train", "--train", data, "--no-eval", "-o", "t.safetensors", *TRAINED[:4], "--val-fraction", "0"),
        ("eval", file, "--data", data),
        ("quantize", file, "--data", data, "-o", "q.safetensors", "--scheme", "int8-weight"),
    ):
        found = modelopt(*words, *how, "-q")
        assert found.code == 2, found.err
        assert message in found.err
        assert found.err.strip().count("\n") == 0
        assert sorted(there.rglob("*")) == before
