"""Crops of pictures, where there are too few pictures: to calibrate on, and of other pictures to judge by."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.real import ASSETS

SIDE = 256
CALIBRATION_CROPS, TEST_CROPS = 4, 10
"""Random crops of a picture, at seed 0 of torch's generator."""


def make_crops(folder: Path) -> None:
    """Write ``calibration.npz`` and ``test.npz``: uint8 ``(N, 256, 256, 3)`` and class ids.

    Calibration has crops of seven photographs, whose class is unknown and stands as 0, and of every other
    one of the 20 ImageNet images; the test has crops of the other ones.
    """
    place = ASSETS / "imagenet20"
    rows = [line.split(",") for line in (place / "labels.csv").read_text().splitlines()[1:]]
    labelled = [(place / name, int(label)) for name, label in rows]
    photographs = [(path, 0) for path in sorted((ASSETS / "pictures").iterdir())]
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "calibration.npz", [*photographs, *labelled[::2]], CALIBRATION_CROPS)
    _write(folder / "test.npz", labelled[1::2], TEST_CROPS)


def _write(path: Path, pictures: Iterable[tuple[Path, int]], count: int) -> None:
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(SIDE, scale=(0.25, 1), interpolation=bicubic)
    images, labels = [], []
    for name, label in pictures:
        with Image.open(name) as image:
            whole = image.convert("RGB")
        images += [np.asarray(crop(whole)) for _ in range(count)]
        labels += [label] * count
    np.savez_compressed(path, images=np.stack(images), labels=np.array(labels))
