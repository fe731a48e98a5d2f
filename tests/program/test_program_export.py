"""Networks that fx cannot follow and ``torch.export`` can: captured whole, with their layers and names."""

from typing import Any

import pytest
import torch
from export_networks import NETWORKS, SHAPE
from torch import fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program import capture as capturing
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import from_data, state_of, to_data


def refused(tracer: Any, model: nn.Module) -> fx.Graph:
    raise CaptureError("not tried")


def assert_equal(program: Program, model: nn.Module) -> None:
    for batch in (2, 5):
        x = torch.randn(batch, *SHAPE)
        with torch.no_grad():
            torch.testing.assert_close(program(x.clone()), model(x.clone()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_fx_alone_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing.ExportTracer, "trace", refused)
    with pytest.raises(CaptureError):
        capture(NETWORKS[name](), InputSpec(SHAPE))


@pytest.mark.parametrize("name", NETWORKS)
def test_captured(name: str) -> None:
    model = NETWORKS[name]()
    attributes, state = set(vars(model)), {k: v.clone() for k, v in model.state_dict().items()}
    program = capture(model, InputSpec(SHAPE))
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [n.target for n in program.graph.find_nodes(op="call_module")][:1] == ["conv"]
    assert_equal(program, model)
    assert_equal(from_data(to_data(program), state_of(program)), model)
