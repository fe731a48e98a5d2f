"""Distillation for every task: by probabilities of each sample, pixel or token, and by features for all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from task_cases import CASES
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.distill.apply import apply, learn
from modelopt_cli.methods.distill.cache import CacheRequest
from modelopt_cli.methods.distill.cache_layout import Layout, OutputForm
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.feature_points import FeatureValues
from modelopt_cli.methods.distill.losses import LOSSES
from modelopt_cli.methods.distill.objective import DistillationLoss
from modelopt_cli.methods.distill.teacher import TeacherMember, TeacherOutput
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.tasks import parse_task
from modelopt_cli.training import StepInputs, TrainConfig, Training, objective

CONFIG = TrainConfig(epochs=8, batch_size=16, optimizer="adamw", lr=0.02, weight_decay=0.0)


def distance(name: str, loss: str) -> tuple[float, float]:
    """Mean squared difference of the outputs from the teacher's, before and after."""
    case = CASES[name]
    teacher, student = case.made(1), case.made(2)
    sample = case.samples()[0][0]
    dtype = "float32" if sample.is_floating_point() else "int64"
    member = TeacherMember(teacher, replace(student.input, dtype=dtype))  # type: ignore[arg-type, type-var]
    training = Training(case.data(), config=CONFIG, task=case.spec)
    context = DistillContext(training=training, teachers=(member,), task=case.spec)
    made = apply(student, DistillConfig(loss=loss), context).program  # type: ignore[arg-type]
    inputs = torch.stack([x for x, _ in case.samples()])
    with torch.inference_mode():
        wanted = case.spec.logits(teacher(inputs))
        if wanted is None:
            wanted = teacher(inputs)
            return tuple(float((n(inputs) - wanted).square().mean()) for n in (student, made))  # type: ignore
        logs = wanted.log_softmax(1)
        rows = [case.spec.logits(n(inputs)).log_softmax(1) for n in (student, made)]  # type: ignore[union-attr]
        return tuple(float((logs.exp() * (logs - each)).sum(1).mean()) for each in rows)  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classify", "segment", "text", "language", "sequence"])
def test_a_student_learns_the_probabilities_of_its_teacher(name: str) -> None:
    before, after = distance(name, "ce:0+kd")
    assert after < before


def test_pixels_without_a_label_are_left_out_where_labels_count() -> None:
    before, after = distance("segment", "ce:0+dkd")
    assert after < before


@pytest.mark.parametrize("name", ["regress", "restore", "embed"])
def test_without_such_probabilities_losses_on_logits_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"kd compares probabilities of classes, .* such as ce.mse"):
        distance(name, "ce+kd")


@pytest.mark.parametrize("name", CASES)
def test_the_default_loss_is_one_that_the_task_has(name: str) -> None:
    case = CASES[name]
    if name == "detect":
        with pytest.raises(UsageError, match="no default for a network to detect"):
            DistillConfig().for_task(case.spec)
        return
    config = DistillConfig().for_task(case.spec)
    outputs = case.spec.row.logits
    assert config.loss == ("ce+mse" if outputs is None else "ce:0.1+kd:0.9")
    assert DistillConfig(loss="ce+at").for_task(case.spec).loss == "ce+at"


