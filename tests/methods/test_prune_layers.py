"""The order in which blocks go, against a search written out over a plain torch module."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from modelopt_cli.errors import DataError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.layer_pruner import LayerPruner, by_output, by_weights
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.removable import find_blocks, without

BLOCKS = 4
SEED = 1  # of a network in which blocks stand in for one another


class Residual(nn.Module):
    """Four residual branches of different strength."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.stem = nn.Linear(6, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(BLOCKS))
        self.head = nn.Linear(8, classes)
        with torch.no_grad():
            for branch, scale in zip(self.branches, (0.6, 2.0, 2.0, 1.0), strict=True):
                branch.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + torch.tanh(branch(x))
        return self.head(x)


def network(classes: int = 3) -> tuple[nn.Module, Program]:
    model = Residual(classes).eval()
    return model, capture(model, InputSpec((6,)))


def batches() -> Iterable[Tensor]:
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(1))
    return iter(x.split(4))


def with_only(model: nn.Module, kept: set[int]) -> Tensor:
    """Logits in float64 of the network with these branches only, computed by hand."""
    x = model.double().stem(torch.cat(list(batches())).double())
    for number in sorted(kept):
        x = x + torch.tanh(model.branches[number](x))
    return model.head(x)


def greedy(model: nn.Module) -> list[tuple[str, float]]:
    wanted, left, found = with_only(model, set(range(BLOCKS))).softmax(1), set(range(BLOCKS)), []
    while left:
        costs = {}
        for number in left:
            actual = with_only(model, left - {number}).softmax(1)
            costs[number] = float((wanted * (wanted / actual).log()).sum(1).mean())
        best = min(sorted(costs), key=costs.__getitem__)
        left.remove(best)
        found.append((f"branches.{best}", costs[best]))
    return found


@torch.no_grad()
def test_greedy_order_is_that_of_a_search_by_hand() -> None:
    model, program = network()
    removals = list(by_output(program, find_blocks(program), batches))
    expected = greedy(model)
    assert [r.block.name for r in removals] == [name for name, _ in expected]
    assert [r.score for r in removals] == pytest.approx([score for _, score in expected], rel=1e-4)


@torch.no_grad()
def test_scores_are_taken_anew_after_each_removal() -> None:
    _, program = network()
    blocks = find_blocks(program)
    once = [next(iter(by_output(program, [block], batches))).score for block in blocks]
    order = [r.block.name for r in by_output(program, blocks, batches)]
    assert order != [blocks[i].name for i in sorted(range(BLOCKS), key=once.__getitem__)]


def test_each_step_reads_the_samples_once_and_only_when_asked_for() -> None:
    _, program = network()
    opened: list[int] = []
    seen: list[int] = []

    def counted() -> Iterable[Tensor]:
        opened.append(1)
        return batches()

    order = by_output(program, find_blocks(program), counted, lambda done, total: seen.append(done))
    assert not opened
    next(order)
    assert len(opened) == 1
    assert seen == [4, 8, 11]
    next(order)
    assert len(opened) == 2


@torch.no_grad()
def test_one_output_is_compared_by_its_relative_error() -> None:
    model, program = network(classes=1)
    (first, *_) = by_output(program, find_blocks(program), batches)
    dense = with_only(model, set(range(BLOCKS)))
    errors = []
    for number in range(BLOCKS):
        off = with_only(model, set(range(BLOCKS)) - {number}) - dense
        errors.append(float((off**2 / dense**2).mean()))
    assert first.score == pytest.approx(min(errors), rel=1e-4)
    assert first.block.name == f"branches.{errors.index(min(errors))}"


def test_without_samples_it_is_refused() -> None:
    _, program = network()
    with pytest.raises(DataError, match="no samples to measure blocks on"):
        next(by_output(program, find_blocks(program), lambda: iter([])))


def test_a_network_that_gives_nan_is_refused() -> None:
    _, program = network()
    with torch.no_grad():
        program.head.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="NaN or infinity"):
        next(by_output(program, find_blocks(program), batches))


def test_without_data_blocks_go_by_the_mean_score_of_their_weights() -> None:
    _, program = network()
    scores = {name: p.detach().square() for name, p in program.named_parameters() if name.endswith("weight")}
    removals = list(by_weights(find_blocks(program), scores))
    means = {
        f"branches.{n}": float((program.get_parameter(f"branches.{n}.weight").detach().double() ** 2).mean())
        for n in range(BLOCKS)
    }
    assert [r.block.name for r in removals] == sorted(means, key=means.__getitem__)
    assert [r.score for r in removals] == pytest.approx(sorted(means.values()), rel=1e-6)
    summed = list(by_weights(find_blocks(program), scores, total=True))
    assert [r.score for r in summed] == pytest.approx([64 * r.score for r in removals], rel=1e-6)


def test_of_equal_blocks_the_first_goes_and_what_is_inside_a_removed_one_is_not_removed_again() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            y = torch.tanh(self.a(x))
            x = x + (y + torch.tanh(self.b(y)))
            return x + torch.tanh(self.c(x))

    program = capture(Nested().eval(), InputSpec((4,)))
    blocks = find_blocks(program)
    assert [(b.name, b.layers) for b in blocks] == [("b", ("b",)), ("a", ("a", "b")), ("c", ("c",))]
    ones = {f"{name}.weight": torch.ones(4, 4) for name in "bc"}
    assert [r.block.name for r in by_weights(blocks, ones)] == ["b", "a", "c"]
    first = {"a.weight": torch.zeros(4, 4), "b.weight": torch.ones(4, 4), "c.weight": torch.full((4, 4), 0.9)}
    assert [r.block.name for r in by_weights(blocks, first)] == ["a", "c"]


class TiedLayers(nn.Module):
    """Two branches of two layers each in one module: both are ``body``, so their first layers name them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a1", "a2", "b1", "b2")})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        x = x + self.body["a2"](torch.tanh(self.body["a1"](x)))
        return x + self.body["b2"](torch.tanh(self.body["b1"](x)))


def test_a_block_is_the_same_after_others_are_gone() -> None:
    program = capture(TiedLayers().eval(), InputSpec((4,)))
    blocks = find_blocks(program)
    assert [block.name for block in blocks] == ["body.a1", "body.b1"]
    config = PruneConfig(structure="layers", sparsity=0.5, criterion="l1")
    pruner = LayerPruner(program, config, Context())
    once = without(program, blocks[:1])
    assert [block.layers for block in pruner.blocks(once)] == [("body.b1", "body.b2")]
    assert pruner.units_kept(program) == 1.0
    assert pruner.units_kept(once) == 0.5


def test_attention_with_fetched_weights_counts_as_a_block() -> None:
    model = SwinTransformer([4, 4], 12, [2], [3], [4, 4], num_classes=5).eval()
    program = capture(model, InputSpec((3, 16, 16)), verify=False)
    result = apply(program, PruneConfig(structure="layers", sparsity=0.5, criterion="l2"), Context())
    removed = result.program.history[-1]["removed"]
    assert result.target is not None
    assert result.target.reached == 0.5
    assert len(find_blocks(result.program)) == 2
    left = {key.rpartition(".")[0] for key in result.program.state_dict()}
    assert removed
    assert not left & set(removed)
