"""A network that is captured in parts computes what it did, as a Program and from its file's data."""

import copy
import io
import json
from types import SimpleNamespace

import pytest
import torch
from parted_networks import Branched, Cells, Gated, Named, Tied, gated
from torch import nn

import modelopt_cli
from modelopt_cli.errors import ArchitectureError, ArtifactError, CaptureError, InputError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import EvalOptions, EvaluatedModel, evaluate
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_batch import named
from modelopt_cli.program.parted import PartedProgram, graph_input, joined, parts_of_network, reaching
from modelopt_cli.program.partition import capture_parts
from modelopt_cli.program.safe_names import path_in_network
from modelopt_cli.program.serialization import from_data, state_of, to_data

SAMPLE = InputSpec((3, 16, 16))


def parted(network: nn.Module, sample: InputSpec = SAMPLE) -> PartedProgram:
    with pytest.raises(CaptureError) as refused:
        capture(network, sample)
    program = capture_parts(network, sample, refused.value, arch="net.py:make")
    assert program is not None
    return program


@pytest.fixture(scope="module")
def network() -> Gated:
    return gated()


@pytest.fixture(scope="module")
def program(network: Gated) -> PartedProgram:
    return parted(network)


def images(batch: int, *sides: int) -> torch.Tensor:
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(batch))


@pytest.mark.slow
def test_the_largest_submodules_become_parts(program: PartedProgram, network: Gated) -> None:
    parts = parts_of_network(program)
    assert parts is not None
    assert list(parts.by_path) == ["first", "second", "head"]
    assert list(parts.remaining) == ["scale", "mixing", "offset"]
    assert "values" in parts.reason
    assert [each.name for each in graph_input(program).tensors] == [
        "first_input",
        "second_input",
        "head_input",
    ]
    assert program.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("sides", [(16, 16), (24, 40)])
@pytest.mark.parametrize("batch", [1, 5])
def test_it_computes_the_same_at_any_size(
    program: PartedProgram, network: Gated, batch: int, sides: tuple[int, int]
) -> None:
    x = images(batch, *sides)
    assert torch.equal(program(x), network(x))


def test_the_network_that_was_given_is_left_alone(network: Gated, program: PartedProgram) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    changed = copy.deepcopy(program)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    x = images(2, 16, 16)
    assert torch.equal(changed(x), network.offset.expand(2, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any("forward" in vars(module) for module in network.modules())


def test_gradients_and_statistics_are_those_of_the_network(network: Gated, program: PartedProgram) -> None:
    one, other = copy.deepcopy(network).train(), copy.deepcopy(program).train()
    x = images(4, 16, 16)
    for each in (one, other):
        each(x).square().mean().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, one.get_parameter(name).grad)
    torch.testing.assert_close(other.state_dict(), one.state_dict())
    assert not torch.equal(
        one.state_dict()["first.0.1.running_mean"], network.state_dict()["first.0.1.running_mean"]
    )


def test_data_and_back_with_the_network_s_code(network: Gated, program: PartedProgram) -> None:
    data = json.loads(json.dumps(to_data(program)))
    fresh = Gated()
    again = from_data(data, state_of(program), fresh)
    x = images(3, 16, 16)
    assert torch.equal(again(x), network(x))
    assert to_data(again) == to_data(program)
    with pytest.raises(ArtifactError, match="its own code"):
        from_data(data, state_of(program))
    with pytest.raises(ArchitectureError, match="no submodule first"):
        from_data(data, state_of(program), nn.Sequential(nn.Linear(2, 2)))
    del fresh.mixing
    with pytest.raises(ArchitectureError, match="a tensor mixing outside"):
        from_data(data, state_of(program), fresh)


def _break_paths(data):
    data["parts"]["submodules"][1]["path"] = "first.0"


def _break_arguments(data):
    data["parts"]["submodules"][0]["arguments"] = [[{"input": "other"}], {"dict": []}]


def _break_results(data):
    data["nodes"][-1]["args"] = [{"dict": data["nodes"][-1]["args"][0]["dict"][:1]}]


def _break_names(data):
    data["parts"]["submodules"][0]["path"] = "first; import os"


@pytest.mark.parametrize("damage", [_break_paths, _break_arguments, _break_results, _break_names])
def test_damaged_parts_are_refused(program: PartedProgram, damage) -> None:
    data = json.loads(json.dumps(to_data(program)))
    damage(data)
    with pytest.raises(ArtifactError):
        from_data(data, state_of(program), Gated())


def test_it_pickles(program: PartedProgram) -> None:
    file = io.BytesIO()
    torch.save(program, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(again, PartedProgram)
    assert torch.equal(again(images(2, 16, 16)), program(images(2, 16, 16)))


def test_all_calls_of_a_part_are_seen(program: PartedProgram, network: Gated) -> None:
    """The head is called twice, at two sizes; the joined graph computes what the parts do."""
    x, seen = images(2, 16, 16), []
    with network.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())):
        network(x)
    batches = [named(each, graph_input(program)) for each in reaching(program, x)]
    assert [batch["head_input"].shape[2:] for batch in batches] == [(8, 8), (4, 4)]
    assert all(torch.equal(batch["head_input"], each) for batch, each in zip(batches, seen, strict=True))
    outputs = joined(program)(**batches[0])
    assert torch.equal(outputs["head"], network.head(seen[0]))
    assert torch.equal(outputs["first"], network.first(x))