@pytest.mark.parametrize("name", ["regress", "restore", "embed"])
def test_without_a_loss_a_student_learns_numbers_and_its_teacher_s_outputs(name: str) -> None:
    case = CASES[name]
    teacher, student = case.made(1), case.made(2)
    assert isinstance(student, Program)
    training = Training(case.data(), config=replace(CONFIG, epochs=1), task=case.spec)
    context = DistillContext(
        training=training, teachers=(TeacherMember(teacher, student.input),), task=case.spec
    )
    by_default, named = (
        apply(student, DistillConfig(loss=loss), context).program for loss in (None, "ce:1+mse:1")
    )
    assert by_default.history[-1]["config"]["loss"] == "ce:1+mse:1"
    for one, other in zip(by_default.parameters(), named.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_a_loss_needs_and_a_task_does_not_have() -> None:
    with pytest.raises(UsageError, match="dist compares classes of which one is right, and multilabel has"):
        distance("multilabel", "ce+dist")
    with pytest.raises(UsageError, match="dkd needs the right class of each row of logits, which sequence"):
        distance("sequence", "ce+dkd")


@pytest.mark.parametrize("name", ["regress", "restore", "embed", "multilabel", "segment"])
def test_outputs_themselves_are_learned_where_they_are_no_probabilities(name: str) -> None:
    before, after = distance(name, "ce:0+mse")
    assert after < before


@pytest.mark.parametrize("name", ["multilabel", "regress", "segment", "restore", "sequence"])
def test_labels_are_learned_by_the_loss_of_the_task_next_to_features(name: str) -> None:
    distance(name, "ce+hint:0.1@0=0" if name in ("segment", "restore", "regress", "multilabel") else "ce")


def term(loss: str, task: str, student: Tensor, teacher: Tensor, targets: Any, **settings: Any) -> float:
    """A term of a distillation whose teacher returns this."""

    class Fixed:
        def __call__(self, inputs: Any) -> TeacherOutput:
            return TeacherOutput(teacher)

    config = DistillConfig(loss=f"ce:0+{loss}:1", **settings)
    spec = parse_task(task)
    objective = DistillationLoss(config, Fixed(), FeatureValues(), [], 0.0, 1, None, spec)  # type: ignore[arg-type]
    return float(objective(student, targets, StepInputs(torch.zeros(2, 1))))


def divergences(student: Tensor, teacher: Tensor, axis: int, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` at each place, by its formula."""
    p, q = ((z.double() / temperature).softmax(axis) for z in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum(axis)


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_divergence_of_each_pixel_that_counts() -> None:
    student, teacher = drawn(2, 3, 4, 5)
    masks = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    masks[0, 1] = -100
    wanted = divergences(student, teacher, 1, 2.0)[masks != -100].mean()
    found = term("kd", "segment", student, teacher, masks, temperature=2.0)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    larger = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)  # logits are often smaller than masks
    assert term("kd", "segment", student, teacher, larger, temperature=2.0) == pytest.approx(found)


def test_divergence_of_a_single_logit_is_that_of_its_sigmoid() -> None:
    student, teacher = drawn(2, 1, 3, 3)
    p, q = ((z.double() / 2).sigmoid() for z in (teacher, student))
    nats = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    masks = torch.zeros(2, 3, 3, dtype=torch.int64)
    found = term("kd", "segment", student, teacher, masks, temperature=2.0)
    assert found == pytest.approx(4 * float(nats.mean()), rel=1e-5)
    rows = student.flatten(1), teacher.flatten(1)
    found = term("kd", "multilabel", *rows, torch.zeros(2, 9), temperature=2.0)
    assert found == pytest.approx(4 * float(nats.mean()), rel=1e-5)


def test_divergence_of_each_token_that_has_a_next_one() -> None:
    student, teacher = drawn(2, 5, 7)
    tokens = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    tokens[1, 3:] = -100
    counts = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    wanted = divergences(student, teacher, 2, 4.0)[counts].mean()
    assert term("kd", "language", student, teacher, tokens) == pytest.approx(float(wanted), rel=1e-5)
    # The label of a place is the token after it.
    rows = student[counts], teacher[counts], tokens[:, 1:][counts[:, :-1]]
    expected = LOSSES["dkd"].make(*rows, 4.0)
    assert term("dkd", "language", student, teacher, tokens) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("first", ["true", "false"])
def test_divergence_of_each_frame_whatever_comes_first(first: str) -> None:
    student, teacher = drawn(2, 6, 4)
    wanted = divergences(student, teacher, 2, 4.0).mean()
    if first == "false":
        student, teacher = student.transpose(0, 1), teacher.transpose(0, 1)
    targets = {"ids": torch.ones(2, 1).long(), "lengths": torch.tensor([1, 1])}
    found = term("kd", f"sequence?batch_first={first}", student, teacher, targets)
    assert found == pytest.approx(float(wanted), rel=1e-5)


class SecondFrames(nn.Module):
    """Classes of frames ``(T, N, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(2, 0, 1)


CACHED = {
    "segment": ("segment", "ce+kd"),
    "language": ("language", "ce+kd"),
    "multilabel": ("multilabel", "ce+kd"),
    "numbers": ("regress", "ce+mse"),
    "images": ("restore", "ce+mse"),
    "frames first": ("sequence?batch_first=false", "ce+kd"),
}


@pytest.mark.parametrize("name", CACHED)
def test_kept_outputs_of_any_form_make_the_same_student(name: str, tmp_path: Path) -> None:
    task, loss = CACHED[name]
    case = replace(CASES[task.partition("?")[0]], task=task)
    if name == "frames first":
        case = replace(case, network=SecondFrames)
    teacher, student = case.made(1), case.made(2)
    assert isinstance(student, Program)
    member = TeacherMember(teacher, student.input)
    training = Training(case.data(), config=replace(CONFIG, epochs=2), task=case.spec)
    context = DistillContext(training=training, teachers=(member,), task=case.spec)
    kept = replace(context, cache=CacheRequest(tmp_path / "kept", {}))
    with threads(1):
        plain, first = (apply(student, DistillConfig(loss=loss), each).program for each in (context, kept))
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.fill_(torch.nan)  # it is not asked again
        again = apply(student, DistillConfig(loss=loss), kept).program
    for each in (first, again):
        for one, other in zip(plain.parameters(), each.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_largest_logits_of_each_pixel_are_kept() -> None:
    spec, output = parse_task("segment"), 3 * drawn(2, 6, 3, 4)[0]
    form = OutputForm.of(output, spec, 2)
    layout = Layout(9, 1, 6, 2, form)
    assert layout.entry.itemsize == 4 + 12 * (4 + 2 * 4 + 2 * 2)
    read = layout.unpack(layout.pack(output))
    assert read.shape == output.shape
    p, q = output.softmax(1), read.softmax(1)
    largest = torch.zeros_like(p, dtype=torch.bool).scatter(1, output.topk(2, 1).indices, True)
    torch.testing.assert_close(p[largest], q[largest], rtol=1e-5, atol=1e-6)
    flat = torch.where(largest, torch.nan, q)
    assert float((flat.nan_to_num(-1).amax(1) - flat.nan_to_num(9).amin(1)).abs().max()) < 1e-6


def test_a_detector_learns_its_labels_and_a_teacher_s_features() -> None:
    case = CASES["detect"]
    images = torch.stack([x for x, _ in case.samples()])
    teacher, student = case.made(1), case.made(2)
    member = TeacherMember(teacher, InputSpec((1, 16, 16)))
    training = Training(case.data(), config=CONFIG, task=case.spec)
    context = DistillContext(training=training, teachers=(member,), task=case.spec)

    def apart() -> float:
        with torch.inference_mode():
            maps = (n.features(images).square().mean(1).flatten(1) for n in (student, teacher))  # type: ignore[operator]
            one, other = (nn.functional.normalize(each) for each in maps)
            return float((one - other).square().mean())

    before = apart()
    learn(student, DistillConfig(loss="ce:0.1+at:1000@features"), context, {})
    assert apart() < before
    with pytest.raises(UsageError, match="kd compares outputs, and in training a network to detect returns"):
        learn(student, DistillConfig(loss="ce+kd"), context, {})
    with pytest.raises(UsageError, match=r"^loss: has no default for .* detect, .*such as ce\+at@LAYER"):
        learn(student, DistillConfig(), context, {})
    with pytest.raises(UsageError, match="teacher: compares outputs, and in training a network to detect"):
        objective(TrainConfig(teacher="self"), teacher, case.spec)


def test_probabilities_of_classes_by_themselves_are_learned_from_the_network_before() -> None:
    student, teacher = drawn(4, 3)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return teacher

    config = TrainConfig(teacher="self", distill_weight=1.0, temperature=2.0)
    found = objective(config, Fixed(), parse_task("multilabel"))
    p, q = ((z.double() / 2).sigmoid() for z in (teacher, student))
    nats = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    loss = float(found(student, torch.zeros(4, 3), StepInputs(torch.zeros(4, 1))))
    assert loss == pytest.approx(4 * float(nats.mean()), rel=1e-5)
