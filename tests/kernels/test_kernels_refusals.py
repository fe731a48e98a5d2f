"""Inputs that an int8 layer does not take are refused in the same words by every backend."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import modelopt_cli as mo
from modelopt_cli.kernels import BACKENDS, prepare

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SERIES = torch.rand(4, 3, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))


def rows() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 2), nn.Flatten(), nn.Linear(21, 2)
    )


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


CASES = {
    "convolution of other channels": (convolutions, IMAGES, (2, 1, 8, 8), "layer 0: takes (N, 3, H, W)"),
    "convolution without a batch": (convolutions, IMAGES, (3, 8, 8), "layer 0: takes (N, 3, H, W)"),
    "convolution of volumes": (convolutions, IMAGES, (2, 3, 8, 8, 8), "layer 0: takes (N, 3, H, W)"),
    "convolution of images": (rows, SERIES, (2, 3, 8, 8), "layer 0: takes (N, 3, L)"),
    "convolution of series": (rows, SERIES, (2, 4, 8), "layer 0: takes (N, 3, L)"),
    "linear layer after larger images": (convolutions, IMAGES, (2, 3, 12, 12), "layer 4: takes (..., 36)"),
    "linear layer of other features": (linears, ROWS, (2, 7), "layer 0: takes (..., 6)"),
    "linear layer of a single number": (linears, ROWS, (), "layer 0: takes (..., 6)"),
}


def program_of(
    make: Callable[[], nn.Module], samples: Tensor, backend: str, scheme: str = "int8"
) -> mo.Program:
    torch.manual_seed(0)
    result = mo.quantize(make().eval(), calibration=[samples], scheme=scheme)
    assert result.program is not None
    device = BACKENDS[backend].device if torch.cuda.is_available() else "cpu"
    return prepare(result.program, device or "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "samples", "shape", "says"), CASES.values(), ids=CASES)
def test_an_input_of_another_shape_is_refused_by_the_layer(make, samples, shape, says, backend):
    program = program_of(make, samples, backend)
    device = next(program.buffers()).device
    assert program(samples.to(device)).shape == (4, 2)
    with pytest.raises(mo.UsageError, match="give the network a batch") as error:
        program(torch.rand(shape, device=device))
    assert str(error.value).startswith(f"{says}, not (")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dynamic_layer_refuses_them_too(backend):
    program = program_of(linears, ROWS, backend, "int8-dynamic")
    with pytest.raises(mo.UsageError, match=r"layer 0: takes \(\.\.\., 6\), not \(2, 7\)"):
        program(torch.rand(2, 7, device=next(program.buffers()).device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "samples"), [(convolutions, IMAGES), (linears, ROWS)])
def test_an_input_on_another_device_is_refused_by_the_layer(make, samples, backend):
    program = program_of(make, samples, backend)
    with pytest.raises(mo.UsageError, match=r"layer 0: is on \w+(:0)?, its input on meta; move the input"):
        program(samples.to("meta"))


def test_what_is_no_tensor_is_refused():
    program = program_of(linears, ROWS, "onednn")
    for wrong, name in ((ROWS.numpy(), "ndarray"), (ROWS.tolist(), "list"), (None, "NoneType")):
        with pytest.raises(mo.UsageError, match=f"takes a tensor, not a {name}; give a batch"):
            program(wrong)


def test_a_copied_layer_keeps_its_name():
    program = program_of(linears, ROWS, "onednn")
    program.load_state_dict(program.state_dict())
    with pytest.raises(mo.UsageError, match="layer 0: takes"):
        program(torch.rand(2, 7))
