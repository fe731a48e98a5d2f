"""Step sizes that learn: their gradients against the formula of LSQ and torch's own, and who shares them."""

import math

import pytest
import torch
from quantize_networks import captured, quantized
from torch import Tensor, nn

from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.methods.quantize.learning.fake_quantize import (
    FARTHEST,
    RoundedWeight,
    StepSize,
    fake_quantize,
    multiple,
)
from modelopt_cli.methods.quantize.learning.step_groups import step_groups
from modelopt_cli.program.quantization import QParams, weight_limits


def lsq(v: float, s: float, low: int, high: int) -> tuple[float, float, float]:
    """Value, derivative by ``v`` and derivative by ``s`` (Esser et al., ICLR 2020, equations 1 to 5)."""
    ratio = v / s
    if ratio <= low:
        return low * s, 0.0, float(low)
    if ratio >= high:
        return high * s, 0.0, float(high)
    return round(ratio) * s, 1.0, -ratio + round(ratio)


@pytest.mark.parametrize("growth", [0.0, 0.3])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_of_activations_are_those_of_the_paper(bits: int, signed: bool, growth: float) -> None:
    zero_point = 2 ** (bits - 1) if signed else 0
    q = QParams(0.4, zero_point, bits)
    low, high = -zero_point, q.top - zero_point
    s = 0.4 * math.exp(growth)
    generator = torch.Generator().manual_seed(bits)
    x = (torch.rand(3, 50, generator=generator) * 1.4 - 0.2) * s * (q.top + 1) - s * zero_point
    x.requires_grad_()
    upstream = torch.randn(3, 50, generator=generator) / 2000
    learned = torch.tensor(growth, requires_grad=True)
    y = fake_quantize(x, q, learned)
    y.backward(upstream)
    values, by_x, by_s = zip(*(lsq(float(v), s, low, high) for v in x.detach().flatten()), strict=True)
    torch.testing.assert_close(y.flatten(), torch.tensor(values))
    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(by_x) * upstream.flatten())
    g = 1 / math.sqrt(50 * high)  # of one sample
    expected = g * sum(d * float(u) for d, u in zip(by_s, upstream.flatten(), strict=True))
    assert learned.grad is not None
    assert abs(expected / 0.4) < 1  # else it would be cut
    assert float(learned.grad) * 0.4 == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert 0 < sum(by_x) < len(by_x)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_of_weights_are_those_of_the_paper(bits: int) -> None:
    low, high = weight_limits(bits)
    generator = torch.Generator().manual_seed(bits)
    scale = torch.tensor([0.02, 0.3])
    weight = (
        torch.randn(2, 4, 3, 3, generator=generator) * scale.view(-1, 1, 1, 1) * high * 0.7
    ).requires_grad_()
    upstream = torch.randn(2, 4, 3, 3, generator=generator) / 500
    growth = torch.zeros(2, requires_grad=True)
    rounded = RoundedWeight.apply(weight, growth, scale, False, bits)  # type: ignore[no-untyped-call]
    rounded.backward(upstream)
    assert growth.grad is not None
    assert weight.grad is not None
    for channel, s in enumerate(scale.tolist()):
        rows = [lsq(v, s, low, high) for v in weight[channel].flatten().tolist()]
        torch.testing.assert_close(rounded[channel].flatten(), torch.tensor([row[0] for row in rows]))
        g = 1 / math.sqrt(36 * high)
        up = upstream[channel].flatten()
        expected = g * float((torch.tensor([row[2] for row in rows]) * up).sum())
        assert float(growth.grad[channel]) * s == pytest.approx(expected, rel=1e-3)
        inside = torch.tensor([row[1] for row in rows]) == 1
        assert torch.equal(weight.grad[channel].flatten()[inside], up[inside])
        # Beyond, the paper has no gradient; here what leads back has one.
        back = up * weight[channel].detach().flatten() > 0
        torch.testing.assert_close(weight.grad[channel].flatten()[~inside], (up * back)[~inside])


def test_gradients_of_step_sizes_are_those_of_torch() -> None:
    q = QParams(0.25, 3, 4)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(400, generator=generator) for _ in range(2))
    steps = (x := x * 1.5) / 0.25 + 3
    # What rounds to an end of the range from beyond is inside for torch, and outside in the paper.
    alike = (steps < -0.5) | ((steps > 0) & (steps < 15)) | (steps > 15.5)
    x, upstream = x[alike][None], upstream[alike][None] / 100
    scale, zero = torch.tensor([0.25], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    factor = 1 / math.sqrt(x.numel() * 12)
    torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, 15, factor).backward(upstream)
    growth = torch.zeros((), requires_grad=True)
    fake_quantize(x, q, growth).backward(upstream)
    assert scale.grad is not None
    assert growth.grad is not None
    assert float(growth.grad) * 0.25 == pytest.approx(float(scale.grad), rel=1e-4)


def test_no_gradient_changes_a_step_size_by_more_than_the_learning_rate() -> None:
    rounding = StepSize(QParams(0.01, 0))
    optimizer = torch.optim.SGD(rounding.parameters(), lr=0.1)
    (rounding(torch.full((4, 100), 5.0)) * -1e6).sum().backward()
    optimizer.step()
    assert rounding.qparams.scale == pytest.approx(0.01 * math.exp(0.1))
    assert float(multiple(torch.tensor(-1e9))) == pytest.approx(math.exp(-FARTHEST))  # never 0


class Joined(nn.Module):
    """Two layers whose results are concatenated, and one whose results are added to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.beside, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        joined = nn.functional.max_pool2d(joined, 2)
        aside = nn.functional.max_pool2d(self.beside(x), 2)
        result: Tensor = self.last(torch.relu(joined + aside)).mean((2, 3))
        return result


def test_concatenated_values_learn_one_step_size() -> None:
    torch.manual_seed(0)
    int8 = quantized(captured(Joined(), 3, 8, 8))
    groups = {tuple(group.writers): group for group in step_groups(int8)}
    both = groups["left", "right"]
    assert len(both.readers) == 1  # the addition, after the pool
    network = qat.prepare(int8)
    left, right = network.get_submodule("left"), network.get_submodule("right")
    assert left.rounding is right.rounding
    with torch.no_grad():
        for number, group in enumerate(groups.values()):
            network.get_submodule(group.writers[0]).rounding.growth.fill_(0.1 * (number + 1))
    made = qat.convert(network, int8)
    assert [group.agrees(dict(made.named_modules())) for group in step_groups(made)] == [True] * len(groups)
    for before, after in zip(step_groups(int8), step_groups(made), strict=True):
        scales = [program.get_submodule(before.writers[0]).output.scale for program in (int8, made)]
        number = list(groups.values()).index(groups[tuple(after.writers)])
        assert scales[1] == pytest.approx(scales[0] * math.exp(0.1 * (number + 1)))
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = network.eval()(x), made(x)
    torch.testing.assert_close(found, expected, atol=0.05 * float(expected.std()), rtol=0)


def test_a_scale_that_readers_take_otherwise_stays() -> None:
    torch.manual_seed(0)
    int8 = quantized(captured(Joined(), 3, 8, 8))
    group = step_groups(int8)[0]
    name, place = group.readers[0]
    reader = int8.get_submodule(name)
    other = QParams(getattr(reader, place).scale * 2, getattr(reader, place).zero_point)
    setattr(reader, place, other)
    network = qat.prepare(int8)
    fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert fixed == {f"{group.writers[0]}.rounding.growth"}
    assert getattr(qat.convert(network, int8).get_submodule(name), place) == other
