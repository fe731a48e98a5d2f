"""Learned and compensated rounding: against textbook forms in NumPy, and against the nearest integers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantize_networks import Images, captured, images, small, sqnr
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.saturation import never_saturates
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import convert
from modelopt_cli.methods.quantize.gptq import rounded_columns
from modelopt_cli.methods.quantize.rounding_problem import RoundingProblem
from modelopt_cli.methods.quantize.roundings import ROUNDINGS
from modelopt_cli.methods.quantize.simulation import StepRounding, simulate
from modelopt_cli.methods.quantize.soft_rounding import SoftRounding, annealed, undecided
from modelopt_cli.methods.quantize.static import calibrated
from modelopt_cli.methods.quantize.weight_grid import WeightGrid
from modelopt_cli.methods.quantize.widths import Widths
from modelopt_cli.program import Program
from modelopt_cli.program.quantization import QParams, dequantize, quantize
from modelopt_cli.program.quantized import Weighted

Array = NDArray[np.float64]
WITH_DATA = [name for name, row in ROUNDINGS.items() if row.needs_data]
LEARNED = [name for name, row in ROUNDINGS.items() if row.learned]


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs that are far from independent, as those of real layers are; float64."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=g, dtype=torch.float64)
    few = torch.randn(rows, columns // 4, generator=g, dtype=torch.float64)
    return few @ mixing + 0.3 * torch.randn(rows, columns, generator=g, dtype=torch.float64)


def problem_of(program: Program, bits: int, n: int = 32, steps: int = 60) -> RoundingProblem:
    """What a rounding is given, all layers at so many bits."""
    context = Context(data=Images(images(n, *program.input.shape, seed=1)))  # type: ignore[arg-type]
    ready = calibrated(program, QuantizeConfig(), context)
    ready.plan.widths = dict.fromkeys(ready.plan.widths, Widths(bits, 8))
    assert context.data is not None
    return RoundingProblem(
        ready.program, ready.plan, ready.qparams, ready.shared, context.data, context, steps
    )


def converted(problem: RoundingProblem, name: str) -> Program:
    find = ROUNDINGS[name].find
    assert find is not None
    rounded = find(problem)
    return convert(problem.program, problem.plan, rounded.qparams, problem.shared, rounded.layers)


def nearest(problem: RoundingProblem) -> Program:
    """The network with the nearest integers on the same scales."""
    return simulate(problem).program


class Chain(nn.Module):
    """Convolutions of every kind of grouping, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.turned = nn.ConvTranspose2d(12, 6, 2, 2)
        self.fc = nn.Linear(6, 5)
        for layer in self.children():
            nn.init.zeros_(layer.get_parameter("bias"))  # which would be most of the output

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.plain(x))))
        x = torch.relu(self.turned(F.relu6(self.depthwise(x))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def chain() -> Program:
    torch.manual_seed(0)
    return captured(Chain(), 3, 12, 12)


# --- GPTQ


def textbook_gptq(weight: Array, inputs: Array) -> Array:
    """Algorithm 1 of the paper, to 4 bits, the inverse Hessian computed anew for the columns that are left.

    ``weight`` is in steps; the order is that of the columns' squares, the damping 1 % of their mean.
    """
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(inputs.T @ inputs), kind="stable")
    w, q = weight.copy(), np.zeros_like(weight)
    for i, column in enumerate(order):
        left = order[i:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        q[:, column] = np.clip(np.round(w[:, column]), -8, 7)
        error = (w[:, column] - q[:, column]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
    return q


@pytest.mark.parametrize("columns", [20, 150])
def test_gptq_is_the_papers_algorithm(columns: int) -> None:
    g = torch.Generator().manual_seed(1)
    weight = 4 * torch.randn(6, columns, generator=g, dtype=torch.float64)
    inputs = correlated(400, columns)
    found = rounded_columns(weight[None], (inputs.T @ inputs)[None], 4)[0]
    assert np.array_equal(found.numpy(), textbook_gptq(weight.numpy(), inputs.numpy()))


def test_gptq_takes_each_group_of_a_convolution_by_its_own_patches() -> None:
    problem = problem_of(chain(), 4)
    find = ROUNDINGS["gptq"].find
    assert find is not None
    rounded = find(problem)
    # The inputs of the second layer: those of the integer network with the first as it was rounded.
    network = nearest(problem)
    first, second = problem.layers["plain"], problem.layers["grouped"]
    network.get_submodule("plain").weight = nn.Parameter(first.real(rounded.layers["plain"].values.float()))
    seen: list[Tensor] = []
    network.get_submodule("grouped").register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        network(images(32, 3, 12, 12, seed=1))
    patches = F.unfold(seen[0].double(), 3, padding=1)  # (N, C * 9, positions)
    steps = (second.grid.weight / second.grid.scale.view(-1, 1, 1, 1)).double().flatten(1)
    for group in range(2):
        own = patches[:, group * 36 : group * 36 + 36].transpose(1, 2).reshape(-1, 36)
        rows = slice(group * 6, group * 6 + 6)
        expected = textbook_gptq(steps[rows].numpy(), own.numpy())
        found = rounded.layers["grouped"].values[rows].flatten(1).numpy()
        assert (found == expected).mean() > 0.99  # ties of float32 sums aside


def test_gptq_makes_half_the_error_of_the_nearest_integers() -> None:
    """Of 4 bits, on correlated inputs such as those of real layers."""
    g = torch.Generator().manual_seed(2)
    weight = 3 * torch.randn(32, 64, generator=g, dtype=torch.float64)
    inputs = correlated(500, 64)
    found = rounded_columns(weight[None], (inputs.T @ inputs)[None], 4)[0]
    plain = weight.round().clamp(-8, 7)

    def error(q: Tensor) -> float:
        return float((inputs @ (weight - q).T).square().mean())

    assert error(found) < 0.5 * error(plain)


# --- AdaRound


@given(st.floats(-6, 6).filter(lambda logit: abs(logit) > 1e-3), st.integers(-8, 6))
@settings(max_examples=30, deadline=None)
def test_the_way_up_is_the_papers_rectified_sigmoid(logit: float, floor: int) -> None:
    soft = SoftRounding(WeightGrid(torch.tensor([[floor + 0.5]]), torch.ones(1), 4, False))
    soft.logits = torch.tensor([[logit]])
    expected = min(max(1.2 / (1 + np.exp(-logit)) - 0.1, 0.0), 1.0)
    assert float(soft.raised()) == pytest.approx(expected, abs=1e-6)
    assert float(soft.settled()) == floor + (expected >= 0.5)


def test_learning_starts_from_the_weight_itself() -> None:
    weight = torch.linspace(-0.9, 0.9, 12).view(2, 6)
    soft = SoftRounding(WeightGrid(weight, torch.tensor([0.2, 0.3]), 4, False))
    start = soft.grid.real(soft.steps(soft.raised()))
    assert torch.allclose(start, weight, atol=0.01 * 0.3 + 1e-6)


def test_the_regulariser_is_the_papers() -> None:
    raised = torch.rand(50, generator=torch.Generator().manual_seed(0))
    expected = np.mean(1 - np.abs(2 * raised.double().numpy() - 1) ** 3.5)
    assert float(undecided(raised, 3.5)) == pytest.approx(expected, abs=1e-6)
    assert annealed(0.1) is None
    assert [annealed(done) for done in (0.2, 0.6, 1.0)] == pytest.approx([20.0, 11.0, 2.0])


# --- Steps of activations


def test_a_step_is_rounded_as_uint8_is_and_learns_as_the_paper_says() -> None:
    q = QParams(0.1, 30)
    rounding, x = StepRounding(q), torch.linspace(-4, 30, 301).requires_grad_()
    y = rounding(x)
    assert torch.equal(y.detach(), dequantize(quantize(x.detach(), q), q))
    y.sum().backward()
    assert x.grad is not None
    assert rounding.scale.grad is not None
    v = x.detach().double() / 0.1
    low, high = -30, 225
    # Esser et al., equation 3.
    expected = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v))
    inside = (v > low) & (v < high)
    assert torch.equal(x.grad.double(), inside.double())
    assert float(rounding.scale.grad) == pytest.approx(float(expected.sum()), rel=1e-5)


# --- Any rounding


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((small, name) for name in WITH_DATA),
        *(pytest.param(chain, name, marks=pytest.mark.slow) for name in WITH_DATA),
    ],
)
def test_outputs_are_nearer_than_with_the_nearest_integers(make: Callable[[], Program], name: str) -> None:
    program = make()
    problem = problem_of(program, 4, steps=100)
    x = images(32, *program.input.shape, seed=5)
    with torch.no_grad():
        y = program.eval()(x)
        before, after = sqnr(y, nearest(problem)(x)), sqnr(y, converted(problem, name)(x))
    assert after > before + 1.0


