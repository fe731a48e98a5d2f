"""Distillation of Programs: against a loop written by hand, what learns along, what holds, what is not."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_worker
import pytest
import torch
import torch.nn.functional as F
from distill_networks import CONFIG, SHAPE, fresh, within
from prune_cases import captured
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import compact
from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.data import Data, open_data
from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.distill.apply import FINETUNE, STAGE, apply, learn
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.feature_points import feature_points
from modelopt_cli.methods.distill.losses import LOSSES
from modelopt_cli.methods.distill.teacher import Teacher, TeacherMember, input_change
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import InputSpec, Preprocess, Program
from modelopt_cli.training import TrainConfig
from modelopt_cli.training.loader import training_batches
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.state import read_state

ALL = "ce+kd+mse+dkd+std+dist+hint:0.1+at+rkd:0.1+crd:0.1"


OF_TEACHERS = [name for name, loss in LOSSES.items() if loss.looks_at != "labels"]


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits?split=train").sample(70)


@pytest.fixture(scope="module")
def teacher() -> Program:
    return fresh(16, seed=1)


@pytest.fixture
def student() -> Program:
    return fresh(4, seed=2)


def weights(program: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in program.state_dict().items()}


def by_hand(student: Program, teacher: Program, digits: Data, config: TrainConfig, w: float, t: float) -> Any:
    """Hinton's distillation as anyone would write it, on the same batches."""
    network = copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=config.peak_lr, momentum=config.momentum)
    for epoch in range(config.epochs):
        for images, labels, _ in batches(digits, config, epoch):
            with torch.no_grad():
                answers = teacher(images)
            logits = network(images)
            soft = F.kl_div((logits / t).log_softmax(1), (answers / t).softmax(1), reduction="batchmean")
            loss = (1 - w) * F.cross_entropy(logits, labels) + w * t * t * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def batches(digits: Data, config: TrainConfig, epoch: int) -> Iterator[Any]:
    return (tuple(b)[:3] for b in training_batches(digits, batch_size=config.batch_size, epoch=epoch, seed=0))


def test_it_is_the_loop_that_anyone_would_write(student, teacher, digits):
    config = TrainConfig(epochs=2, batch_size=16, lr=0.01, weight_decay=0.0, schedule="constant")
    result = apply(student, DistillConfig("ce:0.3+kd:0.7", temperature=3.0), within(digits, teacher, config))
    expected = by_hand(student, teacher, digits, config, 0.7, 3.0).state_dict()
    moved = 0.0
    for name, tensor in result.program.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
        moved += float((tensor - student.state_dict()[name]).abs().sum())
    assert moved > 1


def test_neither_teacher_nor_student_given_is_changed(student, teacher, digits):
    before = weights(student), weights(teacher), student.code, teacher.code
    result = apply(student, DistillConfig(ALL), within(digits, teacher)).program
    assert (student.code, teacher.code) == before[2:]
    for network, old in ((student, before[0]), (teacher, before[1])):
        assert all(torch.equal(tensor, old[name]) for name, tensor in network.state_dict().items())
    assert result.code == student.code
    assert not result.training
    assert result.state_dict().keys() == student.state_dict().keys()
    assert not any(m._forward_hooks for m in result.modules())


@pytest.mark.parametrize("term", OF_TEACHERS)
def test_every_term_brings_the_student_nearer_by_its_own_measure(term, student, teacher, digits):
    """Alone, without labels: the loss that the log has falls."""
    config = replace(CONFIG, epochs=6, lr=0.02)
    alone = DistillConfig(f"ce:0+{term}")
    first = losses(student, teacher, digits, alone, replace(config, epochs=1))
    last = losses(student, teacher, digits, alone, config)
    assert last < 0.9 * first


@pytest.mark.slow
@pytest.mark.parametrize("term", OF_TEACHERS)
def test_by_no_default_weight_does_a_fresh_residual_network_diverge_at_the_usual_rate(term, digits):
    """Taught by its own kind, with all features that have counterparts."""
    teacher, student = residual(0.5, seed=1).eval(), residual(0.25, seed=2)
    config = TrainConfig(epochs=8, batch_size=35, lr=TrainConfig(batch_size=128).peak_lr)
    result = apply(student, DistillConfig(f"ce+{term}"), within(digits, teacher, config))
    assert result.program.history[-1]["steps"] == 16


def residual(width: float, *, seed: int) -> Program:
    torch.manual_seed(seed)
    return captured(BUILTINS["resnet8"].make(10, 1, width), *SHAPE)


def losses(
    student: Program, teacher: Program, digits: Data, config: DistillConfig, training: TrainConfig
) -> float:
    """The mean loss of the last epoch."""
    found: list[float] = []

    class Log:
        def add(self, stage: str, epoch: int, step: int, **figures: float) -> None:
            found.append(figures["loss"])

        def rewind(self, stage: str, epoch: int) -> None:
            pass

    class Fake:
        log = Log()

        def load(self, stage: str) -> None:
            return None

        def save(self, stage: str, state: object) -> None:
            pass

        def finished(self, stage: str) -> None:
            return None

    context = within(digits, teacher, training)
    context = replace(context, training=replace(context.training, run=Fake()))
    learn(copy.deepcopy(student).requires_grad_(True), config, context, {})
    return found[-1]


def test_what_was_pruned_stays_zero(student, teacher, digits):
    with torch.no_grad():
        weight = student.get_parameter("mid.weight")
        weight[weight.abs() < weight.abs().median()] = 0
    student.encodings = compact(student, ["mid.weight"])
    result = apply(student, DistillConfig(finetune_epochs=1), within(digits, teacher)).program
    gone = student.get_parameter("mid.weight") == 0
    assert not result.get_parameter("mid.weight")[gone].any()
    assert result.get_parameter("mid.weight")[~gone].all()
    assert result.encodings["mid.weight"].codec == "sparse"


