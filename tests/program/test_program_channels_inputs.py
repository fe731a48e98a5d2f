"""Channels of networks with several inputs, and with outputs of any form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channels_oracle import masked, prune_ours
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from modelopt_cli import artifact
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture

LAST = "feeds the network's output"


class Pyramid(nn.Module):
    """Lin et al., CVPR 2017, with heads that all levels share."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.fine, self.coarse = nn.Conv2d(8, 10, 1), nn.Conv2d(12, 10, 1)
        self.head, self.classes, self.boxes = nn.Conv2d(10, 14, 3), nn.Conv2d(14, 6, 1), nn.Conv2d(14, 4, 1)
        self.heads = heads

    def forward(self, x: Tensor) -> Any:
        a = F.relu(self.a(x))
        coarse = self.coarse(F.relu(self.b(a)))
        levels = [self.fine(a) + F.interpolate(coarse, size=a.shape[-2:]), coarse]
        if not self.heads:
            return levels
        features = [F.relu(self.head(level)) for level in levels]
        boxes = [self.boxes(feature) for feature in features]
        return {"classes": [self.classes(feature) for feature in features], "boxes": boxes, "masks": None}


class Streaming(nn.Module):
    """Takes a state and returns the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(5, 8), nn.LSTMCell(8, 12), nn.Linear(12, 6)
        self.fc = nn.Linear(6, 1)

    def forward(self, x: Tensor, hidden: Tensor, cells: Tensor) -> Any:
        hidden, cells = self.cell(F.relu(self.a(x)), (hidden, cells))
        return self.fc(F.relu(self.b(hidden))), hidden, cells


class Two(nn.Module):
    """An image, and numbers that scale its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, numbers: Tensor) -> Any:
        scaled = F.relu(self.a(image)) * torch.sigmoid(self.b(numbers))[:, :, None, None]
        return {"logits": self.fc(scaled.mean((2, 3)))}


@dataclass(frozen=True)
class Form:
    """A network, its inputs, and by hand: units of each group, and layers that stay whole."""

    model: nn.Module
    shapes: dict[str, tuple[int, ...]]
    groups: dict[str, int]
    frozen: dict[str, str]


IMAGE = (3, 32, 32)
FORMS = {
    "a pyramid's heads": Form(
        Pyramid(True),
        {"x": IMAGE},
        {"a": 8, "b": 12, "coarse": 10, "head": 14},
        {"classes": LAST, "boxes": LAST},
    ),
    "a list of maps": Form(Pyramid(False), {"x": IMAGE}, {"a": 8, "b": 12}, {"coarse": LAST, "fine": LAST}),
    "a state in and out": Form(
        Streaming(),
        {"x": (5,), "hidden": (12,), "cells": (12,)},
        {"a": 8, "b": 6},
        {"cell": "has a first state that no layer makes", "fc": LAST},
    ),
    "two inputs": Form(Two(), {"image": IMAGE, "numbers": (5,)}, {"a": 8}, {"fc": LAST}),
}


def shapes_of(outputs: Any) -> Any:
    return tree_map(lambda value: value.shape if isinstance(value, Tensor) else value, outputs)


@pytest.mark.parametrize("name", FORMS)
def test_without_some_channels_it_computes_the_zeroed_network(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    first, *others = (InputSpec(shape, name=key) for key, shape in form.shapes.items())
    spec = InputSpec(first.shape, name=first.name, others=tuple(others))
    pruned, found, keep = prune_ours(capture(form.model.double().eval(), spec, verify=False), 0.4)
    assert {group.name: group.units for group in found.groups} == form.groups
    assert found.frozen == form.frozen
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, *s, dtype=torch.float64, generator=generator) for s in form.shapes.values()]
    artifact.write_program(pruned, tmp_path / "net.safetensors")
    again = artifact.read_program(tmp_path / "net.safetensors")
    with torch.no_grad():
        result, expected = pruned(*inputs), masked(found, keep)(*inputs)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(again(*inputs), result, rtol=0, atol=0)
        assert shapes_of(result) == shapes_of(form.model(*inputs))
