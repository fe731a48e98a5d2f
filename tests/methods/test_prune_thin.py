"""Layers of which pruning leaves far less than of the network."""

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.measure.coverage import coverage
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.summary import PrunedLayer, summary, thin_notes
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture


def layer(name: str, shape: tuple[int, int], left: tuple[int, int], kind: str = "Linear") -> PrunedLayer:
    return PrunedLayer(name, kind, shape[0] * shape[1], left[0] * left[1], shape, left, "")


WHOLE = layer("whole", (1000, 1000), (1000, 1000))


@pytest.mark.parametrize(
    ("thin", "said"),
    [
        pytest.param(layer("fc", (64, 368), (64, 8)), "8 of 368 inputs of fc", id="inputs"),
        pytest.param(layer("fc", (368, 64), (8, 64)), "8 of 368 outputs of fc", id="outputs"),
        pytest.param(
            layer("up", (368, 64), (8, 64), "ConvTranspose2d"), "8 of 368 inputs of up", id="transposed"
        ),
        pytest.param(layer("fc", (64, 64), (16, 16)), "256 of 4,096 weights of fc", id="both sides a little"),
        pytest.param(
            PrunedLayer("fc", "Linear", 4096, 12, (64, 64), (64, 64), ""),
            "12 of 4,096 weights of fc",
            id="zeros",
        ),
    ],
)
def test_a_layer_that_kept_next_to_nothing_is_named(thin: PrunedLayer, said: str) -> None:
    (note,) = thin_notes([WHOLE, thin], None)
    assert note.startswith(f"warning: only {said}, where ")


@pytest.mark.parametrize(
    "fine",
    [
        pytest.param(layer("fc", (64, 368), (64, 40)), id="over a tenth"),
        pytest.param(PrunedLayer("block", "removed", 64, 0, (8, 8), None, ""), id="gone on purpose"),
        pytest.param(layer("conv", (64, 1), (60, 1)), id="depthwise"),
    ],
)
def test_other_layers_are_not(fine: PrunedLayer) -> None:
    assert thin_notes([WHOLE, fine], None) == ()


def test_a_network_pruned_hard_as_a_whole_has_no_thin_layers() -> None:
    assert thin_notes([layer(str(i), (100, 100), (10, 10)) for i in range(4)], None) == ()


def test_many_are_counted() -> None:
    (note,) = thin_notes([WHOLE, *(layer(f"fc{i}", (64, 368), (64, 8)) for i in range(5))], None)
    assert "8 of 368 inputs of fc2 and 2 more layers, where the network keeps 90 %" in note


def test_nothing_to_count_is_nothing_to_say() -> None:
    assert thin_notes([], None) == ()


class Uneven(nn.Module):
    """A hidden layer in which nearly all weights are a thousandth of the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.hidden, self.last = nn.Linear(64, 512), nn.Linear(512, 240), nn.Linear(240, 4)
        with torch.no_grad():
            for tensor in (self.hidden.weight, self.hidden.bias, self.last.weight.T):
                tensor[8:] *= 0.001

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.hidden(torch.relu(self.first(x)))))


def test_global_allocation_starves_a_layer_of_small_weights() -> None:
    given = capture(Uneven().eval(), InputSpec((64,)))
    before = dict(given.state_dict())
    result = apply(given, PruneConfig(sparsity=0.31), Context())
    layers = summary(before, result.program.state_dict(), coverage(result.program))
    assert [layer.shape_left for layer in layers] == [(512, 64), (8, 512), (4, 8)]
    (note,) = thin_notes(layers, result.target)
    assert "8 of 240 outputs of hidden, 8 of 240 inputs of last, where the network keeps 69 %" in note
