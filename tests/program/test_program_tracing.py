"""What a forward pass may do while it is followed: assign, keep caches, make tensors of a batch's size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_program_capture import SHAPE, check, conv, net
from torch import Tensor, fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture

TABLE = torch.arange(144.0).reshape(12, 12)


def assign(index: Any, value: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x * 2
        x[index] = value(x)
        return x + x.mean()

    return forward


def rows(x: Tensor) -> Tensor:
    return x[:, :, :3] + 1


ASSIGNMENTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "number": assign((..., 0), lambda x: 3.0),
    "slices": assign((slice(None), slice(None), slice(1, 4), slice(1, None)), lambda x: rows(x)[..., 1:]),
    "strided": assign((slice(None), slice(None), slice(0, 6, 2)), rows),
    "negative": assign((slice(None), -1), lambda x: x[:, 0]),
    "broadcast": assign((slice(None), 1), lambda x: x.mean((1, 2), keepdim=True)[:, 0]),
    "new dimension": assign((slice(None), None, 1), lambda x: x[:, None, 2]),
    "places": assign((slice(None), slice(None), torch.tensor([4, 2, 7])), rows),
    "fixed mask": assign((..., TABLE > 70), lambda x: 0.5),
}


@pytest.mark.parametrize("forward", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
def test_assignment_to_items(forward: Callable[[Any, Tensor], Tensor]) -> None:
    program = check(net(forward))
    assert "modelopt.set_item" in str([n["target"] for n in data(program)])


def data(program: Any) -> Any:
    from modelopt_cli.program.serialization import to_data

    return to_data(program)["nodes"]


class TestAssignments:
    def test_mask_from_the_values(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = x.clone()
            y[x < 0] = 0.25
            return y

        check(net(forward))

    def test_one_after_the_other(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = x.new_empty(x.shape[0], 5, 12, 12)
            y[:, :3] = x
            y[:, 3] = y[:, 0] * y[:, 1]
            y[:, 4] = 1
            y[:, 1] += x[:, 2]
            return self.conv(y)  # type: ignore[no-any-return]

        check(net(forward, conv=nn.Conv2d(5, 4, 3)))

    def test_in_a_function_called_with_the_tensor(self) -> None:
        def border(x: Tensor) -> None:
            x[:, :, 0] = x[:, :, -1] = 0

        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.conv(x)
            border(y)
            return F.relu(y)

        check(net(forward, conv=conv()))

    @pytest.mark.parametrize(
        "change", [lambda y: y.zero_(), lambda y: y.fill_(2.0), lambda y: y.copy_(y[:, :1] + 1)]
    )
    def test_of_the_whole_tensor(self, change: Callable[[Tensor], Tensor]) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.conv(x)
            return change(y) + y  # type: ignore[no-any-return]

        check(net(forward, conv=conv()))

    def test_input_is_left_alone(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            x[:, 0] = 7
            return x.sum(1)

        program = check(net(forward))
        x = torch.zeros(1, *SHAPE)
        program(x)
        assert not x.any()

    def test_view_not_read_again_does_not_matter(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            whole = x * 2
            y = whole.flatten(2)
            y[..., 0] = 5
            return y

        check(net(forward))


CHECKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "torch._assert": lambda self, x: torch._assert((x > -9).all(), "too small"),
    "logging": lambda self, x: f"{x.mean():.3f} {x.amax()}",
    "a counter": lambda self, x: self.calls.add_(1),
}


@pytest.mark.parametrize("aside", CHECKS.values(), ids=CHECKS)
def test_decoration_is_left_out(aside: Callable[[Any, Tensor], Any]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        aside(self, x)
        return F.relu(self.conv(x))

    model = net(forward, conv=conv())
    model.register_buffer("calls", torch.tensor(7))
    program = check(model)
    assert set(program.state_dict()) == {"conv.weight", "conv.bias"}
    assert len(program.graph.nodes) == 4


def test_a_buffer_that_carries_over_to_the_next_call_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x) + self.mean
        self.mean.copy_(x.mean())
        return y  # type: ignore[no-any-return]

    model = net(forward, conv=conv())
    model.register_buffer("mean", torch.tensor(0.0))
    with pytest.raises(CaptureError, match="on state of its own"):
        capture(model, InputSpec(SHAPE))
    assert model.mean == 0


FACTORIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "zeros": lambda self, x: x + torch.zeros(x.shape[0], 1, 12, 12),
    "ones": lambda self, x: x + torch.ones(x.size(0), 1, 1, 1, device=x.device, dtype=x.dtype),
    "ones of a shape": lambda self, x: x + torch.ones(x.shape),
    "ones of a tuple": lambda self, x: x + torch.ones((x.shape[0], 3, 1, 1)),
    "integer zeros": lambda self, x: x + torch.zeros(x.shape[0], 1, 1, 1, dtype=torch.int64),
    "full": lambda self, x: x + torch.full((x.shape[0], 1, 1, 1), 0.5),
    "full of integers": lambda self, x: x / torch.full((x.shape[0], 1, 1, 1), 3),
    "empty": lambda self, x: x + torch.empty(x.shape[0], 1, 1, 1).fill_(0.5),
    "empty_like": lambda self, x: torch.cat([x, torch.empty_like(x).zero_()], 1),
    "expanded constant": lambda self, x: x + TABLE.expand(x.shape[0], 3, -1, -1),
    "expanded fresh": lambda self, x: x + torch.arange(12.0).expand(x.shape[0], 3, 12, 12),
    "expanded parameter": lambda self, x: x + self.p.expand(x.shape[0], -1, -1, -1),
    "constant's new_zeros": lambda self, x: x + TABLE.new_zeros(x.shape[0], 3, 12, 12),
    "constant at places of x": lambda self, x: TABLE[0][x.argmax(-1)],
    "mask and mask": lambda self, x: torch.where((TABLE > 7) & (x > 0), x, -x),
    "new_tensor": lambda self, x: x * x.new_tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
    "arange": lambda self, x: x + torch.arange(x.shape[0]).view(-1, 1, 1, 1),
}


@pytest.mark.parametrize("forward", FACTORIES.values(), ids=FACTORIES)
def test_tensor_made_for_the_batch(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = net(forward)
    model.p = nn.Parameter(torch.randn(1, 3, 1, 1))
    check(model)


CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "next to a change in place": lambda self, x: torch.relu_(x * 2) + torch.arange(12.0),
    "next to a tuple read whole": lambda self, x: torch.cat(x.chunk(3, 1), -1) + torch.ones(1),
    "changed in place": lambda self, x: x + torch.zeros(1, 1, 1, 12).add_(x.mean((0, 1, 2), keepdim=True)),
    "of the type of a parameter": lambda self, x: (x > 0).to(self.p.dtype) * x,
    "of the type of a tensor": lambda self, x: (x > 0).to(x) * x,
    "of the type of a tensor by name": lambda self, x: (x > 0).to(tensor=self.p) * x,
    "of the device of a tensor": lambda self, x: x * (x > 0).to(x.device, x.dtype),
}


@pytest.mark.parametrize("forward", CONSTANTS.values(), ids=CONSTANTS)
def test_constants(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = net(forward)
    model.p = nn.Parameter(torch.randn(1, 3, 1, 1))
    check(model)


def test_tensor_made_for_the_batch_follows_the_input() -> None:
    program = capture(net(lambda self, x: x @ torch.ones(x.shape[0], 1, 12, 2)), InputSpec(SHAPE))
    assert program(torch.ones(2, *SHAPE, dtype=torch.float64)).dtype == torch.float64
    assert program(torch.ones(2, *SHAPE, device="meta")).device.type == "meta"


def test_torch_is_left_as_it_was() -> None:
    before = {name: vars(torch).get(name) for name in ("zeros", "ones", "empty", "full")}
    capture(net(FACTORIES["zeros"]), InputSpec(SHAPE))
    assert before == {name: vars(torch).get(name) for name in before}
    assert not vars(Tensor).keys() & {"expand", "new_zeros", "new_ones", "new_empty", "new_full"}


class TestTuples:
    def test_type_is_known(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            parts = x.chunk(3, 1)
            return parts[0] + sum(parts[1:]) if isinstance(parts, tuple) else x

        check(net(forward))

    def test_named_fields(self) -> None:
        check(net(lambda self, x: x.max(-1).values + x.sort(-1).values[..., 0] + x.aminmax(dim=-1).min))


class Caching(nn.Module):
    """Keeps its position bias for the next call in evaluation, as timm's TinyViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, 12))
        self.register_buffer("places", torch.arange(12).flip(0))
        self.cache: dict[str, Any] = {"inner": {}}
        self.last: Any = None
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and "bias" not in self.cache["inner"]:
            self.cache["inner"]["bias"] = self.bias[:, self.places]
        if self.last is None:
            self.last = self.bias.mean()
        self.seen.append(x)
        return x + self.cache["inner"]["bias"][:, None] + self.last


