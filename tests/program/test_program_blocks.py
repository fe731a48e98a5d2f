"""Removed blocks against the same torch module with those branches zeroed by hand."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from program_networks import build, side
from quick_cases import quick
from torch import Tensor, nn

from modelopt_cli import artifact
from modelopt_cli.errors import UsageError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.removable import find_blocks, obstacles, remove_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def images(shape: tuple[int, ...], count: int = 2) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def captured(model: nn.Module, shape: tuple[int, ...] = (4, 8, 8)) -> Program:
    return capture(model.eval(), InputSpec(shape))


def zero(model: nn.Module, *layers: str) -> None:
    with torch.no_grad():
        for layer in layers:
            for parameter in model.get_submodule(layer).parameters():
                parameter.zero_()


# Network: how many blocks it has, which to remove, and the last layers of those branches.
RESIDUAL: dict[str, tuple[int, list[str], list[str]]] = {
    "resnet18": (8, ["layer1.0", "layer1.1", "layer3.1"], ["layer1.0.bn2", "layer1.1.bn2", "layer3.1.bn2"]),
    "resnet50": (14, ["layer1.1", "layer1.2", "layer4.2"], [f"layer{n}.bn3" for n in ("1.1", "1.2", "4.2")]),
    "mobilenet_v2": (
        13,
        ["features.3.conv", "features.16.conv"],
        ["features.3.conv.3", "features.16.conv.3"],
    ),
    "efficientnet_b0": (
        12,
        ["features.2.1.block", "features.6.3.block"],
        ["features.2.1.block.3.1", "features.6.3.block.3.1"],
    ),
    "vit_b_32": (
        24,
        [f"encoder.layers.encoder_layer_{n}" for n in ("0.self_attention", "3.mlp", "11.mlp")],
        [f"encoder.layers.encoder_layer_{n}" for n in ("0.self_attention.out_proj", "3.mlp.3", "11.mlp.3")],
    ),
    "swin_t": (
        24,
        ["features.1.0.attn", "features.1.1.mlp", "features.7.1.attn"],
        ["features.1.0.attn.proj", "features.1.1.mlp.3", "features.7.1.attn.proj"],
    ),
    "convnext_tiny": (
        18,
        ["features.1.0.block", "features.5.4.block"],
        ["features.1.0.block.5", "features.5.4.block.5"],
    ),
    "regnet_y_400mf": (
        16,
        ["trunk_output.block2.block2-1.f", "trunk_output.block4.block4-5.f"],
        ["trunk_output.block2.block2-1.f.c.1", "trunk_output.block4.block4-5.f.c.1"],
    ),
}


@pytest.mark.parametrize("name", quick(RESIDUAL, ("resnet18", "mobilenet_v2", "swin_t")))
def test_a_network_without_blocks_equals_it_with_their_branches_zeroed(name: str) -> None:
    count, remove, ends = RESIDUAL[name]
    model, shape = build(name), (3, side(name), side(name))
    program = capture(model, InputSpec(shape), verify=False)
    before = program.state_dict().keys()

    blocks = {block.name: block for block in find_blocks(program)}
    assert len(blocks) == count
    pruned = remove_blocks(program, remove)

    zero(model, *ends)
    x = images(shape)
    with torch.no_grad():
        assert torch.equal(pruned(x), model(x))
    gone = before - pruned.state_dict().keys()
    assert {p for name in remove for p in blocks[name].parameters} <= gone
    assert {key.rpartition(".")[0] for key in gone} >= {layer for r in remove for layer in blocks[r].layers}
    assert program.state_dict().keys() == before
    names = {str(n.target) for n in pruned.graph.nodes if n.op in ("call_module", "get_attr")}
    assert not any(key == n or key.startswith(f"{n}.") for key in gone for n in names)


LONE = {
    "vgg11_bn": ["features.11", "features.18", "features.22", "features.25", "classifier.3"],
    "alexnet": ["features.10", "classifier.4"],
}


@pytest.mark.parametrize("name", LONE)
def test_a_lone_layer_becomes_the_identity(name: str) -> None:
    model, shape = build(name), (3, 64, 64)
    program = capture(model, InputSpec(shape), verify=False)
    found = find_blocks(program)
    assert [block.name for block in found] == LONE[name]
    first, last = found[0].name, found[-1].name
    pruned = remove_blocks(program, [first, last])

    for path in (first, last):
        parent, _, index = path.rpartition(".")
        layers: nn.Sequential = model.get_submodule(parent)
        layers[int(index)] = nn.Identity()
        following = int(index) + 1
        if isinstance(layers[following], nn.BatchNorm2d):
            layers[following] = nn.Identity()
            following += 1
        layers[following] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(pruned(images(shape)), model(images(shape)))


def test_squeezenet_has_no_blocks_and_every_layer_has_a_reason() -> None:
    program = capture(build("squeezenet1_1"), InputSpec((3, 64, 64)), verify=False)
    assert find_blocks(program) == ()
    reasons = obstacles(program, ())
    convolutions = [n for n, m in program.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(reasons) == sorted(convolutions)
    assert reasons["features.0"] == "makes 64x31x31 of 3x64x64, and no shortcut leads around it"


class Net(nn.Module):
    """Blocks of every odd kind around convolutions of four channels."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], inplace: bool = True) -> None:
        super().__init__()
        for name in ("a", "b", "c", "d"):
            self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))
        self.wide = nn.Conv2d(4, 1, 1)
        self.relu = nn.ReLU(inplace=inplace)
        self.own = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


