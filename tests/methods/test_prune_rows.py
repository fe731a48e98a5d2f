"""Every row of prune's tables is run: what it claims, it does, to what a paper's formula says by itself."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prune_cases import captured, context, smooth
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.data import Data, open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.prune.allocation import ALLOCATIONS
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import CRITERIA
from modelopt_cli.methods.prune.figures import Timer
from modelopt_cli.methods.prune.schedules import SCHEDULES
from modelopt_cli.methods.prune.state_pruner import apply_to_state
from modelopt_cli.methods.prune.structures import CHANNELS, LAYERS, STRUCTURES, WEIGHTS, Granularity
from modelopt_cli.methods.prune.target_figures import TARGETS, TOLERANCE
from modelopt_cli.program import Program
from modelopt_cli.training import TrainConfig, Training

Scores = dict[str, Tensor]
BATCH = 8
IMAGES, LABELS = smooth(24, 3, 10, 10), torch.arange(24) % 5
BRANCHES = ("one", "two", "three")
SETTINGS: dict[Granularity, dict[str, Any]] = {
    WEIGHTS: {"structure": "unstructured", "sparsity": 0.5},
    CHANNELS: {"structure": "channels", "sparsity": 0.5, "round_to": 1},
    LAYERS: {"structure": "layers", "sparsity": 1 / 3},
}
"""A form of each granularity, and how far it can go exactly."""


class Tower(nn.Module):
    """Convolutions that lose channels, a batch norm, and residual branches that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 12, 3), nn.Conv2d(12, 8, 1)
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.bn(self.a(x)))))
        x = torch.relu(self.c(x)).mean((2, 3))
        for branch in (self.one, self.two, self.three):
            x = x + torch.tanh(branch(x))
        result: Tensor = self.head(x)
        return result


@cache
def tower() -> Program:
    torch.manual_seed(0)
    model = Tower()
    nn.init.uniform_(model.bn.weight, -1, 1)
    for layer in (model.a, model.b):  # sums of absolute values and of squares are to rank differently
        layer.weight.data.mul_(torch.randn_like(layer.weight).mul(1.5).exp() / 3)
    return captured(model, 3, 10, 10)


def pruned(program: Program, within: Context | None = None, **settings: Any) -> MethodResult:
    within = within or context(IMAGES, LABELS, batch_size=BATCH)
    result = apply(program, PruneConfig(**settings), within)
    outputs = result.program(torch.zeros(2, *program.input.shape))
    assert torch.isfinite(outputs).all()
    assert result.target is not None
    assert abs(result.target.reached - result.target.wanted) <= TOLERANCE + 1e-9
    return result


def weights(program: Program) -> Scores:
    return {name: tensor.detach().double() for name, tensor in program.named_parameters() if tensor.dim() > 1}


def squared_gradients(program: Program) -> Scores:
    """(value * gradient of the cross-entropy)^2, the mean over batches, by autograd."""
    sums: Scores = {}
    for start in range(0, len(IMAGES), BATCH):
        part = slice(start, start + BATCH)
        program.zero_grad()
        F.cross_entropy(program(IMAGES[part]), LABELS[part]).backward()
        for name, parameter in program.named_parameters():
            assert parameter.grad is not None
            change = (parameter.detach().double() * parameter.grad).square() * BATCH / len(IMAGES)
            sums[name] = sums.get(name, torch.zeros(())) + change
    program.zero_grad()
    return sums


