"""Sensitivities against the definition in numpy, what an allocation makes of them, and their picture."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from prune_cases import captured, context, net, smooth
from torch import Tensor, nn

from modelopt_cli import report
from modelopt_cli.errors import EnvironmentFailure, UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.apply import apply, sensitivity
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.sensitivity import Point, Sensitivity, curves
from modelopt_cli.methods.reference_outputs import compare
from modelopt_cli.program import Program

IMAGES = smooth(24, 3, 12, 12)
WEIGHTS = PruneConfig(structure="unstructured")


def _by_hand(unpruned: Program, pruned: Program) -> tuple[float, float]:
    """KL(unpruned || pruned), mean over the samples, and the share of equal predictions, in float64."""
    with torch.no_grad():
        p, q = (network(IMAGES).double().numpy() for network in (unpruned, pruned))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (p, q))
    return float((p * np.log(p / q)).sum(1).mean()), float((p.argmax(1) == q.argmax(1)).mean())


def test_sensitivity_of_a_layer_is_that_of_the_network_with_it_pruned_alone() -> None:
    program = net()
    table = {part.name: part for part in sensitivity(program, WEIGHTS, context(IMAGES))}
    assert list(table) == ["stem", "body", "grouped", "dw", "fc"]
    point = table["body"].points[2]
    assert point.sparsity == 0.75
    pruned = net()
    weight = pruned.get_parameter("body.weight")
    order = np.argsort(weight.detach().abs().numpy().ravel(), kind="stable")
    with torch.no_grad():
        weight.view(-1)[torch.from_numpy(order[: round(0.75 * len(order))])] = 0
    divergence, agreement = _by_hand(program, pruned)
    assert point.divergence == pytest.approx(divergence, rel=1e-4)
    assert point.agreement == agreement


def test_sensitivity_of_channels_is_that_of_the_network_without_them() -> None:
    program = net()
    table = sensitivity(program, PruneConfig(), context(IMAGES))
    part = next(part for part in table if "stem" in part.layers)
    assert part.layers == ("stem", "body")  # the residual couples them
    removed = apply(
        program,
        PruneConfig(include=part.layers, sparsity=0.5, round_to=1, bn_recalibration=False),
        Context(),
    )
    point = next(point for point in part.points if point.sparsity == 0.5)
    divergence, agreement = _by_hand(program, removed.program)
    assert point.divergence == pytest.approx(divergence, rel=1e-4)
    assert point.agreement == agreement


def test_sensitivity_is_the_same_twice_and_leaves_the_network_alone() -> None:
    program = net()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    assert sensitivity(program, WEIGHTS, context(IMAGES)) == sensitivity(program, WEIGHTS, context(IMAGES))
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


@pytest.mark.parametrize(("structure", "sparsities"), [("2:4", {0.5}), ("layers", {1.0})])
def test_sensitivity_of_what_has_one_form_is_one_point(structure: str, sparsities: set[float]) -> None:
    table = sensitivity(net(), PruneConfig(structure=structure), context(IMAGES))
    assert {point.sparsity for part in table for point in part.points} == sparsities
    assert all(len(part.points) == 1 for part in table)


def test_sensitivity_needs_data_but_no_labels_and_no_target() -> None:
    with pytest.raises(UsageError, match="measured on data"):
        sensitivity(net(), WEIGHTS, Context())


def test_sensitivity_of_equal_answers_is_nothing() -> None:
    logs = torch.log_softmax(torch.randn(7, 4, dtype=torch.float64), 1)
    assert Point(0.5, *compare(logs, logs)) == Point(0.5, 0.0, 1.0)
    broken = Point(0.5, *compare(logs, torch.full_like(logs, float("nan"))))
    assert broken.divergence == float("inf")


class Half(nn.Module):
    """Two equal layers of which only one matters."""

    def __init__(self) -> None:
        super().__init__()
        self.matters, self.idle, self.out = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(64, 4)
        with torch.no_grad():
            self.out.weight[:, 32:] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.cat((self.matters(x), self.idle(x)), 1))
        return result


@pytest.mark.parametrize(
    ("structure", "settings"), [("unstructured", {"exclude": ("out",)}), ("channels", {"round_to": 1})]
)
def test_sensitivity_as_an_allocation_takes_from_what_does_not_matter(
    structure: str, settings: dict[str, object]
) -> None:
    torch.manual_seed(0)
    program = captured(Half(), 8)
    config = PruneConfig(
        structure=structure,
        allocation="sensitivity",
        sparsity=0.4,
        **settings,  # type: ignore[arg-type]
    )
    result = apply(program, config, context(torch.randn(64, 8)))
    left = {
        name: int(torch.count_nonzero(result.program.get_parameter(f"{name}.weight")))
        for name in ("matters", "idle")
    }
    assert left["idle"] < 0.5 * left["matters"]
    assert result.program.history[-1]["calibration"] == "tensor"


def test_sensitivity_curves_go_steeply_beyond_what_was_measured() -> None:
    part = Sensitivity("a", ("a",), (Point(0.5, 0.1, 1.0), Point(0.9, 0.4, 0.9)))
    assert curves([part]) == {"a": [(0.5, 0.1), (0.9, 0.4), (1.0, 1.8)]}


TABLE = (
    Sensitivity("stem", ("stem",), (Point(0.25, 0.0, 1.0), Point(0.5, 0.2, 0.75))),
    Sensitivity("a.b", ("a.b", "c"), (Point(0.25, 1e-5, 1.0),)),
)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_sensitivity_is_drawn_to_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for path in paths:
        report.plot_sensitivity(TABLE, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    start = paths[0].read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in paths[0].read_bytes()


def test_sensitivity_drawing_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(EnvironmentFailure, match=r"modelopt-cli\[plots\]") as caught:
        report.plot_sensitivity(TABLE, tmp_path / "x.png")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(UsageError, match="picture"):
        report.require_plots("table.txt")
