"""Targets: the search, the order in which channels go, and figures counted by other means."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from prune_cases import captured, net
from torch import Tensor, nn

from modelopt_cli.artifact import write_program
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.figures import Timer, half_width
from modelopt_cli.methods.prune.removal_order import GroupUnits, counts_after, removal_path
from modelopt_cli.methods.prune.target_figures import (
    CLOSE,
    TOLERANCE,
    TargetNotReached,
    search_path,
    search_ratio,
)
from modelopt_cli.program import Program


class Chain(nn.Module):
    """Convolutions whose cost can be written down, and a classifier."""

    def __init__(self, *widths: int, classes: int = 10) -> None:
        super().__init__()
        sizes = itertools.pairwise((3, *widths))
        self.convs = nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in sizes))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


SIDE = 6


def chain(*widths: int) -> Program:
    torch.manual_seed(0)
    return captured(Chain(*widths), 3, SIDE, SIDE)


def widths_of(program: Program) -> list[int]:
    return [m.out_channels for m in program.modules() if isinstance(m, nn.Conv2d)]


def macs(widths: list[int]) -> int:
    """Of a ``Chain``, from the formula."""
    return sum(9 * i * o * SIDE * SIDE for i, o in itertools.pairwise([3, *widths])) + 10 * widths[-1]


def numbers(widths: list[int]) -> int:
    return sum(9 * i * o for i, o in itertools.pairwise([3, *widths])) + 10 * widths[-1] + 10


def pruned(program: Program, **settings: object) -> MethodResult:
    return apply(program, PruneConfig(**settings), Context())  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(30))
def test_targets_a_path_is_searched_to_the_nearest_step(seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = int(random.integers(0, 400))
    drops = random.random(steps) ** random.integers(1, 12)
    left = 1 - np.concatenate([[0], np.cumsum(drops)]) / max(1e-9, drops.sum() * random.uniform(1, 2))
    wanted, asked = float(random.uniform(-0.1, 1.1)), []

    def at(step: int) -> float:
        asked.append(step)
        return float(left[step])

    found = search_path(at, steps, wanted)
    nearest = np.abs(left - wanted).min()
    assert found.kept == left[found.place]
    assert abs(found.kept - wanted) == pytest.approx(nearest) or abs(found.kept - wanted) <= CLOSE
    assert found.above == 0 or left[found.above] > wanted
    assert len(asked) == len(set(asked)) <= 2 * np.log2(steps + 2) + 4


def test_targets_a_ratio_is_searched_within_its_bounds() -> None:
    assert search_ratio(lambda ratio: 1 - ratio**2, 0.19, 0.5) == pytest.approx(0.9, abs=1e-3)
    asked: list[float] = []
    best = search_ratio(lambda ratio: asked.append(ratio) or 1 - ratio, 0.1, 0.9, 0.2, 0.5)  # type: ignore[func-returns-value]
    assert best == pytest.approx(0.5, abs=1e-6)
    assert all(0.2 <= ratio <= 0.5 for ratio in asked)


def rungs(*counts: int, width: int = 1, step: int = 1) -> dict[str, GroupUnits]:
    g = torch.Generator().manual_seed(1)
    return {f"g{i}": GroupUnits(n, width, step, torch.rand(n, generator=g)) for i, n in enumerate(counts)}


@pytest.mark.parametrize(
    ("units", "width", "step", "round_to", "kept"),
    [
        pytest.param(20, 1, 1, 8, (20, 16, 8), id="multiples-of-8"),
        pytest.param(16, 1, 1, 8, (16, 8), id="whole"),
        pytest.param(6, 1, 1, 8, (6,), id="too-few"),
        pytest.param(6, 1, 1, 1, (6, 5, 4, 3, 2, 1), id="one-by-one"),
        pytest.param(4, 64, 1, 8, (4, 3, 2, 1), id="heads"),
        pytest.param(8, 2, 1, 8, (8, 4), id="pairs"),
        pytest.param(12, 1, 3, 2, (12, 6), id="step-of-3"),
    ],
)
def test_targets_rungs(units: int, width: int, step: int, round_to: int, kept: tuple[int, ...]) -> None:
    assert GroupUnits(units, width, step, torch.rand(units)).counts(round_to) == kept


@pytest.mark.parametrize("round_to", [1, 8])
def test_targets_a_path_leads_from_everything_to_the_fewest_units(round_to: int) -> None:
    groups = rungs(40, 17, 8, 64)
    steps = removal_path(groups, lambda ratio: dict.fromkeys(groups, ratio), round_to)
    counts = {name: group.units for name, group in groups.items()}
    for step in steps:
        assert counts[step.group] == step.before > step.kept
        counts[step.group] = step.kept
    assert counts == counts_after(groups, steps) == {n: g.counts(round_to)[-1] for n, g in groups.items()}


def test_targets_a_uniform_path_keeps_the_groups_at_one_fraction() -> None:
    groups = rungs(100, 50, 25)
    steps = removal_path(groups, lambda ratio: dict.fromkeys(groups, ratio), 1)
    for taken in range(0, len(steps), 7):
        fractions = [n / groups[g].units for g, n in counts_after(groups, steps[:taken]).items()]
        assert max(fractions) - min(fractions) <= 1 / 25 + 1 / 50


def test_targets_the_best_units_stay() -> None:
    group = GroupUnits(5, 1, 1, torch.tensor([0.3, 0.1, 0.9, 0.3, 0.2]))
    assert group.best(3) == (0, 2, 3)
    assert group.best(2) == (0, 2)  # of two equals, the first


@pytest.mark.parametrize(
    ("wanted", "allocation"), [(0.25, "uniform"), (0.5, "global"), (0.8, "lamp"), (0.5, "erk")]
)
def test_targets_flops_are_what_the_formula_says(wanted: float, allocation: str) -> None:
    program = chain(64, 96, 128)
    result = pruned(program, flops=wanted, allocation=allocation)
    assert result.target is not None
    assert result.target.reached == pytest.approx(macs(widths_of(result.program)) / macs([64, 96, 128]))
    assert result.program.history[-1]["target"]["reached"] == round(result.target.reached, 4)
    assert abs(result.target.reached - wanted) <= TOLERANCE


def test_targets_params_of_channels_are_what_is_there() -> None:
    result = pruned(chain(64, 96, 128), params=0.4)
    assert result.target is not None
    ratio = numbers(widths_of(result.program)) / numbers([64, 96, 128])
    assert result.target.reached == pytest.approx(ratio)
    assert abs(ratio - 0.4) <= TOLERANCE


def test_targets_params_of_weights_are_what_is_not_zero() -> None:
    program = chain(16, 32)
    result = pruned(program, structure="unstructured", params=0.3)
    assert result.target is not None
    state = {name: t.numpy() for name, t in result.program.state_dict().items()}
    ratio = sum(map(np.count_nonzero, state.values())) / numbers([16, 32])
    assert result.target.reached == pytest.approx(ratio)
    assert ratio == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"structure": "unstructured"}, {"structure": "block", "block": 8}, {"structure": "channels"}],
    ids=lambda s: s["structure"],
)
def test_targets_bytes_are_those_of_the_files(settings: dict[str, object], tmp_path: Path) -> None:
    program = chain(32, 64, 64)
    result = pruned(program, bytes=0.35, **settings)
    before = write_program(program, tmp_path / "before.safetensors").file_bytes
    after_ = write_program(result.program, tmp_path / "after.safetensors").file_bytes
    assert result.target is not None
    assert result.target.reached == pytest.approx(after_ / before, abs=1e-5)
    assert after_ / before == pytest.approx(0.35, abs=TOLERANCE)
    assert result.program.history[-1]["target"]["reached"] == pytest.approx(after_ / before, abs=1e-4)


def test_targets_channels_stay_multiples_of_eight_where_that_is_enough() -> None:
    result = pruned(chain(128, 160, 192), flops=0.5)
    assert all(width % 8 == 0 for width in widths_of(result.program))
    assert not any("multiple" in note for note in result.notes)


def test_targets_the_rounding_gives_way_for_the_target_and_says_so() -> None:
    result = pruned(chain(16, 24), flops=0.5)
    widths = widths_of(result.program)
    assert abs(macs(widths) / macs([16, 24]) - 0.5) <= TOLERANCE
    uneven = [f"convs.{i}" for i, width in enumerate(widths) if width % 8]
    (note,) = (note for note in result.notes if "multiple of 8" in note)
    assert uneven
    assert note.endswith(": " + ", ".join(uneven))


def test_targets_below_the_least_that_rounding_keeps_are_reached() -> None:
    result = pruned(chain(32, 32), params=0.02)
    assert min(widths_of(result.program)) < 8


def test_targets_that_cannot_be_reached_exit_with_1_and_name_the_nearest() -> None:
    program = chain(8, 8)
    with pytest.raises(
        TargetNotReached, match=r"flops 0.001 is not reached: the nearest found is 0\.\d+"
    ) as caught:
        pruned(program, flops=0.001)
    assert caught.value.exit_code == 1


def test_targets_a_latency_is_searched_by_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts parameters, the search must end at the parameters of its reading."""
    whole = numbers([64, 64])

    def clock(timer: Timer, candidate: Program) -> float:
        return numbers(widths_of(candidate)) / whole

    monkeypatch.setattr(Timer, "fraction", clock)
    result = pruned(chain(64, 64), latency=0.6)
    assert result.target is not None
    assert result.target.reached == pytest.approx(0.6, abs=TOLERANCE)
    assert "reached" not in result.program.history[-1]["target"]


@pytest.mark.slow
def test_targets_a_network_takes_as_long_as_itself() -> None:
    program = net()
    assert Timer(program).fraction(program) == pytest.approx(1, abs=0.1)


def test_targets_the_interval_of_a_median_comes_from_order_statistics() -> None:
    # n = 15: the 4th and the 12th value bound the median with a confidence of 96.5 %.
    values = [float(i**2) for i in range(1, 16)]
    assert half_width(values) == (12**2 - 4**2) / 2


class Grouped(nn.Module):
    """A norm ties eight channels to a unit; a layer next to it has units of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32)
        self.b, self.fc = nn.Conv2d(32, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(torch.relu(self.b(self.norm(self.a(x)))).mean((2, 3)))
        return result


@pytest.mark.parametrize(("sparsity", "gone"), [(0.5, 24), (0.25, 12)])
def test_targets_sparsity_counts_channels_not_units(sparsity: float, gone: int) -> None:
    torch.manual_seed(0)
    program = captured(Grouped(), 3, SIDE, SIDE)
    result = pruned(program, sparsity=sparsity, round_to=1)
    assert 48 - sum(widths_of(result.program)) == pytest.approx(gone, abs=48 * TOLERANCE)
