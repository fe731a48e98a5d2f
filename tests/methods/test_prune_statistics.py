"""What criteria know of a network: against hooks, autograd and layers taken apart by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prune_cases import LAYERS, Samples, captured, context, net, one, smooth
from torch import Tensor, nn

from modelopt_cli.errors import DataError, NothingCompressed, UsageError
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.methods.context import Context, Reached
from modelopt_cli.methods.layer_pass import Columns, LayerPass, _bytes_of, hessian_of, hessians
from modelopt_cli.methods.matrices import (
    calls_by_layer,
    from_matrices,
    to_matrices,
    unfold,
    unseen_inputs,
    weights_of,
)
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import CRITERIA
from modelopt_cli.methods.prune.criterion_statistics import collect


def _layer(program: Any) -> Any:
    return program.get_submodule("layer")


@pytest.mark.parametrize("case", LAYERS)
def test_statistics_unfolded_inputs_times_matrices_are_the_layers_outputs(case: str) -> None:
    layer = _layer(one(case)).double()
    x = torch.randn(3, *LAYERS[case][1], dtype=torch.float64)
    rows = torch.cat(list(unfold(layer, x)), 1)
    products = rows @ to_matrices(layer, layer.weight).mT
    outputs = layer(x)
    # Channels last, one group after the other.
    if not isinstance(layer, nn.Linear):
        outputs = (outputs - layer.bias.view(-1, *[1] * (outputs.dim() - 2))).movedim(1, -1)
    else:
        outputs = outputs - layer.bias
    expected = outputs.reshape(-1, getattr(layer, "groups", 1), products.shape[-1]).movedim(1, 0)
    torch.testing.assert_close(products, expected)


@pytest.mark.parametrize("case", LAYERS)
def test_statistics_matrices_go_there_and_back(case: str) -> None:
    layer = _layer(one(case))
    assert torch.equal(from_matrices(layer, to_matrices(layer, layer.weight)), layer.weight)


def test_statistics_unfolding_is_bounded_to_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer(one("conv2d")), torch.randn(3, 4, 7, 8)
    monkeypatch.setattr("modelopt_cli.methods.matrices.CHUNK", 1)
    parts = list(unfold(layer, x))
    assert len(parts) == 3
    monkeypatch.undo()
    assert torch.equal(torch.cat(parts, 1), next(unfold(layer, x)))


@pytest.mark.parametrize("case", LAYERS)
def test_statistics_norms_are_those_of_every_weights_inputs(case: str) -> None:
    """A weight's squared norm is the sum of squares of its derivative at every output it reaches."""
    program, x = one(case), torch.randn(5, *LAYERS[case][1])
    norms = collect(program, "wanda", ["layer.weight"], context(x, batch_size=2))["layer.weight"]
    layer = _layer(program).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(layer, {"weight": w}, (x.double(),)), layer.weight.detach()
    )
    expected = jacobian.square().sum(tuple(range(jacobian.dim() - layer.weight.dim()))).sqrt()
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=1e-6)


def _hooked(program: Any, name: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = program.get_submodule(name).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].clone())
    )
    program(x)
    handle.remove()
    return torch.cat(seen)


def test_statistics_norms_of_a_network_come_from_its_own_inputs() -> None:
    program, x = net(), smooth(9, 3, 12, 12)
    norms = collect(program, "wanda", list(weights_of(program)), context(x, batch_size=4))
    body = F.unfold(_hooked(program, "body", x), 3, padding=1).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(norms["body.weight"][0].flatten(), body)
    torch.testing.assert_close(norms["fc.weight"][3], _hooked(program, "fc", x).norm(dim=0))
    assert set(norms) == set(weights_of(program))
    assert all(norms[name].shape == weight.shape for name, weight in weights_of(program).items())


