"""Equalisation of channels: the float network stays what it computes, and int8 loses less."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from quantize_networks import Images, captured, sqnr
from torch import Tensor, nn

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.equalizing.channel_links import find_links
from modelopt_cli.methods.quantize.equalizing.equalizations import EQUALIZATIONS
from modelopt_cli.methods.quantize.equalizing.equalize import equalized
from modelopt_cli.methods.quantize.widths import INT8
from modelopt_cli.program import Program

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


RULES = [name for name in EQUALIZATIONS if name != "none"]


class Bottlenecks(nn.Module):
    """Blocks of a MobileNet around a residual, whose channels have very different sizes."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.activation = activation
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)
        sizes = torch.logspace(-1.5, 0.5, 16)
        with torch.no_grad():
            for layer in (self.stem, self.expand, self.depthwise, self.project):
                spread = sizes[:: 16 // layer.out_channels].roll(layer.in_channels)
                layer.weight.mul_(spread.view(-1, 1, 1, 1))
                layer.bias.mul_(spread)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        x = x + self.project(self.activation(self.depthwise(self.activation(self.expand(x)))))
        x = F.adaptive_avg_pool2d(self.activation(self.grouped(F.max_pool2d(x, 2))), 1)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def made(model: nn.Module, *shape: int) -> tuple[Program, Tensor, Tensor]:
    """A network, what it is calibrated on and other inputs."""
    seen, x = torch.randn(2, 32, *shape, generator=torch.Generator().manual_seed(0))
    return captured(model, *shape), seen, x


def scaled(program: Program, seen: Tensor, rule: str, shared: tuple[str, ...] = ()) -> Program:
    layers = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
    context = Context(data=Images(seen))  # type: ignore[arg-type]
    return equalized(program, dict.fromkeys(layers, INT8), shared, QuantizeConfig(equalize=rule), context)


def bottlenecks(activation: Callable[[Tensor], Tensor] = torch.relu) -> tuple[Program, Tensor, Tensor]:
    torch.manual_seed(0)
    return made(Bottlenecks(activation), 3, 8, 8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", [torch.relu, F.leaky_relu, lambda x: x], ids=["relu", "leaky", "none"])
def test_the_float_network_computes_the_same(rule, activation):
    program, seen, x = bottlenecks(activation)
    changed = scaled(program, seen, rule)
    assert not torch.equal(changed.state_dict()["expand.weight"], program.state_dict()["expand.weight"])
    torch.testing.assert_close(changed(x), program(x), rtol=1e-4, atol=1e-5)


def test_relu6_clips_nothing_that_calibration_showed():
    program, seen, x = bottlenecks(F.relu6)
    changed = scaled(program, seen, "outputs")
    assert not torch.equal(changed.state_dict()["expand.weight"], program.state_dict()["expand.weight"])
    torch.testing.assert_close(changed(seen), program(seen), rtol=1e-4, atol=1e-5)
    assert sqnr(program(x), changed(x)) > 40  # beyond what was seen a value may be clipped, as by its range


def test_weights_follow_the_formula_of_the_paper():
    first, second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1)
    program, seen, _ = made(nn.Sequential(first, nn.ReLU(), second), 2, 4, 4)
    changed = scaled(program, seen, "weights").state_dict()
    rows, columns = first.weight.abs().amax((1, 2, 3)), second.weight.abs().amax((0, 2, 3))
    s = (rows * columns).sqrt() / columns
    torch.testing.assert_close(changed["0.weight"], first.weight / s.view(-1, 1, 1, 1))
    torch.testing.assert_close(changed["0.bias"], first.bias / s)
    torch.testing.assert_close(changed["2.weight"], second.weight * s.view(1, -1, 1, 1))
    assert torch.equal(changed["2.bias"], second.bias)


def test_weights_leave_what_relu6_clips():
    program, seen, _ = bottlenecks(F.relu6)
    changed, before = scaled(program, seen, "weights").state_dict(), program.state_dict()
    assert torch.equal(changed["depthwise.weight"], before["depthwise.weight"])


@pytest.mark.parametrize("activation", [torch.relu, F.relu6], ids=["relu", "relu6"])
def test_int8_loses_less(activation):
    program, seen, x = bottlenecks(activation)

    def quality(rule: str) -> float:
        config, context = QuantizeConfig(equalize=rule), Context(data=Images(seen))
        return sqnr(program(x), apply(program, config, context).program(x))  # type: ignore[arg-type]

    assert quality("outputs") > quality("none") + 1.5


def test_a_channel_a_thousand_times_as_large_is_repaired():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        network[0].weight[0].mul_(1000)
        network[0].bias[0].mul_(1000)
        network[2].weight[:, 0].div_(1000)
    program, seen, x = made(network, 3, 8, 8)
    found = {}
    for rule in EQUALIZATIONS:
        context = Context(data=Images(seen))  # type: ignore[arg-type]
        found[rule] = sqnr(program(x), apply(program, QuantizeConfig(equalize=rule), context).program(x))
    assert found["none"] < 15
    assert min(found["weights"], found["outputs"]) > 30


def test_zeros_stay_and_shared_layers_are_left_alone():
    program, seen, _ = bottlenecks()
    weight = program.state_dict()["expand.weight"]
    weight[::3], weight[:, 2] = 0, 0
    changed = scaled(program, seen, "outputs", shared=("project.weight",)).state_dict()
    assert torch.equal(changed["expand.weight"] == 0, weight == 0)
    assert torch.equal(changed["project.weight"], program.state_dict()["project.weight"])


class Square(nn.Module):
    """As many channels as rows of pixels, so that their shapes say nothing."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.first, self.second = read, nn.Conv2d(3, 6, 3, padding=1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.read(torch.relu(self.first(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("read", "linked"),
    [
        (lambda x: x.mean(3), True),
        (lambda x: x.mean(1), False),
        (lambda x: x.mean(-3), False),
        (lambda x: x.transpose(1, 2).mean(3), False),
        (lambda x: torch.sigmoid(x).mean(3), False),
        (lambda x: (x + 1).mean(3), False),
        (lambda x: (x + x.mean(3, keepdim=True)).mean(3), False),
    ],
    ids=[
        "mean over columns",
        "over channels",
        "from the end",
        "transposed",
        "sigmoid",
        "plus 1",
        "broadcast",
    ],
)
def test_only_operations_that_scale_link_layers(read, linked):
    program, _, _ = made(Square(read), 3, 6, 6)
    assert bool(find_links(program)) is linked


def test_inputs_and_outputs_of_the_network_stay():
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return y, self.second(y)

    program, _, _ = made(Returned(), 3, 4, 4)
    assert find_links(program) == []
