"""Distillation for every task: by probabilities of each sample, pixel or token, and by features for all."""

from dataclasses import replace

import pytest
import torch
from task_cases import CASES

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.apply import apply
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.teacher import TeacherMember
from modelopt_cli.training import TrainConfig, Training

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


@pytest.mark.parametrize("name", ["classify", "segment", "text", "language", "sequence"])
def test_a_student_learns_the_probabilities_of_its_teacher(name: str) -> None:
    before, after = distance(name, "ce:0+kd")
    assert after < before


def test_pixels_without_a_label_are_left_out_where_labels_count() -> None:
    before, after = distance("segment", "ce:0+dkd")
    assert after < before


@pytest.mark.parametrize("name", ["regress", "multilabel", "restore", "embed"])
def test_without_such_probabilities_losses_on_logits_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="kd compares probabilities of classes"):
        distance(name, "ce+kd")


@pytest.mark.parametrize("name", ["multilabel", "regress", "segment", "restore", "sequence"])
def test_labels_are_learned_by_the_loss_of_the_task_next_to_features(name: str) -> None:
    distance(name, "ce+hint:0.1@0=0" if name in ("segment", "restore", "regress", "multilabel") else "ce")
