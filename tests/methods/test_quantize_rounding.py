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
from quantize_networks import Images, captured, images, on_state, small, sqnr
from torch import Tensor, nn

from modelopt_cli import api
from modelopt_cli.errors import GraphNeeded, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.saturation import never_saturates
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import convert
from modelopt_cli.methods.quantize.static import calibrated
from modelopt_cli.methods.quantize.weight_rounding.gptq import ColumnGrid, rounded_columns
from modelopt_cli.methods.quantize.weight_rounding.random_dropping import dropped, random_bits
from modelopt_cli.methods.quantize.weight_rounding.reconstruction_blocks import find_blocks, layer_blocks
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import RoundingProblem
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS
from modelopt_cli.methods.quantize.weight_rounding.simulation import StepRounding, simulate
from modelopt_cli.methods.quantize.weight_rounding.soft_rounding import SoftRounding, annealed, undecided
from modelopt_cli.methods.quantize.weight_rounding.weight_grid import WeightGrid
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
    # Channels of one size leave so little to win that the steps of activations bound it.
    ready = calibrated(program, QuantizeConfig(equalize="none"), context)
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


def gptq_columns(weight: Tensor, inputs: Tensor) -> Tensor:
    """Integers of 4 bits for a weight in steps, ``(rows, columns)``."""
    grid = ColumnGrid(torch.ones_like(weight)[None], None, (-8, 7))
    spans = [(0, weight.shape[1])]
    return rounded_columns(weight[None], [(inputs.T @ inputs)[None]], spans, grid)[0]


@pytest.mark.parametrize("columns", [20, 150])
def test_gptq_is_the_papers_algorithm(columns: int) -> None:
    g = torch.Generator().manual_seed(1)
    weight = 4 * torch.randn(6, columns, generator=g, dtype=torch.float64)
    inputs = correlated(400, columns)
    found = gptq_columns(weight, inputs)
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
    found = gptq_columns(weight, inputs)
    plain = weight.round().clamp(-8, 7)

    def error(q: Tensor) -> float:
        return float((inputs @ (weight - q).T).square().mean())

    assert error(found) < 0.5 * error(plain)