def input_norms(program: Program) -> Scores:
    """The norm of what each weight is multiplied with, by hooks and ``torch.nn.functional.unfold``."""
    norms: Scores = {}

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        value, name = inputs[0].double(), f"{names[module]}.weight"
        if isinstance(module, nn.Conv2d):
            patches = F.unfold(value, module.kernel_size, padding=module.padding)
            value = patches.movedim(1, -1).flatten(0, 1)
        norms[name] = value.square().sum(0).sqrt().view(1, *module.weight.shape[1:])

    names = {
        module: name for name, module in program.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    handles = [module.register_forward_pre_hook(hook) for module in names]
    with torch.no_grad():
        program(IMAGES)
    for handle in handles:
        handle.remove()
    return norms


OF_WEIGHTS: dict[str, Callable[[Program], Scores]] = {
    "l1": lambda program: {name: w.abs() for name, w in weights(program).items()},
    "l2": lambda program: {name: w.square() for name, w in weights(program).items()},
    "taylor": squared_gradients,
    "wanda": lambda program: {
        name: w.abs() * input_norms(program)[name] for name, w in weights(program).items()
    },
}
"""What each weight is worth, by the formula of the criterion's paper."""


def relative(*parts: Tensor) -> Tensor:
    """The mean over tensors of what each says of the channels, in units of its mean."""
    return torch.stack([part / part.mean() for part in parts]).mean(0)


def both_sides(program: Program, scores: Scores, norm: Tensor | None = None) -> Scores:
    """From scores of weights: what makes a channel, what reads it, and the norm in between."""
    out, into = {n: scores[f"{n}.weight"].flatten(1).sum(1) for n in "abc"}, {}
    into = {n: scores[f"{n}.weight"].sum((0, 2, 3)) for n in "abc"}
    norms = [] if norm is None else [norm]
    return {"a": relative(out["a"], *norms, into["b"]), "b": relative(out["b"], into["c"])}


def gamma(program: Program) -> Tensor:
    return program.get_parameter("bn.weight").detach().double()


def taylor_of_channels(program: Program) -> Scores:
    t = squared_gradients(program)
    rows = {name: t[f"{name}.weight"].flatten(1).sum(1) for name in "ab"}
    return {"a": rows["a"] + t["bn.weight"] + t["bn.bias"], "b": rows["b"] + t["b.bias"]}


def distances(program: Program) -> Scores:
    rows = {name: weights(program)[f"{name}.weight"].flatten(1).numpy() for name in "ab"}
    return {
        name: torch.tensor([np.linalg.norm(filters - one, axis=1).sum() for one in filters])
        for name, filters in rows.items()
    }


OF_CHANNELS: dict[str, Callable[[Program], Scores]] = {
    "l1": lambda program: both_sides(program, OF_WEIGHTS["l1"](program), gamma(program).abs()),
    "l2": lambda program: both_sides(program, OF_WEIGHTS["l2"](program), gamma(program).square()),
    "bn-scale": lambda program: {"a": gamma(program).abs()},
    "taylor": taylor_of_channels,
    "fpgm": distances,
    "wanda": lambda program: both_sides(program, OF_WEIGHTS["wanda"](program)),
}
OF_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.mean, "l2": torch.mean, "taylor": torch.sum}


def channels_left(before: Program, after: Program) -> dict[str, Tensor]:
    """Of the first two layers which output channels are still there, told by values that differ in all."""
    marks = {"a": "bn.weight", "b": "b.bias"}
    return {
        name: torch.isin(before.get_parameter(mark), after.get_parameter(mark))
        for name, mark in marks.items()
    }


CLAIMS = [
    pytest.param(name, granularity, id=f"{name} {granularity}")
    for name, row in CRITERIA.items()
    for granularity in row.granularities
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "granularity"), CLAIMS)
def test_rows_a_criterion_prunes_what_it_claims_lowest_scores_first(
    name: str, granularity: Granularity
) -> None:
    program = tower()
    result = pruned(program, criterion=name, bn_recalibration=False, **SETTINGS[granularity]).program
    if granularity is WEIGHTS and name in OF_WEIGHTS:
        masks = {key: value != 0 for key, value in weights(result).items()}
        scores = OF_WEIGHTS[name](program)
        for key, mask in masks.items():
            assert mask.all() or scores[key][~mask].max() <= scores[key][mask].min() * (1 + 1e-5)
        assert sum(int((~mask).sum()) for mask in masks.values()) * 2 == sum(
            m.numel() for m in masks.values()
        )
    if granularity is CHANNELS and name in OF_CHANNELS:
        kept, gone = channels_left(program, result), 0
        for key, score in OF_CHANNELS[name](program).items():
            gone += int((~kept[key]).sum())
            assert kept[key].all() or score[~kept[key]].max() <= score[kept[key]].min() * (1 + 1e-5)
        assert gone
    if granularity is LAYERS and name in OF_LAYERS:
        scores = OF_WEIGHTS[name](program)
        order = sorted(BRANCHES, key=lambda branch: float(OF_LAYERS[name](scores[f"{branch}.weight"])))
        assert result.history[-1]["removed"] == order[:1]


@pytest.mark.parametrize("name", CRITERIA)
def test_rows_a_criterion_refuses_what_it_does_not_claim(name: str) -> None:
    for granularity in {WEIGHTS, CHANNELS, LAYERS}.difference(CRITERIA[name].granularities):
        with pytest.raises(UsageError, match=f"criterion {name} cannot rank {granularity}"):
            PruneConfig(criterion=name, **SETTINGS[granularity])


@pytest.mark.parametrize("name", [n for n, r in CRITERIA.items() if r.needs_data])
def test_rows_a_criterion_says_that_it_needs_data(name: str) -> None:
    with pytest.raises(UsageError, match=f"criterion {name} needs data"):
        pruned(tower(), Context(), criterion=name, **SETTINGS[CRITERIA[name].granularities[0]])


BLIND = [n for n, r in CRITERIA.items() if WEIGHTS in r.granularities and not r.needs_data]


