"""The normal form: graphs without side effects, in one spelling, their arguments by name.

Every network is compared with itself before it was captured, to the last bit, at two batch sizes (``capture``
demands that), and then its graph is looked at.
"""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from modelopt_cli.errors import ArtifactError, CaptureError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.allowlist import FUNCTIONS, METHODS, is_in_place
from modelopt_cli.program.call_signatures import is_variadic, of_function, of_method
from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.capture import capture
from modelopt_cli.program.refusals import unfollowed
from modelopt_cli.program.serialization import from_data, state_of, to_data
from modelopt_cli.program.shapes import program_values
from modelopt_cli.program.spelling import canonicalize
from modelopt_cli.text import first_line, typed_line

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.flat = nn.Flatten(2)
        self.register_buffer("count", torch.zeros(1))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def captured(forward: Forward) -> Program:
    torch.manual_seed(0)
    return capture(Net(forward).eval(), InputSpec((4, 6, 6)))


def iadd(a: Any, b: Any) -> Any:
    a += b
    return a


def imul(a: Any, b: Any) -> Any:
    a *= b
    return a


def imod(a: Any, b: Any) -> Any:
    a %= b
    return a


def after(change: Callable[[Tensor], Any], read: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """Change a part of a value, or a view of it, and read the value afterwards."""

    def forward(net: Any, x: Tensor) -> Tensor:
        value = net.conv(x)
        part = change(value)
        return read(value, part)

    return forward


CHANGES: dict[str, Forward] = {
    "relu in place before a sum": lambda n, x: n.conv(n.relu(y := n.conv(x))) + y,
    "relu_": lambda n, x: n.conv((y := n.conv(x)).relu_()) + y,
    "torch.relu_": lambda n, x: n.conv(torch.relu_(y := n.conv(x))) + y,
    "F.relu(inplace=True)": lambda n, x: n.conv(F.relu(y := n.conv(x), inplace=True)) + y,
    "F.elu(inplace by place)": lambda n, x: n.conv(F.elu(y := n.conv(x), 1.0, True)) + y,
    "F.hardswish": lambda n, x: n.conv(F.hardswish(y := n.conv(x), inplace=True)) + y,
    "clamp_ and mul_": lambda n, x: (y := n.conv(x)).clamp_(-0.1, 0.1).mul_(3.0) + y,
    "masked_fill_": lambda n, x: (y := n.conv(x)).masked_fill_(y > 0, 0.5) + y,
    "x += y": lambda n, x: iadd(y := n.conv(x), 1.0) * y,
    "out": lambda n, x: (y := n.conv(x), torch.clamp(y, -0.1, 0.1, out=y), n.conv(y))[2],
    "out of a sum": lambda n, x: (y := n.conv(x), torch.sub(y, n.conv(y), out=y), y * 2)[2],
    "x %= y": lambda n, x: imod(y := n.conv(x), 0.1) + y,
    "x //= y of a view": after(lambda v: operator.ifloordiv(v[:, ::2], 0.1), lambda v, part: v),
    "x **= y": lambda n, x: operator.ipow(y := n.conv(x), 2) + y,
    "sigmoid_ and addcmul_": lambda n, x: (y := n.conv(x)).sigmoid_().addcmul_(x, x) + y,
    "torch.clamp_": lambda n, x: n.conv(torch.clamp_(y := n.conv(x), 0, 0.1)) + y,
    "the input itself": lambda n, x: iadd(x.clone(), 1) + n.conv(x),
    "twice": lambda n, x: n.relu(iadd(y := n.conv(x), -0.1)) + y,
    "a slice": after(lambda v: v[:, 1:3].mul_(2), lambda v, part: v),
    "a slice of a slice": after(lambda v: v[:, 1:][:, :2].relu_(), lambda v, part: torch.cat([v, part], 1)),
    "one place": after(lambda v: v[:, 1].mul_(2), lambda v, part: v),
    "rows and columns": after(lambda v: iadd(v[:, 1:3, 0], 1), lambda v, part: v),
    "every other": after(lambda v: v[:, ::2].mul_(2), lambda v, part: v),
    "a new dimension": after(lambda v: v[:, None].mul_(2), lambda v, part: v),
    "half of a chunk": after(lambda v: v.chunk(2, 1)[1].relu_(), lambda v, part: v + 1),
    "a part of unbind": after(lambda v: v.unbind(1)[2].relu_(), lambda v, part: v + 1),
    "narrow": after(lambda v: v.narrow(1, 1, 2).relu_(), lambda v, part: v),
    "select": after(lambda v: v.select(-1, 2).relu_(), lambda v, part: v),
    "view": after(lambda v: v.view(-1, 4, 36).relu_(), lambda v, part: v + 1),
    "flatten": after(lambda v: v.flatten(1).relu_(), lambda v, part: v + 1),
    "permute": after(lambda v: v.permute(0, 2, 3, 1)[..., :2].relu_(), lambda v, part: v),
    "transpose": after(lambda v: v.transpose(1, 2)[:, 1:4].relu_(), lambda v, part: v),
    "movedim": after(lambda v: v.movedim(1, 3)[..., 1:].relu_(), lambda v, part: v),
    "squeeze": after(lambda v: v.unsqueeze(1).squeeze(1).relu_(), lambda v, part: v + 1),
    "a view taken before": lambda n, x: (v := (y := n.conv(x)).flatten(2)) + n.relu(y).flatten(2) + v,
    "a module's view": lambda n, x: n.flat(y := n.conv(x)).relu_() + y.flatten(2),
    "the other half": lambda n, x: torch.cat([(p := n.conv(x).chunk(2, 1))[0].relu_(), p[1]], 1),
    "two views of one": lambda n, x: (y := n.conv(x))[:, :2].relu_() + y[:, 1:3],
    "a sum, then a slice of it": after(lambda v: imul(iadd(v, 1)[:, :, 0], 0.5), lambda v, part: v),
    "a module, then a slice of it": lambda n, x: (y := n.relu(n.conv(x)), y[:, 1].add_(1), n.conv(y))[2],
    "a chain, then a slice of it": after(
        lambda v: v.mul_(2).relu_()[:, :3].sub_(1).clamp_(min=0), lambda v, part: torch.cat([v, part], 1)
    ),
    "out, then a slice": lambda n, x: (
        y := n.conv(x),
        z := torch.mul(y, 2, out=y),
        z[:, 0].add_(1),
        n.conv(z) + y,
    )[3],
    "a slice of a slice of a sum": after(
        lambda v: imul(iadd(iadd(v, 1)[:, 1:], 1)[:, 0], 3), lambda v, part: v
    ),
    "a chunk of a sum": after(lambda v: iadd(v, 1).chunk(2, 1)[1].relu_(), lambda v, part: v + 1),
    "flatten of a sum": after(lambda v: iadd(v, 1).flatten(1)[:, 3:7].mul_(2), lambda v, part: v + 1),
    "a view kept over two sums": lambda n, x: (
        y := n.conv(x),
        v := y[:, :2],
        z := iadd(y, 1),
        w := imul(v, 3),
        z[:, 1:3].sub_(w + 1),
        n.conv(y) + z + v.sum(1, keepdim=True),
    )[5],
    "twice a sum and a slice": lambda n, x: (
        y := iadd(n.conv(x), 1),
        imul(y[:, 0], 2),
        y := iadd(y, n.conv(y)),
        imul(y[:, 1], 2),
        n.conv(y),
    )[4],
    "nobody reads it": lambda n, x: n.relu(n.conv(x)),
}


@pytest.mark.parametrize("forward", CHANGES.values(), ids=CHANGES)
def test_changes_in_place_become_pure(forward: Forward) -> None:
    program = captured(forward)
    layers = dict(program.named_modules())
    assert not [node for node in program.graph.nodes if is_in_place(node, layers)]
    read_back = from_data(to_data(program), state_of(program))
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(read_back(x), program(x))


def test_what_is_given_is_not_changed() -> None:
    program = captured(lambda net, x: net.relu(x) + net.conv(x))
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    program(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("forward", "what"),
    [
        (lambda net, x: net.conv(x) + iadd(net.conv.bias, 1)[0], "changes conv.bias in place"),
        (lambda net, x: (y := net.conv(x)).chunk(2, 0)[0].relu_().sum() + y, "chunk"),
        (
            lambda net, x: setattr(y := net.conv(x), "data", x) or net.conv(y),
            "assigns to a tensor's attribute",
        ),
        (lambda net, x: (y := net.conv(x)).unfold(1, 2, 2).relu_().sum() + y, "unfold"),
    ],
    ids=["a parameter", "a part of the batch", "data", "a view without an inverse"],
)
def test_changes_that_cannot_be_written_pure_are_refused(forward: Forward, what: str) -> None:
    with pytest.raises(CaptureError, match=what):
        captured(forward)


@pytest.mark.parametrize("raised", [RecursionError(), ValueError("maximum recursion depth exceeded")])
def test_a_stack_that_is_used_up_is_told_in_plain_words(raised: Exception) -> None:
    for text in (first_line(raised), typed_line(raised), unfollowed(raised).message):
        assert "nested too deep" in text
        assert "recursion" not in text.lower()


def test_a_forward_pass_that_calls_itself_is_refused_in_plain_words() -> None:
    with pytest.raises(CaptureError, match="nested too deep") as caught:
        captured(lambda net, x: net(net.conv(x)))
    assert "ecursion" not in str(caught.value)


def test_a_file_from_before_is_made_pure_when_it_is_read() -> None:
    program = captured(lambda net, x: (y := net.conv(x)) + F.relu(y))
    data = to_data(program)
    call = next(node for node in data["nodes"] if node["target"] == "F.relu")
    call["kwargs"]["inplace"] = True
    read, x = from_data(data, state_of(program)), torch.randn(2, 4, 6, 6)
    y = F.relu(program.conv(x))
    assert torch.equal(read(x), y + y)


SPELLINGS: dict[str, list[Forward]] = {
    "flatten": [
        lambda n, x: torch.flatten(n.conv(x), 1),
        lambda n, x: torch.flatten(input=n.conv(x), start_dim=1),
        lambda n, x: n.conv(x).flatten(1),
        lambda n, x: n.conv(x).flatten(start_dim=1),
    ],
    "cat": [
        lambda n, x: torch.cat([x, x], 1),
        lambda n, x: torch.cat([x, x], axis=1),
        lambda n, x: torch.concat(tensors=[x, x], dim=1),
        lambda n, x: torch.concatenate([x, x], axis=1),
    ],
    "mean": [
        lambda n, x: x.mean((2, 3), True),
        lambda n, x: x.mean(axis=(2, 3), keepdims=True),
        lambda n, x: torch.mean(x, dim=(2, 3), keepdim=True),
    ],
    "reshape": [
        lambda n, x: torch.reshape(x, (-1, 144)),
        lambda n, x: x.reshape(-1, 144),
        lambda n, x: x.view(-1, 144),
        lambda n, x: x.view((-1, 144)),
        lambda n, x: x.view(size=(-1, 144)),
    ],
    "permute": [
        lambda n, x: x.permute(0, 2, 3, 1),
        lambda n, x: x.permute((0, 2, 3, 1)),
        lambda n, x: torch.permute(x, dims=(0, 2, 3, 1)),
    ],
    "transpose": [
        lambda n, x: x.transpose(1, 2),
        lambda n, x: x.swapaxes(1, 2),
        lambda n, x: torch.swapaxes(x, axis0=1, axis1=2),
        lambda n, x: torch.swapdims(input=x, dim0=1, dim1=2),
    ],
    "add": [
        lambda n, x: n.conv(x) + x,
        lambda n, x: n.conv(x).add(x),
        lambda n, x: torch.add(n.conv(x), other=x),
        lambda n, x: iadd(n.conv(x), x),
        lambda n, x: n.conv(x).add_(x, alpha=1),
    ],
    "relu": [
        lambda n, x: F.relu(x),
        lambda n, x: torch.relu(input=x),
        lambda n, x: x.relu(),
        lambda n, x: F.relu(x, False),
    ],
    "avg_pool2d": [
        lambda n, x: F.avg_pool2d(x, 2, 2, 0, False, True, 1),
        lambda n, x: F.avg_pool2d(
            input=x,
            kernel_size=2,
            stride=2,
            padding=0,
            ceil_mode=False,
            count_include_pad=True,
            divisor_override=1,
        ),
    ],
    "clamp": [
        lambda n, x: x.clip(0, 1),
        lambda n, x: torch.clamp(x, min=0, max=1),
        lambda n, x: x.clamp(0, 1),
    ],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_call_are_one(name: str) -> None:
    programs = [captured(forward) for forward in SPELLINGS[name]]
    calls = [node for p in programs for node in p.graph.nodes if operation(node) == name]
    assert len(calls) == len(programs)
    assert {(node.op, node.target) for node in calls} == {(calls[0].op, calls[0].target)}
    assert len({repr(values(node)) for node in calls}) == 1


def values(node: fx.Node) -> dict[str, Any]:
    """The arguments by name, tensors by what they are."""
    return {k: fx.node.map_arg(v, lambda a: a.op) for k, v in sorted(arguments(node).items())}


@pytest.mark.parametrize(
    ("forward", "name", "kept"),
    [
        (lambda n, x: torch.add(n.conv(x), x, alpha=2), "add", {"alpha": 2}),
        (lambda n, x: torch.div(n.conv(x), 0.3, rounding_mode="floor"), "div", {"rounding_mode": "floor"}),
        (lambda n, x: F.avg_pool2d(x, 2, 2, 0, False, True, 1), "avg_pool2d", {"divisor_override": 1}),
        (lambda n, x: x.std(1, unbiased=False), "std", {"dim": 1, "unbiased": False}),
        (lambda n, x: torch.softmax(x, 1, torch.float64).float(), "softmax", {"dtype": torch.float64}),
        (lambda n, x: x.max(1, True)[0], "max", {"dim": 1, "keepdim": True}),
    ],
)
def test_no_argument_is_dropped(forward: Forward, name: str, kept: dict[str, Any]) -> None:
    (call,) = [node for node in captured(forward).graph.nodes if operation(node) == name]
    assert kept.items() <= arguments(call).items()


def test_tuples_are_read_part_by_part() -> None:
    program = captured(lambda n, x: torch.stack(p := n.conv(x).chunk(2, 1)).sum(0) + p[-1])
    (chunk,) = [node for node in program.graph.nodes if operation(node) == "chunk"]
    assert all(operation(user) == "getitem" for user in chunk.users)


def test_a_slice_of_a_tuple_is_its_parts() -> None:
    program = captured(lambda n, x: torch.cat(n.conv(x).split(1, 1)[1:3], 1))
    (split,) = [node for node in program.graph.nodes if operation(node) == "split"]
    assert sorted(arguments(user)["index"] for user in split.users) == [1, 2]


@pytest.mark.parametrize(
    "join",
    [
        lambda p, q: p[1:] + p[:1],
        lambda p, q: p + q,
        lambda p, q: p * 2,
        lambda p, q: p[-1:] + (q[0],) + p,  # noqa: RUF005
    ],
)
def test_joined_tuples_are_their_parts(join: Callable[[Any, Any], Any]) -> None:
    program = captured(lambda n, x: torch.cat(join(n.conv(x).chunk(2, 1), x.chunk(2, 1)), 1))
    read, x = from_data(to_data(program), state_of(program)), torch.randn(2, 4, 6, 6)
    assert torch.equal(read(x), program(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: torch.where(x > 0, 1.0, n.conv(x)),
        lambda n, x: n.conv(torch.where(x > 0, 1.0, 0.0)),
        lambda n, x: torch.where(x > 0, n.conv(x), 2.0),
        lambda n, x: n.conv(x).where(x > 0, 2.0),
        lambda n, x: torch.pow(2.0, n.conv(x)) + torch.xlogy(2.0, x.abs() + 1),
    ],
)
def test_numbers_in_the_place_of_tensors(forward: Forward) -> None:
    captured(forward)


def test_tensors_made_without_the_input_have_values() -> None:
    program = captured(lambda n, x: n.conv(x.clone().add_(torch.linspace(0, 1, x.size(-1)))))
    assert program_values(program, 2)[next(reversed(program.graph.nodes))].shape == (2, 4, 6, 6)


def test_fields_are_parts() -> None:
    program = captured(lambda n, x: n.conv(x).max(1).values + x.sort(1).values[:, 0] + x.topk(2, 1)[0][:, 0])
    assert "getattr" not in [operation(node) for node in program.graph.nodes]


def test_a_tuple_whose_length_depends_on_the_batch_is_left() -> None:
    program = captured(lambda n, x: torch.stack(n.conv(x).unbind(0)))
    assert [operation(n) for n in program.graph.nodes if n.op == "call_function"] == ["unbind", "stack"]


def test_nothing_is_computed_that_nobody_reads() -> None:
    program = captured(lambda n, x: (n.conv(x), x * 2)[0])
    assert [node.op for node in program.graph.nodes] == ["placeholder", "call_module", "output"]


def test_arguments_that_cannot_be_told_apart_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.flatten, (x, 1), {"nonsense": 2}))
    with pytest.raises(ArtifactError, match=r"torch.flatten takes no such arguments"):
        canonicalize(graph, nn.Module())