def test_flops_of_all_calls_and_of_the_rest(program: PartedProgram) -> None:
    """Convolutions by hand: the second stage twice, the head at 8x8 and at 4x4, then the product."""
    macs = count_macs(program, SAMPLE)
    convolutions = 16 * 16 * 8 * 27 + 8 * 8 * 8 * 72 + 2 * 8 * 8 * 8 * 72 + (64 + 16) * (8 * 8 + 8 * 4)
    assert sum(macs.per_layer.values()) == convolutions
    assert macs.total == convolutions + 4 * 4


@pytest.mark.slow
def test_flops_of_two_networks_in_the_calls_of_one() -> None:
    """On an image of zeros the head of one sees all 256 cells, that of the other none."""
    all_cells, none = (parted(Cells(bias).eval()) for bias in (0.3, -0.3))
    stem, head = 16 * 16 * 3 * 4, 16 * 16 * 4 * 5
    assert count_macs(all_cells, SAMPLE).total == stem + head
    assert count_macs(none, SAMPLE).total == stem
    assert count_macs(none, SAMPLE, calls_of=all_cells).total == stem + head
    assert count_macs(all_cells, SAMPLE, calls_of=none).total == stem
    assert count_macs(none, SAMPLE, calls_of=nn.Linear(1, 1)).total == stem


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [0, 1])
def test_flops_of_a_comparison_are_those_of_the_calls_of_the_baseline(baseline: int) -> None:
    programs = [parted(Cells(bias).eval()) for bias in (0.3, -0.3)]
    pair = [EvaluatedModel("net.pth", each, each, 1, input=SAMPLE) for each in programs]
    options = EvalOptions(runs=0, memory=False, threads=torch.get_num_threads(), baseline=baseline)
    macs = [report.macs for report in evaluate(pair, options=options).models]
    assert macs == [count_macs(programs[i], SAMPLE, calls_of=programs[baseline]) for i in (0, 1)]
    assert macs[0] == macs[1]


def test_flops_outside_of_the_parts_are_those_of_the_code_that_runs(program: PartedProgram) -> None:
    assert count_macs(copy.deepcopy(program), SAMPLE, calls_of=program) == count_macs(program, SAMPLE)


def test_weights_that_the_code_reads_stay_outside() -> None:
    network = Tied().eval()
    program = parted(network, InputSpec((6,)))
    parts = parts_of_network(program)
    assert parts is not None
    assert list(parts.by_path) == ["middle"]
    x = torch.randn(3, 6)
    assert torch.equal(program(x), network(x))


def test_dictionaries_keywords_and_constants() -> None:
    network = Named().eval()
    program = parted(network)
    parts = parts_of_network(program)
    assert parts is not None
    assert list(parts.by_path) == ["stem", "neck"]
    x = images(2, 16, 16)
    assert torch.equal(program(x)["sum"], network(x)["sum"])


def test_a_part_that_is_called_in_another_way(program: PartedProgram) -> None:
    with pytest.raises(InputError, match="first: first_input has shape"):
        program(torch.zeros(2, 4, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize(("threshold", "captured"), [(torch.inf, False), (0.0, True)])
def test_a_branch_that_no_data_reach(threshold: float, captured: bool, by_sample: bool) -> None:
    """Its weights and statistics stay, whether it is a part, which random inputs reach, or none."""
    torch.manual_seed(0)
    network = Branched(threshold, by_sample=by_sample).eval()
    nn.init.constant_(network.over[0][1].running_mean, 0.25)
    program, data = parted(network), [(images(8, 16, 16) - 1, torch.arange(8) % 4)]
    parts = parts_of_network(program)
    assert parts is not None
    assert ("over" in parts.by_path) == captured
    quantized = modelopt_cli.quantize(program, calibration=data).program
    pruned = modelopt_cli.prune(program, data=data, sparsity=0.25, round_to=1).program
    assert torch.equal(pruned.get_submodule("over.0.1").running_mean.unique(), torch.tensor([0.25]))
    for made in (quantized, pruned):
        again = prepare(from_data(json.loads(json.dumps(to_data(made))), state_of(made), network))
        for shift in (-1, 1):
            x = images(3, 16, 16) + shift
            assert torch.equal(again(x), made(x))
    torch.testing.assert_close(quantized(data[0][0]), network(data[0][0]), atol=0.05, rtol=0)
    if not captured:
        assert torch.equal(pruned.get_submodule("over.1.0").weight, network.over[1][0].weight)


@pytest.mark.slow
def test_parts_and_weights_with_names_that_a_program_has_itself() -> None:
    network = Gated()
    network.input, network.labels, network.history = network.first, network.head, network.scale
    del network.first, network.head, network.scale
    forward = Gated.forward

    def renamed(self, x: torch.Tensor) -> torch.Tensor:
        own = SimpleNamespace(first=self.input, second=self.second, head=self.labels, scale=self.history)
        own.mixing, own.offset = self.mixing, self.offset
        return forward(own, x)

    network.__class__ = type("Renamed", (Gated,), {"forward": renamed})
    program = parted(network.eval())
    parts = parts_of_network(program)
    assert parts is not None
    assert sorted(parts.by_path) == ["input", "labels", "second"]
    assert "history__" in parts.remaining
    again = from_data(json.loads(json.dumps(to_data(program))), state_of(program), network)
    x = images(2, 16, 16)
    with torch.no_grad():
        expected = network(x)
        for each in (program, again, copy.deepcopy(again)):
            assert torch.equal(each(x), expected)
    assert {path_in_network(path) for path in program.state_dict()} == set(network.state_dict())


def test_nothing_to_capture() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight if float(x.detach().sum()) > 0 else x

    assert capture_parts(Own(), InputSpec((3,)), CaptureError("why")) is None
