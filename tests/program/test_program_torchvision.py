"""All of torchvision's classification networks survive capture, a file and back, bit for bit.

Four are reduced so that the file stays below 6 GB: vit_l_16 and vit_l_32 (4 of 24 layers), vit_h_14 (3 of
32 layers), regnet_y_128gf (a quarter of the width). Inputs are the smallest the network takes.
"""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from program_networks import NAMES, build, side

from modelopt_cli import artifact
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import to_data


@pytest.fixture(autouse=True)
def collected(one_thread: None) -> Iterator[None]:
    yield
    gc.collect()  # a graph and its module refer to each other


def test_there_are_eighty_networks() -> None:
    assert len(NAMES) == 80


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    model = build(name)
    shape = (3, side(name), side(name))
    program = capture(model, InputSpec(shape), arch=f"torchvision:{name}", verify=False)
    data = json.loads(json.dumps(to_data(program), allow_nan=False))
    artifact.write_program(program, tmp_path / "net.safetensors")
    again = artifact.read_program(tmp_path / "net.safetensors")
    (tmp_path / "net.safetensors").unlink()

    # The file sorts the keys of keyword arguments, whose order means nothing.
    assert json.dumps(to_data(again), sort_keys=True) == json.dumps(data, sort_keys=True)
    assert set(again.state_dict()) <= set(model.state_dict())
    assert not again.training
    with torch.no_grad():
        for batch in (1, 2):
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
            expected = model(x)
            assert expected.isfinite().all()
            assert expected.std() > 1e-4 * expected.abs().max()
            assert torch.equal(again(x), expected)