@pytest.mark.parametrize("name", WITH_DATA)
def test_the_integer_network_is_the_one_that_was_learned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = small()
    problem = problem_of(program, 4, steps=10)
    kept: list[Any] = []
    home = f"modelopt_cli.methods.quantize.{'block_reconstruction' if name == 'block' else name}.simulate"
    monkeypatch.setattr(home, lambda problem: kept.append(simulate(problem)) or kept[0])
    integer = converted(problem, name)
    x = images(16, *program.input.shape, seed=6)
    with torch.no_grad():
        learned, emulated = kept[0].program(x), integer(x)
        exact = prepare(integer, backend="reference")(x)
    assert torch.allclose(emulated, learned, atol=1e-5)
    assert sqnr(learned, exact) > 60


@pytest.mark.parametrize("name", WITH_DATA)
def test_zeros_stay_pairs_keep_to_the_bound_and_bytes_repeat(name: str) -> None:
    program = chain()
    with torch.no_grad():
        for layer in program.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0
    first, second = (converted(problem_of(program, 8, steps=5), name) for _ in range(2))
    for path, layer in first.named_modules():
        if isinstance(layer, Weighted):
            again: Any = second.get_submodule(path)
            assert torch.equal(layer.weight, again.weight)
            assert torch.equal(layer.scale, again.scale)
            assert layer.config() == again.config()
            assert never_saturates(layer.turned(layer.weight), getattr(layer, "groups", 1))
            zeros = program.get_submodule(path).weight == 0
            assert not layer.weight[zeros].any()


def test_shared_weights_take_the_nearest_integers() -> None:
    problem = problem_of(small(), 4)
    problem = replace(problem, shared={"body.weight"})
    find = ROUNDINGS["gptq"].find
    assert find is not None
    assert set(find(problem).layers) == {"stem", "dw", "fc"}


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_scheme_that_sees_no_inputs_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"rounding.*looks at the inputs of layers.*use scheme='int8'"):
        QuantizeConfig("int8-dynamic", rounding=name)


def test_steps_without_learning_are_refused() -> None:
    with pytest.raises(UsageError, match="rounding_steps has no meaning without"):
        QuantizeConfig(rounding="gptq", rounding_steps=10)


def test_progress_is_told_and_an_interruption_goes_through() -> None:
    calls: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        calls.append((done, total))
        if len(calls) == 2:
            raise KeyboardInterrupt

    problem = problem_of(small(), 4, steps=2)
    problem = replace(problem, context=replace(problem.context, progress=progress))
    with pytest.raises(KeyboardInterrupt):
        converted(problem, "adaround")
    assert calls == [(1, 4), (2, 4)]
