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
from torch import nn

def convolutions(inputs=3, outputs=2):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1))

def rows(inputs=3, outputs=2):
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))

def pooled(outputs=2):
    return nn.Sequential(convolutions(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))
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
    numbers = generator.standard_normal((24, 3))
    lines = [
        f"in/{i % 12}.png,{a},{b},{c},{2 * a - b},{a + c},{int(a > 0)},{int(b > c)}"
        for i, (a, b, c) in enumerate(numbers)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["path,a,b,c,p,q,m,n", *lines]))
    return tmp_path


def result(found: Any) -> Any:
    assert found.code == 0, found.err
    return json.loads(found.out)


SEGMENT = ("--arch", "net.py:convolutions", "--input-size", "16")
RESTORE = ("--arch", "net.py:convolutions?outputs=3", "--input-size", "16")
ROWS = ("--arch", "net.py:rows")
POOLED = ("--arch", "net.py:pooled", "--input-size", "16")
KINDS = {
    "masks": (SEGMENT, "pairs:in@ids", "segment", "miou"),
    "pictures": (RESTORE, "pairs:in@out", "restore", "psnr"),
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
    "other number of labels": (
        "csv:t.csv?labels=m,n,m2",
        lambda: Path("t.csv").write_text("path,m,n,m2\nin/0.png,1,0,0\nin/1.png,1,0,0\n"),
        "3 classes",
    ),
}


@pytest.mark.parametrize(("data", "spoil", "message"), BAD.values(), ids=BAD)
def test_bad_data_ends_every_command_in_one_line(
    there: Path, modelopt: Run, data: str, spoil: Callable[[], Any], message: str
) -> None:
    spoil()
    before = sorted(there.rglob("*"))
    how, file = (SEGMENT, "net.pth") if data.startswith("pairs") else (POOLED, "pooled.pth")
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
