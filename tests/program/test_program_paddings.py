"""Padding outside the convolutions: the same values, and int8 for layers that pad in special ways."""

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.paddings import explicit_padding

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


class Special(nn.Module):
    """Uneven, reflecting and repeating padding; one layer is called twice, one pads with zeros all round."""

    def __init__(self) -> None:
        super().__init__()
        self.uneven = nn.Conv1d(4, 8, 4, padding="same")
        self.mirror = nn.Conv1d(8, 8, 5, padding=2, padding_mode="reflect")
        self.around = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular", dilation=1)
        self.even = nn.Conv1d(8, 8, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.mirror(self.mirror(self.uneven(x).relu()).relu())
        return self.even(self.around(x))


def captured() -> Program:
    torch.manual_seed(0)
    return capture(Special().eval(), InputSpec((4, 16)))


def test_values_and_tensors_are_the_same() -> None:
    program = captured()
    moved = explicit_padding(program)
    x = torch.randn(3, 4, 16)
    assert torch.equal(moved(x), program(x))
    assert moved.get_parameter("mirror.weight") is program.get_parameter("mirror.weight")
    layers = {name: moved.get_submodule(name).padding for name in ("uneven", "mirror", "around", "even")}
    assert layers == {"uneven": (0,), "mirror": (0,), "around": (0,), "even": "same"}
    pads = [node for node in moved.graph.nodes if node.target is torch.nn.functional.pad]
    assert len(pads) == 4
    assert program.get_submodule("mirror").padding == (2,)


def test_what_pads_with_zeros_all_round_stays_as_it_is() -> None:
    program = capture(nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU()).eval(), InputSpec((4, 16)))
    assert explicit_padding(program) is program