def names(forward: Callable[[nn.Module, Tensor], Tensor]) -> list[str]:
    torch.manual_seed(0)
    return [block.name for block in find_blocks(captured(Net(forward)))]


def test_all_branches_of_a_parallel_sum_are_blocks() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        normal = torch.tanh(x)
        return x + net.b(normal) + net.c(normal)

    assert names(forward) == ["b", "c"]
    model = Net(forward)
    both = remove_blocks(captured(model), ["b", "c"])
    with torch.no_grad():
        assert torch.equal(both(images((4, 8, 8))), model.a(images((4, 8, 8))))


def test_a_shortcut_may_come_first_or_pass_an_identity_or_hold_others() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        y = net.b(F.gelu(x))
        y = y + net.c(torch.tanh(y))
        return torch.add(F.dropout(y, 0.5, net.training), x)

    assert names(forward) == ["c", "b"]
    model = Net(forward)
    x = images((4, 8, 8))
    with torch.no_grad():
        assert torch.equal(remove_blocks(captured(model), ["b"])(x), model.a(x))
        assert torch.equal(remove_blocks(captured(model), ["b", "c"])(x), model.a(x))
        without_c = copy.deepcopy(model)
        zero(without_c, "c")
        assert torch.equal(remove_blocks(captured(model), ["c"])(x), without_c(x))


def test_concatenation_is_no_shortcut() -> None:
    program = captured(Net(lambda net, x: torch.cat([x, net.wide(net.a(x).sin())], 1)))
    assert find_blocks(program) == ()
    assert obstacles(program, ()) == {
        "a": "no shortcut leads around it",
        "wide": "makes 1x8x8 of 4x8x8, and no shortcut leads around it",
    }


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda net, x: F.gelu(net.a(x)) + torch.tanh(net.b(x)), id="two branches, no shortcut"),
        pytest.param(lambda net, x: (y := net.wide(x).sin()) + net.b(x + y), id="broadcast"),
        pytest.param(lambda net, x: (y := x.sin()) + torch.relu(y), id="no layer inside"),
        pytest.param(lambda net, x: torch.add(y := x.sin(), net.a(y).tanh(), alpha=2), id="alpha"),
        pytest.param(lambda net, x: (y := net.a(x).sin()) + net.a(y).sin(), id="shared layer"),
    ],
)
def test_what_is_no_residual_branch(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    program = captured(Net(forward))
    adds = {n.name for n in program.graph.nodes if "add" in n.name}
    assert not [block for block in find_blocks(program) if block.result in adds]


@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.view(-1, 4, 8, 8)], ids=["itself", "a view of it"])
def test_a_shortcut_that_the_branch_changes_in_place_is_what_it_was_changed_to(
    view: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    net = Net(lambda net, x: (y := x.sin()) + net.a(net.relu(view(y))).sin())
    (block,) = [block for block in find_blocks(captured(net)) if block.name == "a"]
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(remove_blocks(captured(net), [block.name])(x), x.sin().relu())


def test_a_shortcut_is_not_changed_in_place_for_its_other_readers() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        y = net.relu(x + net.b(x.tanh()))
        return net.c(y).sin() * x.sigmoid()

    model = Net(forward)
    pruned = remove_blocks(captured(model), ["b"])
    reference = Net(forward, inplace=False)
    reference.load_state_dict(model.state_dict())
    zero(reference, "b")
    x = images((4, 8, 8))
    assert torch.equal(pruned(x), reference.eval()(x))
    pruned.train()(x).sum().backward()
    reference(x).sum().backward()
    assert torch.equal(pruned.a.weight.grad, reference.a.weight.grad)


def test_a_second_relu_is_left_out_and_training_goes_on() -> None:
    program = captured(build("resnet18"), (3, 64, 64))
    pruned = remove_blocks(program, ["layer1.0", "layer1.1", "layer4.1"])
    calls = [str(n.target) for n in pruned.graph.nodes if n.op == "call_module"]
    assert not [call for call in calls if call.startswith(("layer1", "layer4.1"))]
    assert not [n for n in pruned.graph.nodes if n.target is torch.clone]
    pruned.train()(images((3, 64, 64))).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_removal_is_repeatable_and_survives_a_file(tmp_path: Path) -> None:
    program = captured(build("resnet18"), (3, 64, 64))
    one = remove_blocks(program, ["layer3.1", "layer1.0"])
    again = remove_blocks(remove_blocks(program, ["layer1.0"]), ["layer3.1"])
    assert one.code == again.code
    artifact.write_program(one, tmp_path / "net.safetensors")
    x = images((3, 64, 64))
    with torch.no_grad():
        assert torch.equal(artifact.read_program(tmp_path / "net.safetensors")(x), one(x))


def test_an_unknown_block_is_refused() -> None:
    program = captured(build("resnet18"), (3, 64, 64))
    with pytest.raises(UsageError, match=r"layer2\.0: is not a block that can be removed"):
        remove_blocks(program, ["layer2.0"])