class Linears(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


def linears(**options: Any) -> tuple[Program, Program, Tensor]:
    """A network, its form with stored weights of 3 bits, and the inputs that were looked at."""
    torch.manual_seed(0)
    program = captured(Linears(), 32)
    inputs = correlated(200, 32).float()
    context = Context(data=Images(inputs))  # type: ignore[arg-type]
    config = QuantizeConfig("int8-weight", weight_bits=3, edge_bits=3, rounding="gptq", **options)
    return program, apply(program, config, context).program, inputs


@pytest.mark.parametrize("options", [{}, {"group_size": 10}, {"group_size": 8, "asymmetric": True}])
def test_gptq_of_stored_weights_is_the_papers_with_groups_and_zero_points(options: dict[str, Any]) -> None:
    program, stored, inputs = linears(**options)
    encoding = stored.encodings["first.weight"]
    group, count = encoding.params["group"] or 32, 32
    scale = encoding.parts["scale"].double().view(24, -1).repeat_interleave(group, 1)[:, :count].numpy()
    zero = np.zeros_like(scale)
    if "zero_point" in encoding.parts:
        zero = (
            encoding.parts["zero_point"].double().view(24, -1).repeat_interleave(group, 1)[:, :count].numpy()
        )
    x = inputs.double().numpy()
    hessian = x.T @ x
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(count)
    w, q = program.get_parameter("first.weight").detach().double().numpy().copy(), np.zeros((24, count))
    for i, column in enumerate(order):
        left = order[i:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        s, z = scale[:, column], zero[:, column]
        q[:, column] = np.clip(np.round(w[:, column] / s) + z, -4, 3)
        error = (w[:, column] - (q[:, column] - z) * s) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
    assert encoding.integers is not None
    assert (encoding.integers.numpy() == q).mean() > 0.99  # ties of float32 sums aside
    assert np.allclose(
        stored.get_parameter("first.weight").detach().numpy(), (q - zero) * scale, atol=scale.max()
    )


@pytest.mark.parametrize("options", [{}, {"group_size": 8, "asymmetric": True}])
def test_stored_weights_lose_less_by_gptq(options: dict[str, Any]) -> None:
    program, stored, inputs = linears(**options)
    config = QuantizeConfig("int8-weight", weight_bits=3, edge_bits=3, **options)
    plain = apply(program, config, Context()).program
    with torch.no_grad():
        y = program(inputs)
        assert sqnr(y, stored(inputs)) > sqnr(y, plain(inputs)) + 3


def test_gptq_of_stored_weights_needs_data_and_a_graph() -> None:
    config = QuantizeConfig("int8-weight", rounding="gptq")
    with pytest.raises(UsageError, match="needs data to calibrate on"):
        apply(captured(Linears(), 32), config, Context())
    with pytest.raises(GraphNeeded, match=r"rounding.* needs a network that can be traced"):
        on_state(Linears().state_dict(), config)


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


def test_a_step_is_rounded_as_uint8_is_and_half_of_them_are_not_where_it_is_dropped() -> None:
    q = QParams(0.1, 30)
    rounding, x = StepRounding(q), torch.linspace(-4, 30, 3001)
    rounded = dequantize(quantize(x, q), q)
    assert torch.equal(rounding(x), rounded)
    rounding.generator = torch.Generator().manual_seed(0)
    dropped = rounding(x)
    kept = dropped == rounded
    assert torch.equal(dropped[~kept], x[~kept])
    assert 0.45 < float(kept.double().mean()) < 0.55


def test_gradients_of_dropped_rounding_go_to_the_tensor_that_each_number_is_of() -> None:
    rounded, real = (torch.randn(8, 1001, requires_grad=True) for _ in range(2))
    mixed = dropped(rounded, real, torch.Generator().manual_seed(0))
    kept = (mixed == rounded).detach()
    assert torch.equal(mixed[~kept], real[~kept])
    assert abs(float(kept.double().mean()) - 0.5) < 0.02
    upstream = torch.randn_like(mixed)
    mixed.backward(upstream)
    assert rounded.grad is not None
    assert real.grad is not None
    assert torch.equal(rounded.grad, upstream * kept)
    assert torch.equal(real.grad, upstream * ~kept)


def test_random_bits_are_independent_of_their_neighbours_and_of_those_64_places_on() -> None:
    bits = random_bits(200_003, torch.Generator().manual_seed(0)).double() - 0.5
    assert len(bits) == 200_003
    for apart in (0, 1, 8, 64, 25_001):  # that of the next bit of the same byte
        product = (bits[: len(bits) - apart] * bits[apart:]).mean() if apart else bits.mean() / 2
        assert abs(float(product)) < 0.25 * 5 / len(bits) ** 0.5


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
    module = "block_reconstruction" if name == "block" else name
    home = f"modelopt_cli.methods.quantize.weight_rounding.{module}.simulate"
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


class Words(nn.Module):
    """Reads words, whose indices are the input of its first block."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.hidden, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.out(self.hidden(self.rows(ids).mean(1)).relu())
        return result


@pytest.mark.parametrize("name", WITH_DATA)
def test_indices_are_no_numbers_to_be_rounded(name: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(20, (32, 5))
    options: dict[str, Any] = {"weight_bits": 4, "rounding": name}
    if ROUNDINGS[name].learned:
        options["rounding_steps"] = 3
    made = api.quantize(Words().eval(), calibration=[ids], **options)
    assert made.coverage is not None
    assert made.coverage.compressed == 3


def test_shared_weights_take_the_nearest_integers() -> None:
    problem = problem_of(small(), 4)
    problem = replace(problem, shared={"body.weight"})
    find = ROUNDINGS["gptq"].find
    assert find is not None
    assert set(find(problem).layers) == {"stem", "dw", "fc"}


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_scheme_that_sees_no_inputs_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"rounding.*needs samples of layer inputs.*use scheme int8"):
        QuantizeConfig("int8-dynamic", rounding=name)


def test_the_option_that_leaves_activations_float_is_the_one_that_is_named() -> None:
    with pytest.raises(UsageError, match="unlike act_bits=32; leave act_bits out"):
        QuantizeConfig(act_bits=32, rounding="block")


@pytest.mark.parametrize(("scheme", "name"), [("int8", "gptq"), ("int8-weight", "gptq")])
def test_inputs_are_looked_at_on_the_cpu_whatever_the_device(scheme: str, name: str) -> None:
    context = Context(data=Images(images(4, 3, 12, 12)), device="meta")  # type: ignore[arg-type]
    apply(small(), QuantizeConfig(scheme, rounding=name), context)


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


# --- Blocks


class Inverted(nn.Module):
    """A stem, an inverted residual without and one with a shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.ModuleList(nn.Conv2d(4, 8, 1) for _ in range(2))
        self.depthwise = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))
        self.project = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self._branch(F.relu6(self.stem(x)), 0)
        x = x + self._branch(x, 1)
        result: Tensor = self.fc(x.mean((2, 3)))
        return result

    def _branch(self, x: Tensor, i: int) -> Tensor:
        x = F.relu6(self.depthwise[i](F.relu6(self.expand[i](x))))
        branch: Tensor = self.project[i](x)
        return branch


class LongShortcut(nn.Module):
    """A shortcut past eleven layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        y = x = torch.relu(self.layers[0](x))
        for layer in self.layers[1:]:
            y = torch.relu(layer(y))
        return x + y


def test_residual_branches_are_blocks_and_chains_end_at_a_layer_without_an_activation() -> None:
    problem = problem_of(captured(Inverted(), 3, 8, 8), 4, n=2)
    blocks = [block.layers for block in find_blocks(problem, simulate(problem))]
    assert blocks == [
        ("stem", "expand.0", "depthwise.0"),
        ("project.0",),
        ("expand.1", "depthwise.1", "project.1"),
        ("fc",),
    ]
    alone = [block.layers for block in layer_blocks(problem, simulate(problem))]
    assert alone == [(name,) for block in blocks for name in block]


def test_a_block_ends_in_the_value_that_the_next_one_reads() -> None:
    problem = problem_of(captured(Inverted(), 3, 8, 8), 4, n=2)
    blocks = find_blocks(problem, simulate(problem))
    assert [[value.name for value in block.inputs] for block in blocks[1:]] == [
        [block.result.name] for block in blocks[:-1]
    ]


def test_layers_are_taken_alone_where_too_many_lie_between_two_cuts() -> None:
    problem = problem_of(captured(LongShortcut(), 3, 8, 8), 4, n=2)
    blocks = [block.layers for block in find_blocks(problem, simulate(problem))]
    assert blocks == [(f"layers.{i}",) for i in range(12)]
