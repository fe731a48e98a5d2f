"""Coverage by bytes, against what the layers held before anything was done to them, counted by hand."""

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_status import Coverage, LayerStatus
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.apply import apply as prune
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

FLOAT = 4


class Net(nn.Module):
    """A convolution, residual linears, a weight that no layer has, two linears with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.loose = nn.Parameter(torch.randn(8, 8))
        self.head, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).mean((2, 3)))
        x = x + torch.relu(self.one(x))
        x = x + torch.relu(self.two(x))
        return self.tied(torch.relu(self.head(x @ self.loose)))


LINEAR, CONV = FLOAT * 8 * 8, FLOAT * 8 * 3 * 3 * 3


def program() -> Program:
    return capture(Net().eval(), InputSpec((3, 8, 8)))


def sizes(covered: Coverage) -> dict[str, int]:
    return {layer.name: layer.bytes for layer in covered.layers}


def test_every_weight_counts_once() -> None:
    expected = {"conv": CONV, "one": LINEAR, "two": LINEAR, "head": LINEAR, "tied": 0, "loose": LINEAR}
    assert sizes(coverage(program())) == expected
    assert coverage(program()).bytes == CONV + 4 * LINEAR


def test_integers_count_as_the_floats_they_replace() -> None:
    config = QuantizeConfig(scheme="int8-dynamic", exclude=("head", "tied"))
    made = quantize(program(), config, Context()).program
    covered = coverage(made)
    found = {layer.name: (layer.compressed, layer.bytes) for layer in covered.layers}
    assert found["one"] == found["two"] == (True, LINEAR)
    assert found["conv"] == (False, CONV)
    assert covered.byte_fraction == pytest.approx(2 * LINEAR / (CONV + 4 * LINEAR))
    assert covered.fraction == 2 / 6


def test_what_was_pruned_counts_as_it_was() -> None:
    config = PruneConfig(structure="channels", sparsity=0.5, round_to=2, allocation="uniform")
    made = prune(program(), config, Context()).program
    weight = made.get_submodule("conv").weight
    assert weight.numel() < 8 * 27
    assert sizes(coverage(made))["conv"] == pytest.approx(CONV, rel=1e-3)  # shares have four places


def test_what_is_gone_counts_as_it_was() -> None:
    config = PruneConfig(structure="layers", sparsity=0.5, include=("one", "two"))
    made = prune(program(), config, Context()).program
    covered = coverage(made)
    (gone,) = (layer for layer in covered.layers if layer.kind == "removed")
    assert (gone.compressed, gone.bytes) == (True, LINEAR)
    assert covered.bytes == coverage(program()).bytes


def test_a_history_that_does_not_say_how_large_what_is_gone_was() -> None:
    made = program()
    made.history = ({"method": "prune", "removed": ["old"]},)
    assert sizes(coverage(made))["old"] == 0


def test_reasons_are_grouped_and_those_with_most_bytes_come_first() -> None:
    covered = Coverage(
        (
            LayerStatus("a", "Linear", False, reason="small", bytes=1),
            LayerStatus("b", "Linear", False, reason="large", bytes=50),
            LayerStatus("c", "Linear", True, "int8", bytes=30),
            LayerStatus("d", "Linear", False, reason="small", bytes=19),
        )
    )
    groups = [(reason, [layer.name for layer in layers]) for reason, layers in covered.left_out]
    assert groups == [("large", ["b"]), ("small", ["a", "d"])]
    assert (covered.fraction, covered.byte_fraction) == (0.25, 0.3)
    assert Coverage(()).byte_fraction == 0.0


class Recurrent(nn.Module):
    """A layer with two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(10, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


@pytest.mark.parametrize(
    ("include", "share"), [(("*",), 1.0), (("*weight_ih*",), 10 / 18), (("*weight_hh*",), 8 / 18)]
)
def test_of_several_weights_those_count_that_are_compressed(include: tuple[str, ...], share: float) -> None:
    given = capture(Recurrent().eval(), InputSpec((5, 10)))
    made = quantize(given, QuantizeConfig(scheme="int8-weight", include=include), Context()).program
    covered = coverage(made)
    assert covered.bytes == FLOAT * 3 * 8 * (10 + 8)
    assert covered.byte_fraction == pytest.approx(share)


def test_of_two_methods_each_counts_what_it_changed() -> None:
    """The recurrent layer was pruned in both of its weights, and one is stored in int8 afterwards."""
    given = capture(Recurrent().eval(), InputSpec((5, 10)))
    config = PruneConfig(structure="unstructured", sparsity=0.5, allocation="uniform")
    pruned = prune(given, config, Context()).program
    include = ("*weight_ih*",)
    made = quantize(pruned, QuantizeConfig(scheme="int8-weight", include=include), Context()).program
    assert coverage(made).byte_fraction == 1
    covered = coverage(made, given=pruned)
    (layer,) = covered.layers
    assert (layer.compressed, layer.before) == (True, "sparse 50 %")
    assert covered.byte_fraction == pytest.approx(10 / 18)
    (layer,) = coverage(pruned, given=pruned).layers
    assert (layer.compressed, layer.scheme, layer.before) == (False, "", "sparse 50 %")


def test_what_an_earlier_method_removed_is_none_of_a_later_one() -> None:
    config = PruneConfig(structure="layers", sparsity=0.5, include=("one", "two"))
    made = prune(program(), config, Context()).program
    assert [layer.kind for layer in coverage(made, given=program()).layers].count("removed") == 1
    assert not [layer for layer in coverage(made, given=made).layers if layer.kind == "removed"]


class Attending(nn.Module):
    """Attention, which methods take apart, and two linears of which the first can lose units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(x, x, x, need_weights=False)[0]
        return x + self.two(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def sparse() -> Program:
    given = capture(Attending().eval(), InputSpec((5, 8)))
    config = PruneConfig(structure="unstructured", sparsity=0.5, allocation="uniform")
    return prune(given, config, Context()).program


def test_a_part_of_a_layer_has_the_reason_of_the_layer() -> None:
    given = capture(Attending().eval(), InputSpec((5, 8)))
    covered = coverage(given, [{"skipped": {"mixed": "its mask differs"}}])
    reasons = {layer.name: layer.reason for layer in covered.layers}
    assert reasons["mixed"] == reasons["mixed.out_proj"] == "its mask differs"
    assert reasons["one"] == "not selected"


ATTENTION = {"mixed.in_proj", "mixed.out_proj"}


def test_attention_was_sparse_before_it_was_taken_apart_for_int8(sparse: Program) -> None:
    made = quantize(sparse, QuantizeConfig(scheme="int8-dynamic"), Context()).program
    covered = coverage(made, given=sparse)
    assert {layer.name for layer in covered.layers} == ATTENTION | {"one", "two"}
    for layer in covered.layers:
        weight = made.get_submodule(layer.name).weight
        zeros = 100 * (weight == 0).double().mean().item()
        assert zeros >= 50  # rounding adds some
        assert (layer.compressed, layer.before) == (True, "sparse 50 %"), layer.name
        assert layer.scheme == f"int8-dynamic, sparse {zeros:.0f} %"
    assert {layer.scheme for layer in coverage(made).layers} == {layer.scheme for layer in covered.layers}


def test_attention_that_channel_pruning_took_apart_alone_is_not_pruned_by_it(sparse: Program) -> None:
    config = PruneConfig(sparsity=0.5, include=("one",))
    made = prune(sparse, config, Context()).program
    found = {layer.name: layer for layer in coverage(made, given=sparse).layers}
    assert {name for name, layer in found.items() if layer.compressed} == {"one", "two"}
    for name in ATTENTION:
        assert (found[name].scheme, found[name].before) == ("", "sparse 50 %")