def test_everything_that_may_be_called_has_named_parameters() -> None:
    for name, function in FUNCTIONS.items():
        assert is_variadic(function) or all(of_function(function)), name
        assert is_variadic(function) or of_function(function), name
    for name in METHODS:
        assert of_method(name), name
        assert all(signature and signature[0].name == "input" for signature in of_method(name)), name


X = torch.linspace(-2, 2, 24).view(1, 2, 3, 4)
BY_PLACE: dict[str, tuple[Any, ...]] = {
    "F.conv2d": (X, torch.ones(3, 2, 1, 1), None, 1, 0, 1, 1),
    "F.layer_norm": (X, [4], None, None, 1e-3),
    "F.batch_norm": (X, torch.zeros(2), torch.ones(2), None, None, False, 0.1, 1e-3),
    "F.max_pool2d": (X, 2, 1, 0, 1, True, False),
    "F.adaptive_max_pool2d": (X, (2, 2), False),
    "F.pad": (X, (1, 0), "constant", 3.0),
    "F.interpolate": (X, None, 2.0, "nearest"),
    "F.scaled_dot_product_attention": (X, X + 1, X + 2, None, 0.0, True),
    "F.normalize": (X, 1.0, 3),
    "F.gelu": (X,),
    "torch.where": (X > 0, X, 0.0),
    "torch.split": (X, [1, 3], 3),
    "torch.roll": (X, (1, 2), (2, 3)),
    "torch.norm": (X, 2, 1, True),
    "torch.movedim": (X, 1, 3),
    "torch.unflatten": (X, 3, (2, 2)),
    "torch.cumsum": (X, 2),
    "torch.baddbmm": (X[0], X[0, :, :, :3], X[0]),
    "torch.repeat_interleave": (X, 2, 1),
    "torch.std": (X, 1, False),
    "torch.arange": (1, 7, 2),
    "torch.full": ((2, 3), 4.0),
    "torch.tensor_split": (X, 2, 3),
    "torch.einsum": ("abcd,abcd->abc", X, X + 1),
    "linalg.vector_norm": (X, 2, (2, 3), True),
}


@pytest.mark.parametrize("name", BY_PLACE)
def test_names_mean_what_places_did(name: str) -> None:
    args = BY_PLACE[name]
    graph = fx.Graph()
    tensors = {id(a): graph.placeholder(f"t{i}") for i, a in enumerate(args) if isinstance(a, Tensor)}
    places = tuple(tensors.get(id(a), a) if isinstance(a, Tensor) else a for a in args)
    call = graph.call_function(FUNCTIONS[name], places)
    graph.output(call)
    canonicalize(graph, nn.Module())
    assert name == "torch.einsum" or not call.args
    inputs = {id(a): a for a in args if isinstance(a, Tensor)}
    found = fx.Interpreter(nn.Module(), graph=graph).run(*inputs.values())
    expected = FUNCTIONS[name](*args)
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_numbers_are_told_from_tensors() -> None:
    program = captured(lambda n, x: n.conv(x) + x.shape[1])
    sums = [node for node in program.graph.nodes if node.target is operator.add]
    assert len(sums) == 1
