"""The groups that channel analysis finds, against groups derived by hand."""

import pytest
import torch
from channels_attention import ATTENTION, UNDIVIDED
from channels_networks import CASES, FROZEN, Case
from channels_sequences import SEQUENCES, STATES
from torch import nn
from torchvision import models

from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import Group, analyse

Positions = dict[tuple[str, int], list[list[int]]]


def captured(case: Case) -> Program:
    torch.manual_seed(0)
    return capture(case.make().eval(), InputSpec(case.shape), verify=False)


KNOWN = {**CASES, **SEQUENCES, **ATTENTION, **FROZEN, **STATES, **UNDIVIDED}


@pytest.mark.parametrize("name", KNOWN)
def test_groups_and_frozen_layers(name: str) -> None:
    case = KNOWN[name]
    found = analyse(captured(case))
    assert {group.name: group.units for group in found.groups} == case.groups
    assert found.frozen.keys() == case.frozen.keys()
    for layer, reason in case.frozen.items():
        assert reason in found.frozen[layer]


def members(group: Group) -> Positions:
    return {(m.parameter, m.dim): [part.tolist() for part in m.index] for m in group.members}


def singles(count: int, start: int = 0) -> list[list[int]]:
    return [[start + i] for i in range(count)]


def test_a_residual_stream_is_one_group() -> None:
    group = analyse(captured(CASES["residual"]))["a"]
    norm = [("bn." + name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    outputs = [("a.weight", 0), ("a.bias", 0), ("c.weight", 0), ("c.bias", 0)]
    assert members(group) == dict.fromkeys([*norm, *outputs, ("b.weight", 1), ("fc.weight", 1)], singles(6))
    assert group.layers == ("a", "bn", "b", "c", "fc")
    roles = {m.parameter: m.role for m in group.members if m.dim == 0}
    assert roles == {
        **{"a.weight": "out", "a.bias": "bias", "c.weight": "out", "c.bias": "bias"},
        **{
            "bn.weight": "norm",
            "bn.bias": "bias",
            "bn.running_mean": "statistic",
            "bn.running_var": "statistic",
        },
    }
    assert {m.role for m in group.members if m.dim == 1} == {"in"}


def test_concatenated_channels_keep_their_offsets() -> None:
    found = analyse(captured(CASES["concatenation"]))
    assert members(found["a"])[("c.weight", 1)] == singles(4)
    assert members(found["b"])[("c.weight", 1)] == singles(3, start=4)


def test_a_flattened_channel_is_a_block_of_columns() -> None:
    found = analyse(captured(CASES["flatten"]))
    assert members(found["0"])[("3.weight", 1)] == [list(range(64 * c, 64 * c + 64)) for c in range(6)]


def test_groups_of_a_convolution_stay_equal() -> None:
    found = analyse(captured(CASES["grouped"]))
    assert members(found["0"])[("0.weight", 0)] == [[0, 3], [1, 4], [2, 5]]
    assert members(found["0"])[("1.weight", 1)] == singles(3)
    assert members(found["1"])[("1.weight", 0)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert members(found["1"])[("2.weight", 1)] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_depthwise_filter_goes_with_its_input() -> None:
    found = analyse(captured(CASES["depthwise with a multiplier"]))
    pairs = [[2 * c, 2 * c + 1] for c in range(4)]
    assert members(found["0"]) == {
        **{("0.weight", 0): singles(4), ("0.bias", 0): singles(4)},
        **{("1.weight", 0): pairs, ("1.bias", 0): pairs, ("4.weight", 1): pairs},
    }


def test_a_shuffle_leads_each_channel_to_its_reader() -> None:
    found = analyse(captured(CASES["channel shuffle and chunk"]))
    # Shuffled: a0 b0 a1 b1 | a2 b2 a3 b3; the second half is what c reads, the first goes past it.
    # c would read nothing without a2, a3, b2 and b3, so a2 always stays.
    assert members(found["a"])[("c.weight", 1)] == [[], [], [2]]
    assert members(found["b"])[("c.weight", 1)] == [[], [], [1], [3]]
    assert members(found["a"])[("fc.weight", 1)] == [[0], [2]]
    assert members(found["c"])[("fc.weight", 1)] == singles(5, start=4)


def test_a_head_is_a_unit() -> None:
    found = analyse(captured(CASES["heads by one projection"]))
    packed = [[12 * part + 4 * h + i for part in range(3) for i in range(4)] for h in range(3)]
    assert members(found["qkv"]) == {
        **{("qkv.weight", 0): packed, ("qkv.bias", 0): packed},
        ("o.weight", 1): [list(range(4 * h, 4 * h + 4)) for h in range(3)],
    }


def test_a_position_bias_goes_with_its_head() -> None:
    group = analyse(captured(CASES["a position bias per head"]))["q"]
    assert members(group)[("table", 1)] == singles(3)
    assert [m.role for m in group.members if m.parameter == "table"] == ["tensor"]


def test_tokens_and_positions_go_with_the_stream() -> None:
    group = analyse(captured(CASES["class token, positions, layer scale"]))["patch"]
    tensors = {(m.parameter, m.dim) for m in group.members if m.role == "tensor"}
    assert tensors == {("cls", 2), ("pos", 2), ("scale", 0)}
    made = {m.parameter for m in group.members if m.makes_channels}
    assert made == {"patch.weight", "down.weight"}


def test_padding_keeps_what_it_is_added_to() -> None:
    found = analyse(captured(CASES["padding with channels"]))
    assert members(found["a"])[("b.weight", 0)] == singles(4, start=1)
    assert members(found["b"])[("b.weight", 0)] == [[0], [5], [6]]


@pytest.mark.slow
def test_no_weights_are_needed() -> None:
    with torch.device("meta"):
        model = models.vit_b_32()
    found = analyse(capture(model.eval(), InputSpec((3, 224, 224)), verify=False))
    assert [group.units for group in found.groups] == [768, *[12, 3072] * 12]


def test_layers_tied_by_their_weights_are_one() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential(nn.Linear(7, 6), first, nn.ReLU(), second, nn.Linear(6, 4)).eval()
    found = analyse(capture(model, InputSpec((7,)), verify=False))
    # The first input, both outputs and the second input are the two dimensions of one weight.
    assert members(found["0"])[("1.weight", 1)] == members(found["0"])[("1.weight", 0)] == singles(6)
    assert [group.units for group in found.groups] == [6]
