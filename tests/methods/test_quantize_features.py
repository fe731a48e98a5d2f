"""Static int8 of linear layers whose features have very different sizes: factors bring them to one size."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantize_networks import Images, captured, count, sqnr
from torch import Tensor, nn

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.kernels import prepare
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.equalizing.feature_scales import (
    FeatureRange,
    feature_factors,
    with_factors,
)
from modelopt_cli.program import Program

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = torch.logspace(0, 3, 12)


class Sums(nn.Module):
    """Reads sums in the hundreds and counts below ten, which matter equally."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 3)
        with torch.no_grad():
            self.up.weight.div_(SIZES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times - 1):
            x = self.up(x) - x
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Joins a branch of values in the hundreds with one of values near one."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(32, 3)
        with torch.no_grad():
            self.large.weight.mul_(200)
            self.down.weight[:, :16].div_(200)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([torch.relu(self.large(x)), torch.relu(self.small(x))], 1))  # type: ignore[no-any-return]


def made(model: nn.Module, sizes: Tensor) -> tuple[Program, Program, Tensor, Tensor]:
    """The network, its int8 form, what that was calibrated on and what to compare them on."""
    seen, x = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(0)) * sizes
    program = captured(model, 12)
    int8 = apply(program, QuantizeConfig(), Context(data=Images(seen))).program  # type: ignore[arg-type]
    return program, int8, seen, x


def rounded(model: nn.Module, x: Tensor, by_feature: bool) -> Tensor:
    """Outputs of plain torch: inputs of layers rounded to 8 bits, with a step for each feature or for all."""
    model = copy.deepcopy(model)
    step: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        step[layer] = (args[0].abs().amax(0) if by_feature else args[0].abs().max()) * 2 / 255

    def round_(layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        some = step[layer].clamp(min=1e-9)
        return (args[0] / some).round().clamp(-128, 127) * some

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    watching = [layer.register_forward_pre_hook(watch) for layer in layers]
    model(x)
    for handle in watching:
        handle.remove()
    for layer in layers:
        layer.register_forward_pre_hook(round_)
    return model(x)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "sizes"), [(Sums, SIZES), (Branches, torch.ones(12))])
def test_as_good_as_a_step_for_each_feature(kind: type[nn.Module], sizes: Tensor) -> None:
    torch.manual_seed(0)
    model = kind()
    program, int8, x, _ = made(model, sizes)
    one, each = (sqnr(model(x), rounded(model, x, by_feature)) for by_feature in (False, True))
    assert one < 20 < 30 < each  # one step for all of them loses them
    assert count(int8, "QuantizedMul") == 1
    assert sqnr(program(x), int8(x)) > 35  # weights are rounded, too


@torch.no_grad()
def test_read_from_its_file_it_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, int8, _, x = made(Sums(), SIZES)
    write_program(int8, tmp_path / "net.safetensors")
    again = prepare(read_program(tmp_path / "net.safetensors"))
    assert torch.equal(prepare(int8)(x), again(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "sizes"),
    [(Sums(), torch.ones(12)), (Sums(times=2), SIZES.sqrt())],
    ids=["features of one size", "a layer that is called twice"],
)
def test_left_as_it_is(model: nn.Module, sizes: Tensor) -> None:
    if model.times == 1:
        model.up.weight.mul_(SIZES)
    _, int8, _, _ = made(model, sizes)
    assert count(int8, "QuantizedMul") == 0
    assert not int8.graph.find_nodes(op="get_attr")


@torch.no_grad()
def test_the_float_network_computes_the_same_to_the_last_bit() -> None:
    torch.manual_seed(0)
    program = captured(Sums(), 12)
    x = torch.randn(64, 12) * SIZES
    (value,) = program.graph.find_nodes(op="placeholder")
    factor = 2.0 ** -torch.arange(12)
    divided = with_factors(program, {value: ["up"]}, {value: factor})
    assert torch.equal(divided.get_submodule("up").weight, program.up.weight * factor)
    assert torch.equal(divided(x), program(x))


@torch.no_grad()
def test_factors_are_powers_of_two_and_what_was_zero_keeps_its_size() -> None:
    torch.manual_seed(0)
    seen, x = FeatureRange(), torch.randn(64, 12) * SIZES
    x[:, 5] = 0
    seen.update(x[:40])
    seen.update(x[40:])
    assert torch.equal(seen.high.float(), x.amax(0).clamp(min=0))
    torch.testing.assert_close(seen.squares, x.double().square().sum(0))
    factor = feature_factors(seen, [Sums().up])
    assert factor is not None
    assert torch.equal(factor.log2(), factor.log2().round())
    assert factor[5] == factor[-1] == 1 > factor[0]


class Block(nn.Module):
    """A norm whose output features are of very different sizes, and the layers that read it."""

    def __init__(self, kind: type[nn.Module], residual: bool, functional: bool) -> None:
        super().__init__()
        self.norm, self.residual, self.functional = kind(12), residual, functional
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)
        with torch.no_grad():
            self.norm.weight.copy_(SIZES)  # type: ignore[arg-type, operator]
            self.q.weight.div_(SIZES)
            self.k.weight.div_(SIZES)

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            own = {name: getattr(self.norm, name) for name in ("weight", "bias") if hasattr(self.norm, name)}
            compute = F.layer_norm if "bias" in own else F.rms_norm
            y = compute(x, (12,), **own, eps=1e-5)
        else:
            y = self.norm(x)
        both = self.q(y) + self.k(y).relu()
        return both + y if self.residual else both  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("functional", [False, True], ids=["layer", "function"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_takes_factors_in(kind: type[nn.Module], functional: bool) -> None:
    torch.manual_seed(0)
    model = Block(kind, False, functional)
    program, int8, x, _ = made(model, torch.ones(12))
    one, each = (sqnr(model(x), rounded(model, x, by_feature)) for by_feature in (False, True))
    assert one < 20 < 30 < each
    assert sqnr(program(x), int8(x)) > 35
    assert count(int8, "QuantizedMul") == 0
    ratio = model.norm.weight / int8.get_submodule("norm").weight
    assert torch.equal(ratio.log2(), ratio.log2().round())
    assert ratio[0] < ratio[-1] == 1


@torch.no_grad()
def test_a_norm_that_others_read_stays() -> None:
    torch.manual_seed(0)
    program, int8, x, _ = made(Block(nn.LayerNorm, True, False), torch.ones(12))
    assert count(int8, "QuantizedMul") == 1
    assert torch.equal(int8.get_submodule("norm").weight, program.norm.weight)  # type: ignore[arg-type]
    assert sqnr(program(x), int8(x)) > 35
