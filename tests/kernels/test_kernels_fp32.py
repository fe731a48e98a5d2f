"""The prepacked float32 form computes what the eager network does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from modelopt_cli.kernels.fp32 import Prepacked, prepack
from modelopt_cli.kernels.packed_layers import PackedConvolution, PackedLinear
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture


def with_statistics(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape  # type: ignore[union-attr]
            module.running_mean.copy_(torch.randn(shape, generator=g) * 0.1)  # type: ignore[union-attr]
            module.running_var.copy_(torch.rand(shape, generator=g) + 0.5)  # type: ignore[union-attr]
            module.weight.data.copy_(torch.rand(shape, generator=g) + 0.5)
            module.bias.data.copy_(torch.randn(shape, generator=g) * 0.1)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = with_statistics(models.get_model(name))
    program = capture(model, InputSpec((3, 64, 64)), verify=False)
    before = {k: v.clone() for k, v in program.state_dict().items()}
    fast = prepack(program)
    with torch.inference_mode():
        for batch in (2, 1):
            x = torch.randn(batch, 3, 64, 64)
            expected = model(x)
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(v, before[k]) for k, v in program.state_dict().items())


class _Branches(nn.Module):
    """Residuals, broadcasting and every activation."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.activation, self.fc = activation, nn.Linear(8, 5)
        self.last: nn.Module = type(activation)()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.activation(self.a(x))
        y = torch.relu(self.b(y) + x)
        y = y + self.activation(self.gate(self.pool(y)) + y)
        result: Tensor = self.last(self.fc(y.mean((2, 3))))
        return result


ACTIVATIONS: list[Any] = [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fusion(activation: Any) -> None:
    torch.manual_seed(1)
    model = _Branches(activation()).eval()
    program = capture(model, InputSpec((3, 10, 12)))
    x = torch.randn(2, 3, 10, 12)
    with torch.inference_mode():
        torch.testing.assert_close(prepack(program)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_shared_addition_operand_is_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return (self.b(y) + y) * y

    model = Twice().eval()
    x = torch.randn(1, 3, 6, 6)
    with torch.inference_mode():
        fast = prepack(capture(model, InputSpec((3, 6, 6))))
        torch.testing.assert_close(fast(x), model(x))


def test_a_layer_whose_weight_is_read_besides_is_not_packed() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3)) + self.conv.bias
            result: Tensor = self.fc(y) / self.fc.weight.norm(dim=1)
            return result

    torch.manual_seed(0)
    model = Cosine().eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.inference_mode():
        torch.testing.assert_close(prepack(capture(model, InputSpec((3, 6, 6))))(x), model(x))


def test_layers_are_packed() -> None:
    program = capture(with_statistics(models.resnet18()), InputSpec((3, 64, 64)), verify=False)
    fast = prepack(program)
    assert isinstance(fast, Prepacked)
    fused = fast.program
    kinds = [type(fused.get_submodule(n.target)) for n in fused.graph.nodes if n.op == "call_module"]
    assert kinds.count(PackedConvolution) == 20
    assert kinds.count(PackedLinear) == 1
    assert nn.ReLU not in kinds
    assert nn.BatchNorm2d not in kinds


class _Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv3d(3, 8, 3, (1, 2, 2), 1), nn.Conv3d(8, 8, 3, padding=1)
        self.valid, self.norm = nn.Conv3d(8, 4, (1, 3, 3), padding="valid"), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        return torch.nn.functional.silu(self.norm(self.valid(x)))


def test_volumes_are_packed() -> None:
    torch.manual_seed(0)
    model = _Volumes().eval()
    fast = prepack(capture(model, InputSpec((3, 4, 12, 12)), verify=False))
    assert isinstance(fast, Prepacked)
    assert sum(isinstance(m, PackedConvolution) for m in fast.program.modules()) == 3
    with torch.inference_mode():
        for batch in (2, 1):
            x = torch.randn(batch, 3, 4, 12, 12)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class _Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv1d(3, 8, 5, 2, 2), nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.valid, self.norm = nn.Conv1d(8, 4, 3, padding="valid", groups=2), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        return torch.nn.functional.silu(self.norm(self.valid(x)))


def test_rows_are_packed() -> None:
    torch.manual_seed(0)
    model = _Rows().eval()
    fast = prepack(capture(model, InputSpec((3, 40)), verify=False))
    assert isinstance(fast, Prepacked)
    assert sum(isinstance(m, PackedConvolution) for m in fast.program.modules()) == 3
    with torch.inference_mode():
        for batch in (2, 1):
            x = torch.randn(batch, 3, 40)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
