"""int8 networks under ``torch.compile``: the layers keep their kernels, and the outputs stay the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelopt_cli as mo

X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """Plain and depthwise convolutions, a fused and an unfused sum, both kinds of pooling, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.AvgPool2d(4)
        self.fc = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.depthwise(x))
        return self.fc(self.pool(x + F.max_pool2d(x, 3, 1, 1)).flatten(1))


def plain():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


CASES = [(plain, "int8"), (Residual, "int8"), (plain, "int8-dynamic")]


def quantized(make, scheme):
    torch.manual_seed(0)
    data = {"calibration": [X]} if scheme == "int8" else {"example_inputs": X}
    return mo.quantize(make().eval(), scheme=scheme, **data).program


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "scheme"), CASES[1:])
def test_compiled_parts_hold_no_operators_of_int8_kernels(make, scheme):
    program, called = quantized(make, scheme), []

    def record(part, _):
        called.extend(str(node.target) for node in part.graph.nodes if node.op == "call_function")
        return part.forward

    with torch.no_grad():
        expected = program(X)
        assert torch.equal(torch.compile(program, backend=record)(X), expected)
    assert called
    assert not [name for name in called if "onednn" in name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "scheme"), CASES)
def test_inductor_computes_the_outputs_of_the_program(make, scheme):
    program = quantized(make, scheme)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(program)(X), program(X), rtol=1e-5, atol=1e-6)


def test_one_graph_of_an_int8_network_is_refused_with_the_reason():
    program = quantized(plain, "int8")
    with (
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="int8 layers run their own kernels"),
    ):
        torch.compile(program, backend="eager", fullgraph=True)(X)