def test_the_history_says_what_was_learned_from_whom(student, teacher, digits):
    config = DistillConfig("kd+hint@conv=mid", finetune_epochs=2, finetune_lr=0.001)
    context = replace(within(digits, teacher), origin={"teacher_sha256": ["abc"]})
    entry = apply(student, config, context).program.history[-1]
    assert entry["method"] == "distill"
    assert entry["config"]["loss"] == "ce:1+kd:0.9+hint:1@conv=mid"
    assert entry["teachers"] == [{"name": "large", "weight": 1.0}]
    assert entry["teacher_sha256"] == ["abc"]
    assert entry["compared"] == {"hint:1@conv=mid": ["conv=mid"]}
    assert (entry["epochs"], entry["steps"]) == (CONFIG.epochs, CONFIG.epochs * 5)
    assert entry["finetuned"] == {"epochs": 2, "steps": 10, "lr": 0.001}


def test_several_teachers_answer_their_weighted_mean(teacher, digits):
    other = fresh(8, seed=5)
    images = next(digits.batches(6))[0]
    together = Teacher(
        [TeacherMember(teacher, InputSpec(SHAPE)), TeacherMember(other, InputSpec(SHAPE), weight=3.0)]
    )(images).logits
    with torch.no_grad():
        expected = (teacher(images) + 3 * other(images)) / 4
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_other_statistics_sees_images_as_it_knows_them():
    mine = InputSpec((1, 8, 8), Preprocess(mean=(0.5,), std=(0.25,), channels=1))
    its = InputSpec((1, 12, 12), Preprocess(mean=(0.1,), std=(0.5,), channels=1))
    change = input_change(mine, its, resize=True, where="t")
    assert change is not None
    pixels = torch.full((2, 1, 8, 8), 0.6)
    seen = change((pixels - 0.5) / 0.25)
    assert seen.shape == (2, 1, 12, 12)
    torch.testing.assert_close(seen, torch.full_like(seen, (0.6 - 0.1) / 0.5))
    assert input_change(mine, mine, resize=False, where="t") is None
    with pytest.raises(UsageError, match=r"t: takes 1x12x12, the student 1x8x8; .*resize_for_teacher"):
        input_change(mine, its, resize=False, where="t")
    with pytest.raises(UsageError, match="takes 3x8x8, the student 1x8x8"):
        input_change(mine, InputSpec((3, 8, 8)), resize=True, where="t")


def test_an_int8_teacher_answers_but_shows_nothing_inside(student, teacher, digits):
    small = quantize(teacher, QuantizeConfig(), Context(data=digits)).program
    result = apply(student, DistillConfig(), within(digits, small)).program
    near = apply(student, DistillConfig(), within(digits, teacher)).program
    for name, tensor in result.state_dict().items():
        torch.testing.assert_close(tensor, near.state_dict()[name], rtol=0.2, atol=0.05)
    with pytest.raises(UsageError, match="int8 layers, whose values cannot be compared"):
        apply(student, DistillConfig("hint@conv"), within(digits, small))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, training=None), "distill trains the student; give train"),
        (lambda c: replace(c, teachers=()), "distill needs a teacher"),
    ],
    ids=["training", "teacher"],
)
def test_what_it_cannot_do_without(change, message, student, teacher, digits):
    with pytest.raises(UsageError, match=message):
        apply(student, DistillConfig(), change(within(digits, teacher)))


def test_other_classes_are_refused(teacher, digits):
    with pytest.raises(InputError, match="the teacher: has 10 classes, the student 12"):
        apply(fresh(4, classes=12), DistillConfig(), within(digits.sample(16), teacher))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.0}, "temperature: must be above 0, not 0"),
        ({"finetune_epochs": -1}, "finetune_epochs: must be at least 0, not -1"),
        ({"finetune_lr": 0.1}, "finetune_lr: has no meaning without finetune_epochs"),
        ({"finetune_lr": -0.1, "finetune_epochs": 1}, "finetune_lr: must be above 0"),
        ({"loss": "kd+kdd"}, "loss: unknown loss 'kdd'"),
    ],
)
def test_settings_that_cannot_be_used(given, message):
    with pytest.raises(UsageError, match=message):
        DistillConfig(**given)


class Stopped(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [(STAGE, 7), (FINETUNE, 3)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(stage, step, student, teacher, digits, tmp_path):
    config = DistillConfig("kd+hint:0.1+crd:0.1", finetune_epochs=1)
    training = replace(CONFIG, ema=0.9, save_every=2)

    def run(folder: Path, stop: bool, resume: bool) -> Program:
        def progress(name: str, done: int, total: int) -> None:
            if stop and name == stage and done >= step:
                raise Stopped

        with Run(folder, identity={}, resume=resume) as held:
            context = within(digits, teacher, training)
            context = replace(context, training=replace(context.training, run=held, progress=progress))
            return apply(student, config, context).program

    whole = run(tmp_path / "whole", stop=False, resume=False)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop=True, resume=False)
    resumed = run(tmp_path / "cut", stop=False, resume=True)
    assert resumed.history == whole.history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, torchrun):
    done = torchrun(Path(__file__).parent / "distill_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (read_state(tmp_path / f"rank{rank}").tensors for rank in (0, 1))
    alone = distill_worker.distilled().tensors
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)


def test_places_are_found_on_any_size_of_images(teacher):
    assert feature_points(teacher, InputSpec((1, 12, 12)))[0].shape[1:] == (12, 12)
