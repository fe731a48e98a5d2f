"""Networks of timm's whose forward passes do more than call layers; docs/networks.md has all."""

import pytest
import torch

from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import from_data, state_of, to_data

timm = pytest.importorskip("timm", reason="the optional package timm is not installed")

NETWORKS = {
    "csatv2": {},  # torch.addcmul
    "efficientvit_m0": {},  # keeps its position biases for the next call
    "mvitv2_tiny": {"img_size": 64},  # assigns to items
    "tiny_vit_5m_224": {},  # keeps its position biases, by device
    "sequencer2d_s": {"img_size": 64},  # two-dimensional LSTMs
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_is_captured(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **NETWORKS[name]).eval()
    side = NETWORKS[name].get("img_size") or (64 if name == "csatv2" else 224)
    program = capture(model, InputSpec((3, side, side)))
    again = from_data(to_data(program), state_of(program))
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(program(x), model(x))
        assert torch.equal(again(x), model(x))