@pytest.mark.parametrize("kept_bytes", [0, 20_000, 1 << 30], ids=["nothing-kept", "some-kept", "all-kept"])
def test_statistics_walk_gives_every_layer_its_inputs(kept_bytes: int) -> None:
    program, x = net(), smooth(10, 3, 12, 12)
    around = context(x, batch_size=3)
    layer_pass = LayerPass(program, around.data, around, kept_bytes=kept_bytes)  # type: ignore[arg-type]
    for name, (node,) in ((n, c) for n, c in calls_by_layer(program).items() if n != "bn"):
        torch.testing.assert_close(torch.cat(list(layer_pass.inputs(node))), _hooked(program, name, x))
        kept = sum(_bytes_of(values) for _, values in layer_pass.waiting.values())
        assert kept <= kept_bytes
    passes = len(around.data.passes)  # type: ignore[union-attr]
    assert passes == {0: 5, 20_000: 4, 1 << 30: 1}[kept_bytes]


def test_statistics_hessians_of_layers_called_twice_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(torch.relu(self.layer(x)))
            return result

    program, x = captured(Twice(), 4), torch.randn(7, 4)
    around = context(x)
    layer_pass = LayerPass(program, around.data, around)  # type: ignore[arg-type]
    found = list(hessians(layer_pass, {"layer": "layer.weight"}, {"layer": Columns(4)}))
    both = torch.cat((x, torch.relu(program.layer(x)))).double()
    assert len(found) == 1
    torch.testing.assert_close(found[0][1][0][0], both.T @ both, rtol=1e-5, atol=1e-5)
    norms = collect(program, "wanda", ["layer.weight"], around)["layer.weight"]
    torch.testing.assert_close(norms[0].double(), both.norm(dim=0), rtol=1e-5, atol=1e-6)


def test_statistics_hessian_in_spans_and_in_another_order() -> None:
    layer, x = nn.Linear(7, 2), torch.randn(20, 7)
    order = torch.tensor([3, 0, 6, 1, 2, 5, 4])
    columns = Columns(7, order, [0, 2, 4, 6], widest=4)
    assert columns.spans == [(0, 4), (4, 7)]
    full = (x.T @ x).double()[order][:, order]
    for (start, stop), part in zip(columns.spans, hessian_of(layer, [x], columns), strict=True):
        torch.testing.assert_close(part[0], full[start:stop, start:stop], rtol=1e-5, atol=1e-5)


def test_statistics_columns_are_never_cut_elsewhere_than_allowed() -> None:
    columns = Columns(30, None, [0, 4, 8, 10, 14, 18, 20, 24, 28], widest=9)
    assert columns.spans == [(0, 8), (8, 14), (14, 20), (20, 28), (28, 30)]
    assert Columns(10, None, [0], widest=3).spans == [(0, 10)]


def test_statistics_curvature_is_what_the_removal_costs() -> None:
    """By definition: remove one weight, refit the others of its row by least squares, compare outputs."""
    program, x = one("linear"), torch.randn(400, 6) @ torch.randn(6, 6)
    curvature = collect(program, "obs", ["layer.weight"], context(x))["layer.weight"]
    weight = _layer(program).weight.detach().double()
    hessian = (x.T @ x).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(6)
    energy = float((weight @ (x.T @ x).double() * weight).sum())
    for row, column in ((0, 0), (2, 3), (4, 5)):
        rest = [i for i in range(6) if i != column]
        w = weight[row]
        change = torch.zeros(6, dtype=torch.float64)
        change[column] = -w[column]
        change[rest] = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, column] * w[column])
        cost = float(change @ hessian @ change) / energy
        assert float(w[column] ** 2 * curvature[row, column]) == pytest.approx(cost, rel=1e-4)


