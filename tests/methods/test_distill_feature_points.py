"""Looking at values inside networks: which there are, what is seen, and that nothing is left behind."""

import copy

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.checkpoint import fresh_model
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.feature_pairs import NetworkPoints, pairs_of
from modelopt_cli.methods.distill.feature_points import embedding_point, feature_points, recording
from modelopt_cli.methods.distill.losses import Term
from modelopt_cli.program import InputSpec, Program

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def resnet() -> Program:
    program = fresh_model("builtin:resnet8?in_channels=1").program
    assert program is not None
    return program


class Untraceable(nn.Module):
    """Whether it adds depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).mean((2, 3))
        return self.head(y if y.sum() > 0 else -y)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_values_at_places_are_those_that_hooks_see(resnet):
    network = NetworkPoints(resnet, InputSpec(SHAPE), "it")
    place = network.find("layer2.0.conv2")
    seen: list[Tensor] = []
    hook = resnet.get_submodule("layer2.0.conv2").register_forward_hook(lambda m, a, y: seen.append(y))
    with recording(resnet, [place]) as values:
        resnet(images())
    hook.remove()
    assert torch.equal(values.take(place), seen[0])


def test_the_end_of_a_block_is_what_the_next_one_is_given(resnet):
    place = NetworkPoints(resnet, InputSpec(SHAPE), "it").find("layer2")
    seen: list[Tensor] = []
    hook = resnet.get_submodule("layer3.0.conv1").register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with recording(resnet, [place]) as values:
        resnet(images())
    hook.remove()
    assert torch.equal(values.take(place), seen[0])


def test_a_program_is_as_before_once_it_is_looked_at_no_more(resnet):
    before, last = copy.deepcopy(resnet), embedding_point(resnet, InputSpec(SHAPE))
    with recording(resnet, feature_points(resnet, InputSpec(SHAPE))) as values:
        inside = resnet(images())
        assert values.take(last).shape == (3, 64)
    assert resnet.code == before.code
    assert dict(resnet.named_modules()).keys() == dict(before.named_modules()).keys()
    assert torch.equal(inside, before(images()))
    assert torch.equal(inside, resnet(images()))


def test_a_copy_keeps_values_of_its_own(resnet):
    place = NetworkPoints(resnet, InputSpec(SHAPE), "it").find("layer3")
    with recording(resnet, [place]) as values:
        resnet(images())
        copy.deepcopy(resnet)(images(2))
        assert values.take(place).shape[0] == 3


def test_a_place_that_is_looked_at_twice_is_one(resnet):
    place = NetworkPoints(resnet, InputSpec(SHAPE), "it").find("layer3")
    with recording(resnet, [place, place]) as values:
        resnet(images())
        values.take(place)
        with pytest.raises(KeyError):
            values.take(place)


def test_without_a_graph_modules_are_places():
    network = Untraceable()
    found = NetworkPoints(network, InputSpec(SHAPE), "it")
    assert [(p.name, p.shape) for p in found.points] == [
        ("body.0", (4, 28, 28)), ("body.1", (4, 28, 28)), ("body.2", (6, 13, 13)), ("body", (6, 13, 13)),
        ("head", (10,)),
    ]  # fmt: skip
    place = found.embedding
    assert (place.shape, place.before) == ((6,), True)
    with recording(network, [place, found.find("body.0")]) as values:
        logits = network(images())
    assert torch.equal(network.head(values.take(place)), logits)
    assert not any(m._forward_hooks for m in network.modules())


def test_layers_that_nobody_names_are_matched_by_size(resnet):
    teacher = fresh_model("builtin:resnet20?in_channels=1").program
    assert teacher is not None
    found = pairs_of(
        Term("hint", 1.0),
        NetworkPoints(resnet, InputSpec(SHAPE), "s"),
        NetworkPoints(teacher, InputSpec(SHAPE), "t"),
    )
    assert [(p.student.shape, p.teacher.shape) for p in found] == [
        ((16, 28, 28), (16, 28, 28)), ((32, 14, 14), (32, 14, 14)), ((64, 7, 7), (64, 7, 7))
    ]  # fmt: skip
    assert [p.student.name for p in found] == ["layer1.0.relu", "layer2.0.relu", "layer3.0.relu"]
    assert [p.teacher.name for p in found] == ["layer1.2.relu", "layer2.2.relu", "layer3.2.relu"]


def test_named_layers_are_compared_in_step(resnet):
    both = NetworkPoints(resnet, InputSpec(SHAPE), "it")
    term = Term("hint", 1.0, ("layer1", "fc"), ("layer2", "layer*.0.conv1"))
    assert [(p.student.shape, p.teacher.shape) for p in pairs_of(term, both, both)] == [
        ((16, 28, 28), (32, 14, 14)), ((10,), (64, 7, 7))
    ]  # fmt: skip


def test_a_glob_that_matches_nothing_suggests_a_layer(resnet):
    with pytest.raises(UsageError, match=r"'layr3' matches no layer of it; the nearest is 'layer3"):
        NetworkPoints(resnet, InputSpec(SHAPE), "it").find("layr3")


def test_networks_without_a_common_size_are_refused(resnet):
    flat = fresh_model("builtin:lenet300").program
    assert flat is not None
    with pytest.raises(UsageError, match=r"hint finds no values of one size.*the student has none"):
        pairs_of(
            Term("hint", 1.0),
            NetworkPoints(flat, InputSpec(SHAPE), "s"),
            NetworkPoints(resnet, InputSpec(SHAPE), "t"),
        )
