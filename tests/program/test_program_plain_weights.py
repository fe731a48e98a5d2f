"""Weights that are computed at each call become plain parameters, and the network stays as it was."""

from collections.abc import Callable

import pytest
import torch
from export_networks import Symmetric
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture

SHAPE = (3, 8, 8)
LAYERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": weight_norm,
    "weight_norm of the whole": lambda layer: weight_norm(layer, dim=None),
    "spectral_norm": spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "a parametrization of one's own": lambda layer: parametrize.register_parametrization(
        layer, "weight", Symmetric()
    ),
    "a pruning mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "two masks": lambda layer: prune.random_unstructured(
        prune.l1_unstructured(layer, "bias", 1), "weight", 3
    ),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", LAYERS.values(), ids=LAYERS)
def test_layer(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.ReLU())
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind, hooks = type(model[0]), len(model[0]._forward_pre_hooks)
    program = capture(model, InputSpec(SHAPE))
    x = torch.randn(4, *SHAPE)
    assert torch.equal(program(x), model(x))
    assert list(dict(program.named_parameters())) == ["0.weight", "0.bias"]
    assert torch.equal(program.get_submodule("0").weight, model[0].weight)
    assert (type(model[0]), len(model[0]._forward_pre_hooks)) == (kind, hooks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_layers_share_their_tensors_still() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 2, 1))
    program = capture(model, InputSpec(SHAPE))
    assert program.get_submodule("1").weight is model[1].weight
    assert program.get_submodule("0").bias is model[0].bias


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_recurrent_weight() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = weight_norm(nn.LSTM(4, 5, batch_first=True), "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lstm(x)[0]
            return out

    model = Rows().eval()
    program, x = capture(model, InputSpec((6, 4))), torch.randn(3, 6, 4)
    assert torch.equal(program(x), model(x))
    assert set(program.state_dict()) == {
        f"lstm.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
