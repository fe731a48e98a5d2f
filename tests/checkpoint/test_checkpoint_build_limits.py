"""Networks whose sizes come from a file are built only as far as its weights could fill them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.checkpoint.build_limits import build_within, check_counts
from modelopt_cli.checkpoint.folder import fields_with
from modelopt_cli.errors import ArchitectureError


def build(make: Callable[[], nn.Module], weights: nn.Module) -> nn.Module:
    return build_within(Architecture("own", make, None, bounded=True), weights.state_dict(), "here")


def tied(count: int) -> nn.Sequential:
    """Layers that are made one by one, and share the weights of the first."""
    layers = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(count)))
    for layer in layers:
        layer.weight, layer.bias = layers[0].weight, layers[0].bias
    return layers


def test_tied_weights_and_weights_that_depend_on_values_are_built() -> None:
    def by_value() -> nn.Module:
        return nn.Linear(3, int(torch.tensor(4).item()))  # not on the meta device

    assert len(build(lambda: tied(5), tied(1))) == 5  # type: ignore[arg-type]
    assert build(by_value, nn.Linear(3, 4)).weight.device.type == "cpu"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(1 << 40)),
            "at least 1,033 weights, and the file has 2",
        ),
        (lambda: nn.Linear(1 << 40, 1 << 20), "parameters, and the file has 16"),
        (lambda: nn.Linear(1 << 20, 1 << 10), "parameters, and the file has 16"),
    ],
    ids=["layers", "beyond memory", "large"],
)
def test_what_no_file_could_fill_is_given_up(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ArchitectureError, match=said):
        build(make, nn.Linear(3, 4))
    nn.ModuleList(nn.Linear(1, 1) for _ in range(1100))  # the limit ends with the building


def test_counts_of_parts_are_checked() -> None:
    with pytest.raises(ArchitectureError, match="says num_layers -2"):
        check_counts({"parts": [{"text_config": {"num_layers": -2}}]}, "here")
    check_counts({"num_layers": 0, "n_layer": 20_000, "vision_feature_layer": -2, "num_labels": True}, "here")


def test_fields_with_a_text() -> None:
    data = {"a": "x", "part": {"b": "x", "c": "y"}, "d": ["x"]}
    assert list(fields_with(data, "x")) == ["a", "part.b"]