@pytest.mark.parametrize("name", BLIND)
def test_rows_a_criterion_without_data_prunes_a_state_dict_as_it_does_the_network(name: str) -> None:
    program, settings = tower(), PruneConfig(criterion=name, **SETTINGS[WEIGHTS])
    state = apply_to_state(program.state_dict(), {}, settings).state
    same = pruned(program, Context(), criterion=name, **SETTINGS[WEIGHTS]).program
    assert all(torch.equal(value, state[key]) for key, value in weights(same).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "granularity"),
    [pytest.param(n, g, id=f"{n} {g}") for n, row in ALLOCATIONS.items() for g in row.granularities],
)
def test_rows_an_allocation_shares_out_what_it_claims(name: str, granularity: Granularity) -> None:
    result = pruned(tower(), allocation=name, **SETTINGS[granularity])
    assert result.program.history[-1]["allocation"] == name


@pytest.mark.parametrize("name", STRUCTURES)
def test_rows_a_structure_makes_a_file_that_runs(name: str, tmp_path: Path) -> None:
    row, program = STRUCTURES[name], tower()
    settings = SETTINGS[row.granularity] | {"structure": "2:4" if row.spelling else name}
    if row.spelling:
        del settings["sparsity"]
    result = pruned(program, **settings)
    write_program(result.program, tmp_path / "p.safetensors")
    read = read_program(tmp_path / "p.safetensors")
    state, stored = result.program.state_dict(), read.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in state.items())
    torch.testing.assert_close(read(IMAGES), result.program(IMAGES))
    nonzero = sum(int(torch.count_nonzero(tensor)) for tensor in read.parameters())
    assert nonzero < sum(tensor.numel() for tensor in program.parameters())
    shrunk = {tuple(t.shape) for t in read.parameters()} != {tuple(t.shape) for t in program.parameters()}
    assert shrunk is not row.granularity.leaves_zeros or row.granularity is LAYERS


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits?split=train").sample(64)


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(x)).flatten(1))
        return result


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_a_schedule_reaches_the_target_and_trains_what_is_left(name: str, digits: Data) -> None:
    program, config = captured(Digits(), 1, 8, 8), TrainConfig(epochs=3, batch_size=32, lr=0.05)
    within = Context(data=digits, training=Training(digits, config=config))
    criteria = (
        [n for n, r in CRITERIA.items() if r.while_training] if SCHEDULES[name].while_training else ["l2"]
    )
    for criterion in criteria:
        result = pruned(program, within, schedule=name, criterion=criterion, **SETTINGS[WEIGHTS])
        after, before = weights(result.program), weights(program)
        assert any(bool((after[key] != before[key])[after[key] != 0].any()) for key in after)
    if SCHEDULES[name].trains:
        with pytest.raises(UsageError, match="give train"):
            pruned(program, Context(data=digits), schedule=name, **SETTINGS[WEIGHTS])


def macs(program: Program) -> int:
    with FlopCounterMode(display=False) as counter:
        program(torch.zeros(1, *program.input.shape))
    return counter.get_total_flops()


def parameters(program: Program) -> int:
    return sum(int(torch.count_nonzero(tensor)) for tensor in program.parameters())


FIGURES: dict[str, Callable[[Program], int]] = {"flops": macs, "params": parameters, "latency": parameters}
"""Counted by other means; a clock that counts parameters stands in for the real one."""
TARGET_CASES = [
    pytest.param(name, granularity, id=f"{name} {granularity}")
    for name, row in TARGETS.items()
    for granularity in (WEIGHTS, CHANNELS)
    if not (granularity.leaves_zeros and row.obstacle)
]


@pytest.mark.parametrize(("name", "granularity"), TARGET_CASES)
def test_rows_a_target_is_reached_as_counted_by_other_means(
    name: str, granularity: Granularity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, wanted = tower(), 0.5 if TARGETS[name].of_units else 0.7
    monkeypatch.setattr(Timer, "fraction", lambda timer, other: parameters(other) / parameters(program))
    settings = {key: value for key, value in SETTINGS[granularity].items() if key != "sparsity"}
    result = pruned(program, **settings, **{name: wanted}).program
    if name in FIGURES:
        assert FIGURES[name](result) / FIGURES[name](program) == pytest.approx(wanted, abs=TOLERANCE)
    if name == "bytes":
        files = [tmp_path / "before.safetensors", tmp_path / "after.safetensors"]
        for file, each in zip(files, (program, result), strict=True):
            write_program(each, file)
        assert files[1].stat().st_size / files[0].stat().st_size == pytest.approx(wanted, abs=TOLERANCE)
    if name == "sparsity" and granularity is WEIGHTS:
        zeros = sum(int((w == 0).sum()) for w in weights(result).values())
        assert zeros / sum(w.numel() for w in weights(result).values()) == pytest.approx(
            wanted, abs=TOLERANCE
        )
