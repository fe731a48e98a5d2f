"""Every method on networks written in every way, against float32 torch running the user's own module.

A weight that a method rounds is loaded back into the module that was captured, so what is compared is the
method's file with torch's eager execution of code that the method has never seen.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from channels_oracle import masked, prune_ours
from quantize_networks import context, images, sqnr
from quick_cases import quick
from small_networks import NETWORKS, Layers, made
from torch import Tensor

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.kernels import prepare
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.apply import apply as share
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

SHAPE = (4, 12, 12)
SNR = 20.0
"""Decibels that int8 has to keep."""


@pytest.fixture(params=NETWORKS, scope="module")
def network(request: pytest.FixtureRequest) -> Layers:
    return made(NETWORKS[request.param])


@pytest.fixture(scope="module")
def program(network: Layers) -> Program:
    return capture(network, InputSpec(SHAPE))


def read_back(program: Program, folder: Path) -> Program:
    write_program(program, folder / "network.safetensors")
    return read_program(folder / "network.safetensors")


def as_own(value: Tensor, own: Tensor) -> Tensor:
    """A weight in the user's form: a linear's that serves as a kernel has more sides.

    One that a product takes as it is lies transposed in the layer that it has become, with channels of zeros.
    """
    turned = value.ndim == 2 and value.T.shape == own.shape and torch.equal(value.T, own * (value.T != 0))
    return value.T if turned else value.reshape(own.shape)


def eager(network: Layers, program: Program, x: Tensor) -> Tensor:
    """The user's own module with a Program's weights."""
    loaded = copy.deepcopy(network)
    own = network.state_dict()
    loaded.load_state_dict(
        {k: as_own(v, own[k]) for k, v in program.state_dict().items() if k in own}, strict=False
    )
    with torch.no_grad():
        return loaded(x)


@pytest.mark.slow
@torch.no_grad()
def test_int8_keeps_the_signal(network: Layers, program: Program, tmp_path: Path) -> None:
    int8 = quantize(program, QuantizeConfig("int8"), context(program, 16)).program
    x = images(16, *SHAPE, seed=5)  # as many as calibrated it: one network computes with their number
    expected, got = network(x), int8(x)
    assert got.shape == expected.shape
    assert sqnr(expected, got) > SNR
    read = read_back(int8, tmp_path)
    assert torch.equal(read(x), got)
    assert sqnr(expected, prepare(read)(x)) > SNR


@pytest.mark.slow
@torch.no_grad()
def test_weights_alone_are_what_torch_computes_with(
    network: Layers, program: Program, tmp_path: Path
) -> None:
    x = images(3, *SHAPE, seed=5)
    for made_ in (
        quantize(program, QuantizeConfig("int8-weight"), Context()).program,
        share(program, ShareConfig(bits=4), Context()).program,
    ):
        read = read_back(made_, tmp_path)
        (tmp_path / "network.safetensors").unlink()
        assert torch.equal(read(x), eager(network, read, x))
        assert any(not torch.equal(read.state_dict()[k], v) for k, v in program.state_dict().items())


@pytest.mark.parametrize("network", quick(NETWORKS, [*NETWORKS][::4]), indirect=True)
@torch.no_grad()
def test_dynamic_int8_keeps_the_signal(network: Layers, program: Program, tmp_path: Path) -> None:
    x = images(3, *SHAPE, seed=5)
    int8 = quantize(program, QuantizeConfig("int8-dynamic"), Context()).program
    read = prepare(read_back(int8, tmp_path))
    assert sqnr(network(x), read(x)) > SNR


@torch.no_grad()
def test_pruned_channels_are_as_if_zero(network: Layers, program: Program, tmp_path: Path) -> None:
    pruned, found, keep = prune_ours(program, 0.5)
    dense = masked(found, keep)
    x = images(3, *SHAPE, seed=5)
    expected: Any = dense(x)
    if not any(type(layer).__name__.startswith("_Masked") for layer in dense.modules()):
        torch.testing.assert_close(eager(network, dense, x), expected)
    read = read_back(pruned, tmp_path)
    torch.testing.assert_close(read(x), expected, rtol=1e-4, atol=1e-5)
