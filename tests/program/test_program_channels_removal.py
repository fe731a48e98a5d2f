"""Networks without some channels compute what the whole ones compute with those channels zeroed."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from channels_attention import ATTENTION, UNDIVIDED
from channels_networks import CASES, FROZEN, Case, conv
from channels_sequences import SEQUENCES, STATES
from quick_cases import quick
from torch import Tensor, nn

from modelopt_cli import artifact
from modelopt_cli.errors import UsageError
from modelopt_cli.program import Encoding, InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import Dependencies, analyse, remove

Keep = dict[str, list[int]]
PRUNABLE = {**CASES, **SEQUENCES, **ATTENTION}
AGAIN = (
    *(
        "residual",
        "squeeze and excitation",
        "channel shuffle and chunk",
        "depthwise",
        "grouped",
        "group norm",
    ),
    *("flatten", "slices", "padding with channels", "heads by one projection", "bare weights"),
    *("a GRU of two layers and directions", "an LSTM that projects", "cells"),
    *("fewer heads of keys", "turned queries and keys"),
)
"""What may differ on the second time: offsets, groups, heads, gates, weights that functions use."""
WHOLE = {**FROZEN, **STATES, **UNDIVIDED}


def captured(case: Case) -> Program:
    torch.manual_seed(0)
    model = case.make().double().eval()
    for name, tensor in model.named_buffers():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
        assert tensor.numel(), name
    return capture(model, InputSpec(case.shape), verify=False)


def some(found: Dependencies, seed: int) -> Keep:
    """A random choice of at least one and at most all units of each group."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in found.groups:
        count = int(torch.randint(1, group.units + 1, (), generator=generator))
        keep[group.name] = sorted(torch.randperm(group.units, generator=generator)[:count].tolist())
    return keep


def zeroed(found: Dependencies, keep: Keep) -> Program:
    """The whole network, with zeros where removed channels are made and where they are read."""
    program = copy.deepcopy(found.program)
    state = program.state_dict()
    for group in found.groups:
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[keep[group.name]] = False
        for member in group.members:
            if member.role != "statistic":
                state[member.parameter].index_fill_(member.dim, member.positions[gone[member.units]], 0.0)
    return program


