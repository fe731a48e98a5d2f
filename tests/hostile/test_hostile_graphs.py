"""Graphs and layers out of a file: what asks for too much, or cannot run, is refused before anything runs."""

import random
import resource
import time

import pytest
import torch
from hostile_graphs import GOOD, GRAPHS, graph, malformed_layers, quantized_program
from torch import nn

from modelopt_cli import kernels
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import from_data, state_of, to_data

PEAK_GROWTH = 200_000
"""KiB that refusing may take."""


@pytest.fixture(autouse=True, scope="module")
def warm():
    """What torch imports for its first shapes takes seconds, which are not the hostile graph's."""
    from_data(graph(GOOD["tuples"]), {})


@pytest.mark.parametrize("calls", GRAPHS.values(), ids=GRAPHS)
def test_graph_that_asks_for_too_much_is_refused(calls):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ArtifactError) as caught:
        from_data(graph(calls), {})
    assert "node n" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < PEAK_GROWTH


@pytest.mark.parametrize("calls", GOOD.values(), ids=GOOD)
def test_graph_of_moderate_size_runs(calls):
    program = from_data(graph(calls), {})
    assert program(torch.rand(1, 3, 8, 8)).numel() > 0


def test_sizes_that_grow_with_the_batch_are_seen():
    """With one sample every power of the batch is one."""
    calls = [("size", [{"node": "x"}, 0], {}), ("operator.pow", [{"back": 1}, 9], {})]
    with pytest.raises(ArtifactError, match="elements"):
        from_data(graph([*calls, ("torch.zeros", [{"back": 1}], {})]), {})


def test_input_of_absurd_size_is_refused():
    with pytest.raises(ArtifactError, match="elements"):
        from_data(graph([("torch.relu", [{"node": "x"}], {})], (3, 10**6, 10**6)), {})


def test_layers_are_counted_with_what_they_make_inside():
    data = to_data(
        capture(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), InputSpec((3, 8, 8)))
    )
    data["modules"]["0"]["config"]["padding"] = [2**30, 2**30]
    with pytest.raises(ArtifactError):
        from_data(data, {name: torch.zeros(entry["shape"]) for name, entry in data["tensors"].items()})


@pytest.mark.slow
def test_every_odd_hyperparameter_of_a_quantized_layer_is_refused_or_runs():
    program = quantized_program()
    state, images = state_of(program), torch.rand(2, 3, 8, 8)
    loaded = []
    cases = list(malformed_layers(program))
    certain = [case for case in cases if case[0].endswith(("= [0, 0]", "= None", "= 0", "= -1"))]
    for name, data in certain + random.Random(0).sample(cases, 300):
        try:
            made = from_data(data, state)
        except ArtifactError:
            continue
        loaded.append(name)
        kernels.prepare(made)(images)  # and no signal ends the process
    assert program(images).shape == (2, 2)
    assert not [name for name in loaded if "= [0, 0]" in name and "padding" not in name]


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("conv.scale", torch.zeros(4)),
        ("conv.scale", torch.full((4,), -1.0)),
        ("conv.scale", torch.full((4,), torch.nan)),
        ("linear.scale", torch.full((5,), torch.inf)),
        ("dynamic.scale", torch.full((2,), 1e-45)),
        ("conv.bias", torch.full((4,), torch.nan)),
        ("conv.scale", torch.ones(4, dtype=torch.float16)),
        ("conv.scale", torch.ones(4, dtype=torch.float64)),
        ("conv.scale", torch.ones(5)),
        ("conv.weight", torch.zeros(4, 3, 3, 3, dtype=torch.uint8)),
        ("conv.weight", torch.zeros(4, 3, 3, dtype=torch.int8)),
    ],
)
def test_tensors_of_a_quantized_layer_are_checked(tensor, value):
    program = quantized_program()
    data, state = to_data(program), state_of(program)
    state[tensor] = value
    kind = str(value.dtype).removeprefix("torch.")
    data["tensors"][tensor] = {"dtype": kind, "shape": list(value.shape)}
    with pytest.raises(ArtifactError, match=tensor.partition(".")[0]):
        from_data(data, state)


@pytest.mark.parametrize(
    ("layer", "field", "value"),
    [
        (nn.Conv2d(2, 2, 1), "stride", [0, 0]),
        (nn.Conv2d(2, 2, 1), "stride", [1]),
        (nn.Conv2d(2, 2, 1), "dilation", 0),
        (nn.Conv2d(2, 2, 1), "padding", [-1, 0]),
        (nn.Conv2d(2, 2, 1), "groups", 0),
        (nn.ConvTranspose2d(2, 2, 1), "output_padding", -1),
        (nn.MaxPool2d(2), "kernel_size", 0),
        (nn.MaxPool2d(2), "stride", [1, 1, 1]),
        (nn.AvgPool2d(2), "divisor_override", 0),
        (nn.LPPool2d(2, 2), "norm_type", 0.0),
        (nn.AdaptiveAvgPool2d(1), "output_size", [-1, 1]),
        (nn.Upsample(scale_factor=2.0), "scale_factor", 0.0),
        (nn.GroupNorm(1, 2), "num_groups", 0),
        (nn.GroupNorm(1, 2), "eps", -1.0),
        (nn.LocalResponseNorm(2), "size", 0),
        (nn.Dropout(0.5), "p", 1.5),
        (nn.PixelUnshuffle(2), "downscale_factor", 0),
        (nn.ChannelShuffle(2), "groups", 0),
        (nn.ZeroPad2d(1), "padding", [1, 1, 1]),
        (nn.Unfold(2), "stride", 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_hyperparameters_out_of_range_are_refused_when_the_layer_is_built(layer, field, value):
    data = to_data(capture(nn.Sequential(layer), InputSpec((2, 8, 8)), verify=False))
    data["modules"]["0"]["config"][field] = value
    with pytest.raises(ArtifactError, match="impossible hyperparameters"):
        from_data(data, {name: torch.zeros(entry["shape"]) for name, entry in data["tensors"].items()})
