"""Free sizes of an image network stay free whatever images it was calibrated or trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import modelopt_cli as mo


class Doubled(nn.Module):
    """Classes of pixels, from the picture next to what is half its size: sides must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.out = nn.Conv2d(11, 2, 1)

    def forward(self, picture: Tensor) -> Tensor:
        return self.out(torch.cat([picture, self.up(self.down(picture).relu()).relu()], 1))


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0)
    for folder, shape, most in (("in", (32, 32, 3), 256), ("ids", (32, 32), 2)):
        Path(folder).mkdir()
        for number in range(4):
            image = Image.fromarray(values.integers(0, most, shape, dtype=np.uint8))
            image.save(f"{folder}/{number}.png")
    return "pairs:in@ids"


def of_size(height: int, width: int) -> list[Any]:
    return [(torch.rand(2, 3, height, width), torch.randint(0, 2, (2, height, width)))]


NET = {"latency_runs": 0, "input_size": 32}
MADE = {
    "quantize": lambda net, pairs: mo.quantize(net, calibration=pairs, **NET),
    "train": lambda net, pairs: mo.train(net, train=pairs, epochs=1, batch_size=2, **NET),
    "distill": lambda net, pairs: mo.distill(
        net, student="width:0.5", train=pairs, epochs=1, batch_size=2, **NET
    ),
}


@pytest.mark.parametrize("verb", MADE)
def test_free_sizes_stay_free_with_images(verb: str, pairs: str) -> None:
    program = MADE[verb](Doubled().eval(), pairs).program
    mo.save(program, "made.safetensors")
    program = mo.load("made.safetensors")
    assert program.input.shape == (3, 32, 32)
    assert program.input.free == (1, 2)
    assert program.input.name == "picture"
    assert program.input.preprocess is not None
    assert program.input.preprocess.resize == (32, 32)
    assert program(torch.rand(2, 3, 16, 24)).shape == (2, 2, 16, 24)


def test_eval_takes_free_sizes_and_says_which_the_network_cannot(pairs: str) -> None:
    program = mo.quantize(Doubled().eval(), calibration=pairs, **NET).program
    mo.save(program, "made.safetensors")
    found = mo.evaluate("made.safetensors", data=of_size(48, 40), task="segment", latency_runs=0)
    assert found.models[0].accuracy.samples == 2
    with pytest.raises(mo.InputError) as error:
        mo.evaluate("made.safetensors", data=of_size(33, 31), task="segment", latency_runs=0)
    line = str(error.value)
    assert line.startswith(
        "made.safetensors: picture has shape (2, 3, 33, 31), a size that the network cannot"
    )
    assert line.endswith(
        "; give a multiple of 32 in dimension 2 and a multiple of 32 in dimension 3, as in (N, 3, 32, 32)"
    )
    assert "\n" not in line