def test_statistics_taylor_is_weight_times_gradient_squared_batch_by_batch() -> None:
    program, x = net(), smooth(10, 3, 12, 12)
    labels = torch.arange(10) % 5
    taylor = collect(program, "taylor", [], context(x, labels, batch_size=4))
    expected: dict[str, Tensor] = {}
    for start in (0, 4, 8):
        program.zero_grad()
        F.cross_entropy(program(x[start : start + 4]), labels[start : start + 4]).backward()
        for name, p in program.named_parameters():
            assert p.grad is not None
            expected[name] = expected.get(name, 0) + (p.detach() * p.grad).square() / 3
    assert set(taylor) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(taylor[name], value, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if row.needs_data])
def test_statistics_leave_the_network_as_it_is(criterion: str) -> None:
    program, x = net(), smooth(6, 3, 12, 12)
    program.train()
    before = {name: value.clone() for name, value in program.state_dict().items()}
    around = context(x, torch.zeros(6, dtype=torch.int64))
    first = collect(program, criterion, list(weights_of(program)), around)
    assert program.training
    assert all(p.grad is None for p in program.parameters())
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    again = collect(program, criterion, list(weights_of(program)), around)
    assert first.keys() == again.keys() >= set(weights_of(program))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if row.needs_data])
def test_statistics_use_so_many_samples_at_most(criterion: str) -> None:
    program, x, labels = net(), smooth(8, 3, 12, 12), torch.arange(8) % 5
    few = collect(program, criterion, ["fc.weight"], context(x, labels, batch_size=3), samples=5)
    same = collect(program, criterion, ["fc.weight"], context(x[:5], labels[:5], batch_size=3))
    assert "fc.weight" in few
    assert all(torch.equal(value, same[name]) for name, value in few.items())


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if row.needs_data])
def test_statistics_refuse_what_cannot_be_used(criterion: str) -> None:
    program, x = net(), smooth(4, 3, 12, 12)
    with pytest.raises(UsageError, match=f"criterion {criterion} needs data"):
        collect(program, criterion, ["fc.weight"], Context())
    labels = torch.zeros(4, dtype=torch.int64)
    program.get_parameter("stem.weight").data[0] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        collect(program, criterion, ["body.weight"], context(x, labels))
    with pytest.raises(DataError, match="no samples"):
        collect(net(), criterion, ["body.weight"], context(x[:0], labels[:0]))


def test_statistics_taylor_refuses_data_without_labels() -> None:
    with pytest.raises(UsageError, match="needs data with labels"):
        collect(net(), "taylor", [], context(smooth(4, 3, 12, 12)))


def test_statistics_taylor_refuses_labels_that_are_no_classes() -> None:
    program, x = net(), smooth(4, 3, 12, 12)
    classes = program(x).shape[1]
    with pytest.raises(DataError, match=f"label {classes} is not among the network's {classes} classes"):
        collect(program, "taylor", [], context(x, torch.tensor([0, 1, classes, 2])))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied_too(self.tied(x))
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


def test_statistics_say_whose_inputs_cannot_be_watched() -> None:
    program = captured(_Attention(), 5, 8)
    names = list(weights_of(program))
    assert names == ["tied.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    reasons = {name: unseen_inputs(program, name) or "" for name in names}
    assert "another layer" in reasons["tied.weight"]
    assert "MultiheadAttention" in reasons["attention.in_proj_weight"]
    assert "inside attention" in reasons["attention.out_proj.weight"]
    with pytest.raises(UsageError, match=r"cannot watch the inputs of attention\.in_proj_weight"):
        collect(program, "wanda", names[1:2], context(torch.randn(3, 5, 8)))


def test_statistics_weights_that_functions_fetch_are_found() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, self.inner.weight)

    program = captured(Root(), 3)
    assert any(node.op == "get_attr" for node in program.graph.nodes)
    assert list(weights_of(program)) == ["inner.weight"]
    assert unseen_inputs(program, "inner.weight") == "its inputs stay inside a function"


