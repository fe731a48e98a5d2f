"""Shapes of layers that are known without asking torch are those that torch gives."""

import pytest
import torch
from torch import Tensor, fx, nn

from modelopt_cli.program.shapes import infer

LAYERS = {
    **{
        kind.__name__: (kind(), torch.rand(2, 4, 5, 3))
        for kind in (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
            *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
        )
    },
    "batch norm": (nn.BatchNorm2d(4), torch.rand(2, 4, 5, 3)),
    "batch norm of rows": (nn.BatchNorm1d(4), torch.rand(2, 4, 5)),
    "batch norm of vectors": (nn.BatchNorm1d(4), torch.rand(2, 4)),
    "batch norm of volumes": (nn.BatchNorm3d(4, affine=False), torch.rand(2, 4, 2, 5, 3)),
    "batch norm without statistics": (
        nn.BatchNorm2d(4, track_running_stats=False), torch.rand(2, 4, 5, 3)
    ),
    "doubles": (nn.BatchNorm2d(4).double(), torch.rand(2, 4, 5, 3).double()),
    "statistics of another type": (nn.BatchNorm2d(4), torch.rand(2, 4, 5, 3).bfloat16()),
    "channels last": (nn.BatchNorm2d(4), torch.rand(2, 5, 3, 4).permute(0, 3, 1, 2)),
    "transposed": (nn.ReLU(), torch.rand(2, 3, 5).mT),
    "sliced": (nn.ReLU(), torch.rand(2, 4, 5)[:, 1:3]),
    "whole numbers": (nn.ReLU(), torch.ones(2, 3, dtype=torch.int64)),
}  # fmt: skip


def inferred(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A graph's input and what a layer makes of it, as ``infer`` says."""
    root = nn.Sequential(layer).eval()
    traced = fx.symbolic_trace(root)
    values = [*infer(traced.graph, traced, _on_meta(x)).values()]
    return values[0], values[1]


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@pytest.mark.parametrize("name", LAYERS)
def test_is_as_torch_computes_it(name: str) -> None:
    layer, x = LAYERS[name]
    with torch.no_grad():
        expected = layer.eval()(x)
    given, found = inferred(layer, x)
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert found is not given


def test_a_layer_that_changes_its_input_returns_it() -> None:
    given, found = inferred(nn.ReLU(inplace=True), torch.rand(2, 3))
    assert found is given


def test_an_input_that_does_not_fit_is_torchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="running_mean"):
        inferred(nn.BatchNorm2d(4), torch.rand(2, 5, 3, 3))