def test_caches_of_the_network_are_left_as_they_were() -> None:
    model = nn.Sequential(Caching()).eval()
    program = capture(model, InputSpec(SHAPE))
    assert (model[0].cache, model[0].last, model[0].seen) == ({"inner": {}}, None, [])
    x = torch.randn(2, *SHAPE)
    assert torch.equal(program(x), model(x))
    assert "0.bias" in dict(program.named_parameters())


def test_failed_capture_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(Caching(), net(lambda self, x: x if x.sum() > 0 else -x))
    with pytest.raises(CaptureError):
        capture(model, InputSpec(SHAPE))
    assert (model[0].cache, model[0].seen) == ({"inner": {}}, [])


def test_nothing_is_printed_of_a_first_attempt_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        parts = x.chunk(2, 2)
        return (parts[0] if isinstance(parts, tuple) else parts).sum(1)

    check(net(forward))
    assert capfd.readouterr().err == ""


class NormAct(nn.BatchNorm2d):
    """timm's batch norm with an activation inside, which works in place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(F.batch_norm(x, *statistics, False, 0.1, self.eps))  # type: ignore[no-any-return]


def test_layer_inside_a_recovered_one_works_in_place() -> None:
    check(nn.Sequential(conv(), NormAct(4)).eval())


def _with_channels(x: Tensor) -> tuple[Tensor, int]:
    return (x[:, None] if x.dim() == 3 else x), x.dim()


fx.wrap("_with_channels")


def test_a_function_that_fx_keeps_whole_is_followed() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x, dimensions = _with_channels(x)
            return x.relu() * dimensions

    program, x = capture(Net(), InputSpec((4, 4))), torch.randn(2, 4, 4)
    assert torch.equal(program(x), Net()(x))
    kept = {node.target for node in fx.symbolic_trace(Net()).graph.nodes}
    assert _with_channels in kept  # by fx, before and afterwards