def sample(case: Case, batch: int = 3) -> Tensor:
    return torch.randn(batch, *case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@cache
def analysed(name: str) -> tuple[Program, Dependencies]:
    program = captured(PRUNABLE[name])
    return program, analyse(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNABLE)
def test_equals_the_zeroed_network(name: str, tmp_path: Path) -> None:
    """For two random choices, and for the least that can be left; and again after a file."""
    case, (program, found) = PRUNABLE[name], analysed(name)
    least = {group.name: [seed % group.units] for seed, group in enumerate(found.groups)}
    for keep in (some(found, 0), some(found, 1), least):
        smaller = remove(program, keep, dependencies=found)
        with torch.no_grad():
            expected = zeroed(found, keep)(sample(case))
            torch.testing.assert_close(smaller(sample(case)), expected, rtol=1e-10, atol=1e-10)
        for group in found.groups:
            for member in group.members:
                stay = torch.isin(member.units, torch.tensor(keep[group.name]))
                lost = int((~stay).sum())
                before = found.program.state_dict()[member.parameter].shape[member.dim]
                assert smaller.state_dict()[member.parameter].shape[member.dim] <= before - lost
    artifact.write_program(smaller, tmp_path / "net.safetensors")
    again = artifact.read_program(tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(again(sample(case)), smaller(sample(case)))


@pytest.mark.parametrize("name", quick(PRUNABLE, AGAIN))
def test_can_be_done_again(name: str) -> None:
    """Iterative pruning removes channels from what has lost some already."""
    case, (program, first) = PRUNABLE[name], analysed(name)
    between = remove(program, {g.name: list(range(g.units))[g.units // 3 :] for g in first.groups})
    second = analyse(between)
    keep = {g.name: list(range(g.units))[: -(-2 * g.units // 3)] for g in second.groups}
    smaller = remove(between, keep, dependencies=second)
    with torch.no_grad():
        expected = zeroed(second, keep)(sample(case))
        assert expected.std() > 1e-4
        torch.testing.assert_close(smaller(sample(case)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WHOLE)
def test_what_loses_nothing_computes_the_same_bits(name: str) -> None:
    case = WHOLE[name]
    program = captured(case)
    with torch.no_grad():
        assert torch.equal(remove(program, {})(sample(case)), program(sample(case)))


def test_the_original_stays_as_it_was() -> None:
    case = CASES["residual"]
    program = captured(case)
    program.history, program.labels, program.arch = ({"method": "x"},), ("a", "b", "c", "d"), "custom:net"
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    smaller = remove(program, {"a": [0, 2]})
    with torch.no_grad():
        for tensor in smaller.parameters():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())
    assert (smaller.history, smaller.labels, smaller.arch) == (program.history, program.labels, program.arch)
    assert smaller.input == program.input
    assert not smaller.training
    assert type(smaller.a) is nn.Conv2d
    assert (smaller.a.out_channels, smaller.b.in_channels, smaller.bn.num_features) == (2, 2, 2)


def test_layer_norm_is_over_what_is_left() -> None:
    """Ba et al. 2016, by hand, over three of five features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 4)).double().eval()
    nn.init.uniform_(model[1].weight)
    nn.init.uniform_(model[1].bias)
    program = capture(model, InputSpec((7,)))
    keep = [0, 2, 3]
    smaller = remove(program, {"0": keep})
    x = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        y = model[0](x)[:, keep]
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = y * model[1].weight[keep] + model[1].bias[keep]
        expected = y @ model[2].weight[:, keep].T + model[2].bias
        torch.testing.assert_close(smaller(x), expected, rtol=1e-10, atol=1e-10)


def test_group_norm_keeps_equal_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(96, 4)).double().eval()
    program = capture(model, InputSpec((3, 4, 4)))
    assert analyse(program)["0"].units == 3
    smaller = remove(program, {"0": [0, 2]})
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    left = [0, 2, 3, 5]
    with torch.no_grad():
        y = model[0](x)[:, left].reshape(2, 2, -1)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        columns = torch.arange(96).view(6, 16)[left].flatten()
        expected = y.reshape(2, -1) @ model[3].weight[:, columns].T + model[3].bias
        torch.testing.assert_close(smaller(x), expected, rtol=1e-10, atol=1e-10)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential(nn.Linear(7, 6), first, nn.ReLU(), second, nn.Linear(6, 4)).eval()
    smaller = remove(capture(model, InputSpec((7,))), {"0": [1, 4]})
    layers = dict(smaller.named_modules())
    assert layers["1"].weight is layers["3"].weight
    assert layers["1"].weight.shape == (2, 2)
    artifact.write_program(smaller, tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"b": []}, "b: all channels would go; keep at least one"),
        ({"b": [5]}, "b: units to keep are distinct and 0 to 4"),
        ({"b": [1, 1]}, "b: units to keep are distinct and 0 to 4"),
        ({"fc": [0]}, "fc: no channels can be removed here"),
    ],
)
def test_refuses(keep: Keep, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        remove(captured(CASES["residual"]), keep)
    assert str(caught.value) == message


def test_only_tensors_that_shrink_lose_their_encodings() -> None:
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 4), nn.Linear(4, 4)).eval()
    program = capture(model, InputSpec((7,)))
    encodings = {name: Encoding("raw") for name in program.state_dict()}
    program.encodings = dict(encodings)
    smaller = remove(program, {"0": [0, 1, 3]})
    shrunk = {"0.weight", "0.bias", "1.weight"}
    assert smaller.encodings == {name: each for name, each in encodings.items() if name not in shrunk}
    assert program.encodings == encodings
