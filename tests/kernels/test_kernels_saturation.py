"""Weights within the pair bound are exact on every CPU; those beyond it are not, and are kept off oneDNN."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import conv, dynamic, linear
from torch import Tensor, fx

from modelopt_cli.kernels import BACKENDS, never_saturates, onednn, prepare, reference, trials
from modelopt_cli.kernels.dispatch import Kernel
from modelopt_cli.kernels.saturation import never_wraps
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear

HERE = Path(__file__).parent

# name: channels in, groups, weight values, side of the kernel
EXTREMES: dict[str, tuple[int, int, list[int], int]] = {
    "even split": (16, 1, [64, 64], 3),
    "one-sided": (16, 1, [127, 1], 3),
    "uneven": (32, 1, [100, 28], 1),
    "negative": (16, 1, [-64, -64], 3),
    "opposite signs": (16, 1, [127, -127], 3),
    "grouped": (16, 2, [127, 1], 3),
    "odd": (7, 1, [64], 3),
    "odd pointwise": (9, 1, [-64], 1),
    "depthwise": (16, 16, [127], 3),
}
PLAIN = {"has_bias": False, "input": QParams(1.0, 0), "output": None}


def extreme_conv(name: str) -> QuantizedConv2d:
    channels, groups, values, side = EXTREMES[name]
    layer = conv(
        in_channels=channels,
        out_channels=16,
        groups=groups,
        kernel_size=(side, side),
        padding=(0, 0),
        **PLAIN,
    )
    per_group = channels // groups
    column = torch.tensor((values * per_group)[:per_group], dtype=torch.int8)
    layer.weight.copy_(column[None, :, None, None].expand_as(layer.weight))
    layer.scale.fill_(1.0)
    return layer


def extreme_linear(values: list[int], kind: type = QuantizedLinear) -> QuantizedLinear | DynamicLinear:
    layer = (
        dynamic(64, 16, False)
        if kind is DynamicLinear
        else linear(64, 16, False, input=PLAIN["input"], output=None)
    )
    layer.weight.copy_(torch.tensor(values * 32, dtype=torch.int8).expand_as(layer.weight))
    layer.scale.fill_(1.0)
    return layer


def brightest(*shape: int) -> Tensor:
    return torch.full(shape, 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


def as_program(layer: torch.nn.Module) -> Program:
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    return Program({"layer": layer}, graph, input_spec=InputSpec((1,)))


def report() -> dict[str, Any]:
    """Errors of the bounded layers on oneDNN, of unbounded ones there, and of these after ``prepare``."""
    with mock.patch.multiple(trials, conv2d=lambda *_: True, linear=lambda *_: True):
        found = _errors_without_checks()
    layer = unbounded()
    x = brightest(1, 16, 8, 8)
    found["rerouted"] = float((prepare(as_program(layer))(x) - BEYOND).abs().max())
    trials._outcomes.clear()
    run = onednn.conv2d(layer, may_overwrite_residual=False)
    found["checked"] = float((run(x) - BEYOND).abs().max())
    return found


BEYOND = float(255 * 127 * 16 * 9)


def unbounded() -> QuantizedConv2d:
    layer = extreme_conv("even split")
    layer.weight.fill_(127)
    return layer


def _errors_without_checks() -> dict[str, Any]:
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for name in EXTREMES:
            layer = extreme_conv(name)
            assert never_saturates(layer.weight, layer.groups)
            for side in (5, 12):
                x = brightest(2, layer.in_channels, side, side)
                run = onednn.conv2d(layer, may_overwrite_residual=False)
                wrong = float((run(x) - reference.convolution(layer, x)).abs().max())
                errors[name] = max(errors.get(name, 0.0), wrong)
        for values in ([64, 64], [127, 1], [-100, -28], [127, -127]):
            dense = extreme_linear(values)
            x = torch.full((20, 64), 255, dtype=torch.uint8)
            run = onednn.linear(dense)
            errors[f"linear {values}"] = float((run(x) - reference.linear(dense, x)).abs().max())
        run = onednn.conv2d(unbounded(), may_overwrite_residual=False)
        hazard = float((run(brightest(1, 16, 8, 8)) - BEYOND).abs().max())
    return {"errors": errors, "hazard": hazard}


def test_exact_here() -> None:
    found = report()
    assert set(found["errors"].values()) == {0.0}
    assert found["rerouted"] == found["checked"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_exact_without_vnni(isa: str) -> None:
    code = "import json, test_kernels_saturation as t, test_kernels_geometry as g\n"
    code += "print(json.dumps({**t.report(), 'geometries': g.report()}))"
    # What is read without being written is then seldom what it should be.
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "165"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["errors"].values()) == {0.0}
    assert found["rerouted"] == found["checked"] == 0.0
    assert max(found["geometries"].values()) < 1e-6
    if found["hazard"] == 0.0:
        pytest.skip(f"ONEDNN_MAX_CPU_ISA={isa} does not make this CPU saturate")
    assert found["hazard"] > 1e5


@pytest.mark.parametrize(
    ("weight", "groups", "expected"),
    [
        ([[64, 64]], 1, True),
        ([[127, 1]], 1, True),
        ([[-127, -1]], 1, True),
        ([[127, -127]], 1, True),
        ([[65, 64]], 1, False),
        ([[-65, -64]], 1, False),
        ([[0, 127, 2, 0]], 1, True),  # neighbours, but not a pair
        ([[0, 1, 2, 127]], 1, False),
        ([[64, 64, 64]], 1, True),
        ([[65, 0, 0]], 1, False),
        ([[0, 0, -65]], 1, False),
        ([[-128, 0]], 1, True),
        ([[127], [127]], 2, True),  # depthwise
        ([[127], [127]], 1, False),
        ([[127], [127], [127], [127]], 2, False),  # two filters a channel is no plain depthwise
    ],
    ids=str,
)
def test_never_saturates(weight: list[list[int]], groups: int, expected: bool) -> None:
    matrix = torch.tensor(weight, dtype=torch.int8)
    assert never_saturates(matrix[:, :, None, None].expand(-1, -1, 3, 2), groups) is expected
    if groups == 1:
        assert never_saturates(matrix) is expected


def test_an_empty_weight_never_saturates() -> None:
    assert never_saturates(torch.zeros(0, 4, dtype=torch.int8))


@pytest.mark.parametrize("kind", [QuantizedConv2d, QuantizedLinear, DynamicLinear])
def test_unbounded_layers_are_rerouted(kind: type) -> None:
    layer = extreme_conv("even split") if kind is QuantizedConv2d else extreme_linear([64, 64], kind)
    for value, exact in ((64, False), (127, True)):
        layer.weight.fill_(value)
        prepare(as_program(layer))
        assert isinstance(layer.kernel, Kernel)
        assert isinstance(layer.kernel.run, partial) is exact  # the reference backend's functions


def test_cuda_accumulators_of_large_groups_are_exact() -> None:
    from modelopt_cli.kernels import cuda

    layer = conv(in_channels=64, out_channels=4, groups=2, kernel_size=(5, 5), padding=(0, 0), **PLAIN)
    layer.weight.fill_(127)
    layer.weight[:, 0, 0, 0] = 126
    layer.scale.fill_(1.0)
    x = brightest(1, 64, 5, 5)
    x[0, 1, 2, 2] = 254
    x[0, 33, 2, 2] = 254
    exact = 255 * 127 * (32 * 25 - 2) + 255 * 126 + 254 * 127
    assert exact > 2**24
    got = cuda._grouped(layer)(x)
    assert got.double().unique().tolist() == [exact]


@pytest.mark.parametrize(
    ("terms", "value", "expected"),
    [
        (60_000, 127, True),
        (66_000, 127, True),
        (66_100, 127, False),
        (66_100, -127, False),
        (131_000, 64, True),
        (131_100, 64, False),
        (131_100, -64, False),
        (200_000, 1, True),
    ],
)
def test_never_wraps(terms: int, value: int, expected: bool) -> None:
    weight = torch.zeros(2, terms, dtype=torch.int8)
    weight[1] = value
    assert never_wraps(weight) is expected
    weight[1, ::2] *= -1  # two sums of half the size
    assert never_wraps(weight)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_beyond_int32_do_not_wrap(backend: Any, sign: int) -> None:
    wide = 160_000
    static, moving = linear(wide, 2, False, input=QParams(1.0, 0), output=None), dynamic(wide, 2, False)
    deep = conv(**{"in_channels": 4096, "out_channels": 2, "kernel_size": (7, 7), "padding": (0, 0), **PLAIN})
    for layer in (static, moving, deep):
        layer.weight.fill_(64 * sign)
        layer.scale.fill_(1.0)
        prepare(as_program(layer), backend=backend)
    rows = torch.full((1, wide), 255, dtype=torch.uint8)
    assert static(rows).tolist() == [[float(255 * 64 * wide * sign)] * 2]
    assert moving(torch.ones(1, wide)).tolist() == [[pytest.approx(64 * wide * sign, rel=1e-6)] * 2]
    white = brightest(1, 4096, 7, 7)
    assert deep(white).flatten().tolist() == [pytest.approx(255 * 64 * 4096 * 49 * sign, rel=1e-6)] * 2
