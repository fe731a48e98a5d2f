"""Networks that fx cannot follow and ``torch.export`` can: captured whole, with their layers and names."""

from typing import Any

import pytest
import torch
from export_networks import NETWORKS, SHAPE, network, tensor
from torch import Tensor, fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.exported import ExportTracer
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
    monkeypatch.setattr(ExportTracer, "trace", refused)
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


class Tokens(nn.Module):
    """A causal encoder with learned positions, which makes its mask in Python."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length > 32:
            raise ValueError("too long")
        x = self.words(ids) + self.places(torch.arange(length, device=ids.device))
        query, key, value = self.qkv(x).chunk(3, -1)
        mask = torch.full((length, length), float("-inf")).triu(1)
        weights = (query @ key.transpose(1, 2) / 8**0.5 + mask).softmax(-1)
        return self.head(weights @ value)  # type: ignore[no-any-return]


def test_the_length_of_a_sequence_stays_free() -> None:
    model = Tokens().eval()
    program = capture(model, InputSpec((12,), dtype="int64"))
    assert set(program.state_dict()) == set(model.state_dict())
    for length in (12, 7, 30):
        ids = torch.randint(20, (3, length))
        assert torch.equal(program(ids), model(ids))


class Cache:
    """Keys and values for the next call."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


def test_a_cache_among_the_outputs_is_left_out() -> None:
    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        cache, y = Cache(), tensor(self.conv(x))
        cache.keys.append(y)
        return {"features": y, "cache": cache, "none": None}

    model = network(forward)  # type: ignore[arg-type]
    program, x = capture(model, InputSpec(SHAPE)), torch.randn(2, *SHAPE)
    assert program(x).keys() == {"features", "none"}
    assert torch.equal(program(x)["features"], model(x)["features"])


REFUSED: dict[str, tuple[Any, str]] = {
    "item": (
        lambda self, x: self.conv(x) * x.mean().item(),
        "control flow depends on the values in a tensor; a Program takes the same path for every input",
    ),
    "mask": (
        lambda self, x: self.conv(x)[x.mean((1, 2, 3)) > 0],
        "the size of a tensor depends on the values",
    ),
    "chance": (lambda self, x: self.conv(x) + torch.rand(10), "draws random numbers"),
    "batch": (
        lambda self, x: tensor(self.conv(x)) * (2 if x.shape[0] == 2 else 1),
        "the batch size is needed as a number",
    ),
    "an operator": (
        lambda self, x: self.conv(x).polygamma(2),
        "calls torch",
    ),
}


@pytest.mark.parametrize(("forward", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_layer_and_line(forward: Any, message: str) -> None:
    def block(self: Any, x: Tensor) -> Tensor:
        return tensor(forward(self, x))

    model = nn.Sequential(nn.Identity(), network(block))
    with pytest.raises(CaptureError, match=message) as caught:
        capture(model, InputSpec(SHAPE))
    line = forward.__code__.co_firstlineno
    assert str(caught.value.where).endswith(f"(test_program_export.py:{line})")
    assert caught.value.hint
