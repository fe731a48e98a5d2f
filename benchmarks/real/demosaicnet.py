"""Colour images from a camera's mosaic (Gharbi et al., SIGGRAPH Asia 2016), and photographs."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.real import ASSETS, source

SIDE = 126
MOSAICS = {
    "bayer": ("GR", "BG"),
    "xtrans": ("GBGGRG", "RGRBGB", "GBGGRG", "GRGGBG", "BGBRGR", "GRGGBG"),
}
"""Colours that a camera sees, pixel by pixel."""


def bayer() -> nn.Module:
    """For mosaics of Bayer's pattern, ``(N, 3, H, W)``; loses a border."""
    return _networks().BayerDemosaick(pretrained=False)


def xtrans() -> nn.Module:
    """For mosaics of Fuji's X-Trans pattern, ``(N, 3, H, W)``; loses a border."""
    return _networks().XTransDemosaick(pretrained=False)


def _networks():
    return source("demosaicnet.modules", pkg_resources={"resource_filename": lambda *place: None})


def data(pattern: str, test: bool = True) -> TensorDataset:
    """Mosaics and what they are of: tiles of photographs, of other ones for calibration than for the test."""
    return _mosaics(pattern, torch.cat([_tiles(name, 6) for name in (TEST if test else OTHERS)]))


def training(pattern: str) -> TensorDataset:
    """More tiles of the photographs for calibration."""
    return _mosaics(pattern, torch.cat([_tiles(name, 30) for name in OTHERS]))


def _mosaics(pattern: str, tiles: Tensor) -> TensorDataset:
    return TensorDataset(tiles * _mask(pattern), tiles)


TEST = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
OTHERS = ("motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg")


def _tiles(name: str, most: int) -> Tensor:
    """Squares without overlap, ``(N, 3, 126, 126)`` from 0 to 1, at most so many."""
    with Image.open(ASSETS / "pictures" / name) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    rows = pixels.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)
    tiles = rows.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIDE, SIDE)
    return tiles[:: -(-len(tiles) // most)]


def _mask(pattern: str) -> Tensor:
    """1 where a pixel has that colour, ``(3, 126, 126)``."""
    colours = np.array(list("RGB")).reshape(3, 1, 1)
    cell = np.array([list(row) for row in MOSAICS[pattern]]) == colours
    repeats = SIDE // cell.shape[1]
    return torch.from_numpy(np.tile(cell, (1, repeats, repeats))).float()
