"""The form in which a teacher computes: number format and memory layout, and still its own logits."""

from dataclasses import replace

import pytest
import torch
from distill_networks import CONFIG, fresh, within
from prune_cases import captured
from torch import Tensor, nn

from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.data import open_data
from modelopt_cli.methods.distill import teacher as teachers
from modelopt_cli.methods.distill.apply import apply
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.feature_points import feature_points
from modelopt_cli.methods.distill.teacher import Teacher, TeacherMember
from modelopt_cli.program import InputSpec, Program

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def network() -> Program:
    torch.manual_seed(0)
    return captured(BUILTINS["resnet8"].make(10, 1, 0.5), *SHAPE).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))


def mixed(teacher: Teacher, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return teacher(images).logits


def test_in_mixed_precision_it_computes_in_bfloat16_where_the_processor_does(network, images, monkeypatch):
    members = [TeacherMember(network, InputSpec(SHAPE))]
    exact = Teacher(members)(images).logits
    monkeypatch.setattr(teachers, "_computes_bfloat16", lambda: True)
    rounded = mixed(Teacher(members, amp=True), images)
    assert rounded.dtype == torch.float32
    # bfloat16 has 8 bits of mantissa; a hundredth is well above that, and far below another answer.
    difference = float((rounded - exact).abs().max() / exact.abs().max())
    assert 1e-4 < difference < 1e-2
    monkeypatch.setattr(teachers, "_computes_bfloat16", lambda: False)
    assert torch.equal(mixed(Teacher(members, amp=True), images), exact)


@pytest.mark.parametrize("amp", [False, True])
def test_a_training_in_mixed_precision_has_such_a_teacher(amp, monkeypatch):
    asked = []
    monkeypatch.setattr(teachers, "_computes_bfloat16", lambda: bool(asked.append(True)))
    data = open_data("digits?split=train").sample(32)
    apply(fresh(4), DistillConfig(), within(data, fresh(8), replace(CONFIG, epochs=1, amp=amp)))
    assert bool(asked) is amp


@pytest.mark.parametrize("kind", ["program", "module"])
def test_where_it_is_not_packed_its_channels_are_innermost(kind, network, images):
    given = network if kind == "program" else nn.Sequential(network)
    place = [place for place in feature_points(given, InputSpec(SHAPE)) if place.shape[-1] == 4][-1]
    teacher = Teacher([TeacherMember(given, InputSpec(SHAPE))], [place])
    answer = teacher(images)
    assert answer.features[place].is_contiguous(memory_format=torch.channels_last)
    assert not answer.features[place].is_contiguous()
    torch.testing.assert_close(answer.logits, network(images), rtol=1e-4, atol=1e-5)
    assert next(network.parameters()).is_contiguous()  # the one that was given


class Viewing(nn.Module):
    """Insists on the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 256, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.conv(x).view(len(x), -1))
        return y


def test_one_that_cannot_have_them_innermost_is_asked_as_it_is(images):
    network = Viewing().eval()
    with torch.no_grad():
        assert torch.equal(
            Teacher([TeacherMember(network, InputSpec(SHAPE))])(images).logits, network(images)
        )


class Reused(nn.Module):
    """Reads a value before an activation changes it; the reader may be fused with what comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.short, self.act, self.fc = nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        short = self.short(x)
        y = self.conv(self.act(x))
        result: Tensor = self.fc((short + y).mean((2, 3)))
        return result


def test_a_value_is_read_before_it_is_changed_in_place(images):
    torch.manual_seed(0)
    module = Reused().eval()
    logits = Teacher([TeacherMember(captured(module, *SHAPE), InputSpec(SHAPE))])(images).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, module(images.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["other outputs", "an exception"])
def test_a_packed_form_that_is_wrong_is_not_used_and_said(wrong, network, images, monkeypatch):
    def prepack(program):
        return lambda x: program(x) + 0.1 if wrong == "other outputs" else program(x).view(3, 7)

    monkeypatch.setattr(teachers, "prepack", prepack)
    notes = []
    teacher = Teacher([TeacherMember(network, InputSpec(SHAPE), name="large.pth")], on_note=notes.append)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).logits, network(images), rtol=1e-4, atol=1e-5)
    assert notes == ["large.pth: its fastest form gives other outputs, so it runs as it is"]


def test_a_packed_form_that_agrees_is_packed_for_the_batch_that_comes(network, images, monkeypatch):
    seen, real = [], teachers.prepack

    def prepack(program):
        form = real(program)
        return lambda x: (seen.append(len(x)), form(x))[1]

    monkeypatch.setattr(teachers, "prepack", prepack)
    notes = []
    teacher = Teacher([TeacherMember(network, InputSpec(SHAPE))], on_note=notes.append)
    made_anew = len(seen)
    teacher(images)
    assert (made_anew, seen[-1], notes) == (1, len(images), [])
