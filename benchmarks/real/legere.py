"""Legere's reader of lines of text, a convolutional network with a GRU, and rendered lines."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from benchmarks.real import ASSETS, Samples, source

HEIGHT, WIDTH = 32, 640
FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf")
"""They come with matplotlib."""


def make() -> nn.Module:
    """Of grey lines ``(N, 1, 32, W)`` from -1 to 1, logits of characters ``(N, W / 4, classes)``."""
    return source("legere.model").CompactCRNN()


def lines(test: bool = True) -> Samples:
    """Every other one of 120 rendered lines of the licences, and the class ids of its characters."""
    return _rendered(_spread(_legible())[test:120:2])


def training() -> Samples:
    """All other lines of the licences, rendered in each of the fonts."""
    legible = _legible()
    chosen = {*_spread(legible)[:120]}
    return _rendered([line for line in legible if line not in chosen for _ in FONTS])


def _legible() -> list[str]:
    """Lines of 21 to 44 characters, all of which the network knows."""
    known = source("legere.charset")
    texts = " ".join(path.read_text() for path in sorted((ASSETS / "licenses").glob("*/LICENSE*")))
    wrapped = dict.fromkeys(textwrap.wrap(texts, 44))
    return [line for line in wrapped if len(line) > 20 and set(line) <= set(known.CHARSET)]


def _spread(lines: list[str]) -> list[str]:
    return lines[:: len(lines) // 120]


def _rendered(lines: list[str]) -> Samples:
    """Lines, one after another in each of the fonts, and their characters."""
    known = source("legere.charset")
    images = [rendered(line, FONTS[place % len(FONTS)]) for place, line in enumerate(lines)]
    return Samples(images, [torch.tensor(known.encode_text(line)) for line in lines])


def rendered(line: str, font: str) -> Tensor:
    """Black on grey, ``(1, 32, 640)``, with some noise."""
    import matplotlib

    place = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    face = ImageFont.truetype(str(place), 25)
    image = Image.new("L", (WIDTH, HEIGHT), 235)
    ImageDraw.Draw(image).text((6, HEIGHT // 2), line, fill=40, font=face, anchor="lm")
    noise = np.random.default_rng(len(line)).normal(0, 8, (HEIGHT, WIDTH))
    return torch.from_numpy(np.clip(np.array(image) + noise, 0, 255)[None] / 127.5 - 1).float()
