"""Layers on their way through a network: errors of their outputs, against running them."""

import copy

import pytest
import torch
from prune_cases import LAYERS, captured, context, net, one, smooth
from torch import Tensor, nn

from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import evaluation_copy
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.share.compensation import calibrated_layers, set_values, watchable

SAMPLES = 12


def samples(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(3)) + 0.5


def channels_first(outputs: Tensor, channel: int) -> Tensor:
    return outputs.double().movedim(channel, 0).flatten(1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", LAYERS)
def test_error_and_shift_are_those_of_the_outputs(case: str, bias: bool) -> None:
    program, x = one(case), samples(*LAYERS[case][1])
    module = program.get_submodule("layer")
    if not bias:
        module.bias = None
    (layer,) = calibrated_layers(evaluation_copy(program, "cpu"), ["layer.weight"], context(x), SAMPLES)
    change = 0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(4))
    moved = copy.deepcopy(program)
    moved.get_parameter("layer.weight").data.add_(change)
    channel = -1 if isinstance(module, nn.Linear) else 1
    with torch.no_grad():
        differences = channels_first(moved(x) - program(x), channel)
    means = differences.mean(1, keepdim=True)
    expected = (differences - means if bias else differences).square().sum()
    assert layer.error(change) == pytest.approx(float(expected), rel=1e-4)
    shift = layer.bias_shift(change)
    assert (shift is None) == (not bias)
    if shift is not None:
        torch.testing.assert_close(shift, -means.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_importance_has_the_weight_s_shape_and_choosing_keeps_exact_levels(case: str) -> None:
    from modelopt_cli.methods.share.compensation import Levels

    program, x = one(case), samples(*LAYERS[case][1])
    weight = program.get_parameter("layer.weight")
    table = torch.linspace(-1, 1, 9).double()
    weight.data.copy_(table[torch.randint(9, weight.shape, generator=torch.Generator().manual_seed(5))])
    (layer,) = calibrated_layers(evaluation_copy(program, "cpu"), ["layer.weight"], context(x), SAMPLES)
    curvature = layer.curvature()
    assert layer.importance(curvature).shape == weight.shape
    assert (layer.importance(curvature) > 0).all()
    index, bias = layer.choose(curvature, Levels(table, torch.zeros(1).double()), None)
    assert torch.equal(table[index].float(), weight.detach())
    assert bias is not None
    torch.testing.assert_close(bias.flatten().float(), program.get_submodule("layer").bias.detach())


def test_layers_see_what_those_before_have_become() -> None:
    program, x = net(), smooth(8, 3, 12, 12)
    network = evaluation_copy(program, "cpu")
    names = watchable(network, weights_of(network))
    assert names == [f"{layer}.weight" for layer in ("stem", "body", "grouped", "dw", "fc")]
    found = {}
    for layer in calibrated_layers(network, names, context(x), 8):
        found[layer.parameter] = [h.clone() for h in layer.moments]
        if layer.parameter == "stem.weight":
            set_values(layer.module, torch.zeros_like(layer.module.weight), torch.ones(8))
    halved = copy.deepcopy(program)
    with torch.no_grad():
        halved.get_parameter("stem.weight").zero_()
        halved.get_parameter("stem.bias").fill_(1)
    for layer in calibrated_layers(evaluation_copy(halved, "cpu"), names[1:], context(x), 8):
        for a, b in zip(layer.moments, found[layer.parameter], strict=True):
            torch.testing.assert_close(a, b)


def test_what_cannot_be_watched_is_left_out() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mixed = nn.Embedding(7, 8), nn.Linear(8, 8)
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
            self.head.weight = self.mixed.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.mixed(self.table(x.argmax(-1)))
            out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
            return out

    program = captured(Tied(), 5, 7)
    names = list(weights_of(program))
    assert len(names) == 4
    assert watchable(program, names) == []


def test_without_data_or_samples_it_is_said() -> None:
    with pytest.raises(UsageError, match="error compensation needs data"):
        list(calibrated_layers(net(), ["fc.weight"], Context(), 8))
    with pytest.raises(DataError, match="no samples"):
        list(calibrated_layers(net(), ["fc.weight"], context(torch.zeros(0, 3, 12, 12)), 8))
    with pytest.raises(DataError, match="NaN or infinity"):
        list(calibrated_layers(net(), ["fc.weight"], context(torch.full((2, 3, 12, 12), torch.nan)), 8))
