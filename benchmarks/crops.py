"""Crops of pictures, where there are too few pictures: to calibrate on, and of other pictures to judge by."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.real import ASSETS
from modelopt_cli import torchvision_start  # noqa: F401  makes torchvision importable next to a CPU-only torch

SIDE = 256


def make_crops(folder: Path, calibration: int = 12, test: int = 20) -> None:
    """Write ``calibration.npz`` and ``test.npz``: uint8 ``(N, 256, 256, 3)`` and class ids.

    Calibration has crops of seven photographs, whose class is unknown and stands as 0, and of every other
    one of the 20 ImageNet images; the test has crops of the other ones.

    Args:
        folder: gets the files.
        calibration: random crops of each picture, at seed 0 of torch's generator.
        test: the same of the pictures to judge by.
    """
    place = ASSETS / "imagenet20"
    rows = [line.split(",") for line in (place / "labels.csv").read_text().splitlines()[1:]]
    labelled = [(place / name, int(label)) for name, label in rows]
    photographs = [(path, 0) for path in sorted((ASSETS / "pictures").iterdir())]
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "calibration.npz", [*photographs, *labelled[::2]], calibration)
    _write(folder / "test.npz", labelled[1::2], test)


def _write(path: Path, pictures: Iterable[tuple[Path, int]], count: int) -> None:
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(SIDE, scale=(0.25, 1), interpolation=bicubic)
    images, labels = [], []
    for name, label in pictures:
        with Image.open(name) as image:
            whole = image.convert("RGB")
        images += [np.asarray(crop(whole)) for _ in range(count)]
        labels += [label] * count
    np.savez_compressed(path, images=np.stack(images), labels=np.array(labels))
