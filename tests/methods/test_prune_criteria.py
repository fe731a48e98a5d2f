"""Criteria: scores of weights and of channels against their papers' formulas, and what is refused."""

import math

import numpy as np
import pytest
import torch
from prune_cases import Samples, captured, context, net, smooth
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.channel_scores import unit_obstacle, unit_scores
from modelopt_cli.methods.prune.criteria import require_data
from modelopt_cli.methods.prune.criterion_statistics import collect, weight_scores
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.channels import Dependencies, analyse

NAMES = ["stem.weight", "body.weight", "grouped.weight", "dw.weight", "fc.weight"]


def _statistics(program: Program, criterion: str) -> dict[str, Tensor]:
    labels = torch.arange(12) % 5
    return collect(program, criterion, NAMES, context(smooth(12, 3, 12, 12), labels, batch_size=5))


def _weights(
    program: Program,
    criterion: str,
    statistics: dict[str, Tensor] | None = None,
    names: list[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    known = weights_of(program)
    weights = {name: known[name].detach() for name in names or known}
    return weight_scores(weights, criterion, Masks.of(program).masks, statistics, seed=seed)


def _channels(
    dependencies: Dependencies, criterion: str, statistics: dict[str, Tensor] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    program, groups = dependencies.program, dependencies.groups
    return unit_scores(program, groups, criterion, statistics or {}, seed=seed)


def test_criteria_scores_of_weights_follow_their_formulas() -> None:
    program = net()
    weights = {name: program.get_parameter(name).detach() for name in NAMES}
    given = {name: _statistics(program, name) for name in ("wanda", "taylor", "obs")}
    expected = {
        "l1": lambda n: weights[n].abs(),
        "l2": lambda n: weights[n] ** 2,
        "wanda": lambda n: weights[n].abs() * given["wanda"][n],
        "taylor": lambda n: given["taylor"][n],
        "obs": lambda n: weights[n].double() ** 2 * given["obs"][n],
    }
    for criterion, formula in expected.items():
        scores = _weights(program, criterion, given.get(criterion))
        assert list(scores) == NAMES
        for name in NAMES:
            torch.testing.assert_close(scores[name], formula(name), msg=f"{criterion} {name}")


def test_criteria_random_depends_on_seed_and_name_alone() -> None:
    program = net()
    first, other = (_weights(program, "random", seed=seed) for seed in (3, 4))
    alone = _weights(program, "random", names=["fc.weight"], seed=3)
    assert torch.equal(first["fc.weight"], alone["fc.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert not torch.equal(first["body.weight"].flatten()[:60], first["fc.weight"].flatten())


def test_criteria_rank_what_is_pruned_already_lowest() -> None:
    program = net()
    weight = program.get_parameter("fc.weight")
    weight.data[:, :5] = 0
    program.get_parameter("body.weight").data[0] = 0
    program.encodings = {"fc.weight": Encoding("sparse", {})}
    scores = _weights(program, "l1")
    assert torch.equal(torch.isneginf(scores["fc.weight"]), weight == 0)
    assert not torch.isneginf(scores["body.weight"]).any()


def test_criteria_score_the_projections_of_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return result

    scores = _weights(captured(Attention(), 5, 8), "l1")
    assert {name: tuple(score.shape) for name, score in scores.items()} == {
        "attention.in_proj_weight": (24, 8),
        "attention.out_proj.weight": (8, 8),
    }


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("wanda", None, "criterion wanda needs data to calibrate on; give calibration or data, or use"),
        ("obs", None, "criterion obs needs data to calibrate on"),
        ("taylor", Samples(torch.zeros(1)), "criterion taylor needs data with labels"),
    ],
)
def test_criteria_refuse(name: str, data: Samples | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_data(name, data)  # type: ignore[arg-type]


class Chain(nn.Module):
    """Three convolutions of which the first two lose channels, one with a batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3)
        self.c = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.relu(self.b(torch.relu(self.bn(self.a(x)))))).mean((2, 3))
        return result


def _chain() -> Program:
    torch.manual_seed(0)
    model = Chain()
    nn.init.uniform_(model.bn.weight, -1, 1)
    return captured(model, 3, 8, 8)


def _array(program: Program, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return program.get_parameter(name).detach().double().numpy()


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_criteria_magnitude_of_channels_is_averaged_over_tensors(criterion: str, power: int) -> None:
    program = _chain()
    scores = _channels(analyse(program), criterion)
    assert set(scores) == {"a", "b"}
    parts = [
        (np.abs(_array(program, "a.weight")) ** power).sum((1, 2, 3)),
        np.abs(_array(program, "bn.weight")) ** power,
        (np.abs(_array(program, "b.weight")) ** power).sum((0, 2, 3)),
    ]
    expected = np.mean([part / part.mean() for part in parts], axis=0)
    np.testing.assert_allclose(scores["a"].numpy(), expected)
    assert scores["b"].mean() == pytest.approx(1.0)


def test_criteria_channels_of_scaled_layers_score_the_same() -> None:
    program = _chain()
    before = _channels(analyse(program), "l2")
    program.get_parameter("b.weight").data.mul_(100)
    after = _channels(analyse(program), "l2")
    torch.testing.assert_close(before, after)


def test_criteria_bn_scale_is_the_norms_weight() -> None:
    program = _chain()
    dependencies = analyse(program)
    scores = _channels(dependencies, "bn-scale")
    assert set(scores) == {"a"}
    np.testing.assert_allclose(scores["a"].numpy(), np.abs(_array(program, "bn.weight")))
    assert unit_obstacle(program, dependencies["a"], "bn-scale") is None
    assert unit_obstacle(program, dependencies["b"], "bn-scale") == "no batch norm with weights"


def test_criteria_fpgm_is_the_distance_to_all_other_filters() -> None:
    program = _chain()
    scores = _channels(analyse(program), "fpgm")
    filters = _array(program, "b.weight").reshape(5, -1)
    sums = np.array([sum(math.dist(f, g) for g in filters) for f in filters])
    np.testing.assert_allclose(scores["b"].numpy(), sums / sums.mean())


def test_criteria_taylor_of_channels_sums_what_makes_them() -> None:
    program = _chain()
    labels = torch.arange(8) % 4
    given = collect(program, "taylor", [], context(smooth(8, 3, 8, 8), labels))
    scores = _channels(analyse(program), "taylor", given)
    t = {name: value.double() for name, value in given.items()}
    torch.testing.assert_close(scores["a"], t["a.weight"].sum((1, 2, 3)) + t["bn.weight"] + t["bn.bias"])
    torch.testing.assert_close(scores["b"], t["b.weight"].sum((1, 2, 3)) + t["b.bias"])


def test_criteria_wanda_of_channels_looks_at_both_sides() -> None:
    program = _chain()
    dependencies = analyse(program)
    given = collect(program, "wanda", ["a.weight", "b.weight", "c.weight"], context(smooth(8, 3, 8, 8)))
    scores = _channels(dependencies, "wanda", given)["a"]
    out = (_array(program, "a.weight").__abs__() * given["a.weight"].double().numpy()).sum((1, 2, 3))
    into = (_array(program, "b.weight").__abs__() * given["b.weight"].double().numpy()).sum((0, 2, 3))
    np.testing.assert_allclose(scores.numpy(), (out / out.mean() + into / into.mean()) / 2, rtol=1e-6)
    assert unit_obstacle(program, dependencies["a"], "wanda") is None


def test_criteria_of_coupled_channels_look_at_every_layer() -> None:
    """A residual: a channel that one of its layers needs is worth more than one that none needs."""
    program = net()
    dependencies = analyse(program)
    group = next(g for g in dependencies.groups if {"stem", "body"} <= set(g.layers))
    for member in group.members:
        if member.role in ("out", "in", "norm"):
            tensor = program.get_parameter(member.parameter)
            position = member.positions[member.units == 2]
            tensor.data.index_fill_(member.dim, position, 0.0)
    for criterion in ("l1", "l2"):
        scores = _channels(analyse(program), criterion)[group.name]
        assert int(scores.argmin()) == 2
        assert scores[2] == 0
    program = net()
    (maker,) = (m for m in group.members if m.parameter == "body.weight" and m.makes_channels)
    program.get_parameter("body.weight").data[maker.positions[maker.units == 2]] = 5.0
    assert int(_channels(analyse(program), "l2")[group.name].argmax()) == 2


def test_criteria_random_for_channels() -> None:
    program = _chain()
    dependencies = analyse(program)
    scores = _channels(dependencies, "random", seed=1)
    assert {name: len(score) for name, score in scores.items()} == {"a": 6, "b": 5}
    assert torch.equal(scores["a"], _channels(dependencies, "random", seed=1)["a"])


def test_criteria_weights_of_a_network_are_all_found() -> None:
    assert list(weights_of(net())) == NAMES