def test_statistics_sampled_data_is_asked_for_with_the_seed() -> None:
    asked: list[tuple[int, int]] = []

    class Asked(Samples):
        def sample(self, n: int, seed: int = 0) -> Samples:
            asked.append((n, seed))
            return super().sample(n, seed)

    around = Context(data=Asked(smooth(4, 3, 12, 12)), seed=7)  # type: ignore[arg-type]
    collect(net(), "wanda", ["fc.weight"], around, samples=3)
    assert asked == [(3, 7)]


class _Raw(nn.Module):
    """Matrices of its own, one of them turned around, next to what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 6))
        self.list = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])
        self.position = nn.Parameter(torch.randn(1, 8))
        self.register_buffer("fixed", torch.randn(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first) + self.position
        result: Tensor = self.fc((x @ self.list[0].t()) @ self.fixed)
        return result


def test_statistics_matrices_of_no_layer_are_weights_and_are_listed() -> None:
    program = captured(_Raw(), 6)
    assert list(weights_of(program)) == ["first", "list.0", "fc.weight"]
    config = PruneConfig(structure="unstructured", sparsity=0.5, exclude=("first",))
    result = apply(program, config, Context())
    assert int((result.program.get_parameter("list.0") == 0).sum()) > 0
    statuses = {layer.name: layer for layer in coverage(result.program).layers}
    assert statuses.keys() == {"fc", "first", "list.0"}
    assert statuses["first"].reason == "matched by --exclude"
    assert statuses["list.0"].compressed


class _Ladder(nn.Module):
    """A depthwise weight that is called at two dilations, and so belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f = nn.Conv1d(3, 32, 1), nn.Conv1d(32, 3, 1, bias=False)
        self.weight = nn.Parameter(torch.rand(32, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for dilation in (1, 2):
            x = x + F.conv1d(x, self.weight, padding=dilation, dilation=dilation, groups=32)
        result: Tensor = self.f(x)
        return result


def test_statistics_a_weight_of_no_layer_that_loses_channels_counts_as_pruned() -> None:
    program = captured(_Ladder(), 3, 20)
    result = apply(program, PruneConfig(sparsity=0.5), Context()).program
    assert result.get_parameter("weight").shape == (16, 1, 3)
    statuses = {layer.name: layer for layer in coverage(result, given=program).layers}
    assert {name: status.scheme for name, status in statuses.items()} == dict.fromkeys(
        ("a", "f", "weight"), "pruned 50 %"
    )
    assert statuses["weight"].bytes == 4 * 32 * 3
    again = coverage(result, given=result).layers
    assert {layer.name: layer.before for layer in again} == dict.fromkeys(("a", "f", "weight"), "pruned 50 %")
    assert next(layer.reason for layer in again if layer.name == "weight") == (
        "used inside a function, not by a layer"
    )


class _Turned(nn.Module):
    """A layer whose weight is also used the other way round, as in an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f = nn.Linear(8, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.f(F.linear(torch.relu(self.a(x)), self.a.weight.t()))
        return result


@pytest.mark.parametrize("settings", [{}, {"structure": "layers"}, {"structure": "unstructured"}], ids=str)
def test_statistics_a_weight_that_is_fetched_too_is_pruned_or_left_with_a_reason(
    settings: dict[str, str],
) -> None:
    program = captured(_Turned(), 8)
    assert [layer.name for layer in coverage(program).layers] == ["a", "f"]
    config = PruneConfig(sparsity=0.5, **settings)  # type: ignore[arg-type]
    if settings.get("structure") == "unstructured":
        assert apply(program, config, Context()).target == Reached("sparsity", 0.5, 0.5)
        return
    with pytest.raises(NothingCompressed, match=r"no layer can be pruned \(a: "):
        apply(program, config, Context())


@pytest.mark.parametrize("structure", ["channels", "layers", "unstructured"])
def test_a_network_without_layers_has_nothing_to_prune(structure: str) -> None:
    program = captured(nn.ReLU(), 8)
    with pytest.raises(NothingCompressed, match="there is no layer with weights that could be pruned"):
        apply(program, PruneConfig(sparsity=0.5, structure=structure), Context())
