"""Encoded images, all samples of some data, and what becomes of damaged files."""

import io

import numpy as np
import torch
from PIL import Image

from modelopt_cli.data import open_data
from modelopt_cli.errors import DataError


def encoded(seed, suffix="png", size=(9, 7)):
    """A file of random pixels; its format is what Pillow makes of a file's suffix."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "jpeg"}.get(suffix.lower(), suffix.lower()))
    return stream.getvalue()


PNG = encoded(0)


def everything(data, **options):
    images, labels = zip(*data.batches(5, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def outcomes_of_damage(path, kind, *, rounds, places):
    """What came of reading a file with a few random bytes changed, again and again."""
    content, random, outcomes = path.read_bytes(), np.random.default_rng(0), set()
    for _ in range(rounds):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), places):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            list(open_data(f"{kind}:{path}").batches(2))
            outcomes.add("read")
        except DataError as error:
            outcomes.add(f"refused in {len(str(error).splitlines())} line")
    return outcomes
