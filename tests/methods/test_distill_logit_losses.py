"""Losses on logits: against loops over the papers' formulas, by hand, and at the extremes."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from distill_cases import Array, check, check_precision, gradient, normal
from torch import Tensor

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill import logit_losses
from modelopt_cli.methods.distill.losses import LOSSES

STUDENT, TEACHER = normal(4, 5, scale=2), normal(4, 5, seed=1, scale=2)
LABELS = torch.tensor([3, 0, 0, 4])
ON_LOGITS = [name for name, loss in LOSSES.items() if loss.looks_at == "logits"]
T = 3.0


def softmax(z: Array) -> Array:
    e = np.exp(z)
    return np.array(e / e.sum())


def divergence(p: Array, q: Array) -> float:
    return sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True))


def kd(student: Array, teacher: Array) -> float:
    pairs = zip(student, teacher, strict=True)
    return T**2 * np.mean([divergence(softmax(t / T), softmax(s / T)) for s, t in pairs])


def kd_slope(student: Array, teacher: Array) -> Array:
    return np.array([
        T * (softmax(s / T) - softmax(t / T)) / len(student) for s, t in zip(student, teacher, strict=True)
    ])  # fmt: skip


def mse(student: Array, teacher: Array) -> float:
    return sum(float((s - t) ** 2) for s, t in zip(student.flat, teacher.flat, strict=True)) / student.size


def mse_slope(student: Array, teacher: Array) -> Array:
    return 2 * (student - teacher) / student.size


def dkd(student: Array, teacher: Array) -> float:
    total = 0.0
    for s, t, label in zip(student, teacher, LABELS.tolist(), strict=True):
        q, p = softmax(s / T), softmax(t / T)
        both = [np.array([x[label], 1 - x[label]]) for x in (p, q)]
        others = [np.delete(x, label) / (1 - x[label]) for x in (p, q)]
        total += 1.0 * divergence(*both) + 8.0 * divergence(*others)
    return T**2 * total / len(student)


def std(student: Array, teacher: Array) -> float:
    def score(z: Array) -> Array:
        mean = sum(z) / len(z)
        return (z - mean) / math.sqrt(sum((x - mean) ** 2 for x in z) / len(z))

    return kd(np.array([*map(score, student)]), np.array([*map(score, teacher)]))


def correlation(a: Array, b: Array) -> float:
    def spread(x: Array) -> float:
        return sum((v - x.mean()) ** 2 for v in x)

    product = sum((x - a.mean()) * (y - b.mean()) for x, y in zip(a, b, strict=True))
    return float(product / math.sqrt(spread(a) * spread(b)))


def dist(student: Array, teacher: Array) -> float:
    q, p = (np.array([softmax(z / T) for z in logits]) for logits in (student, teacher))
    samples, classes = student.shape
    inter = sum(correlation(q[i], p[i]) for i in range(samples)) / samples
    intra = sum(correlation(q[:, j], p[:, j]) for j in range(classes)) / classes
    return T**2 * ((1 - inter) + (1 - intra))


REFERENCES = {"kd": (kd, kd_slope), "mse": (mse, mse_slope), "dkd": (dkd, None), "std": (std, None),
              "dist": (dist, None)}  # fmt: skip


@pytest.mark.parametrize("name", ON_LOGITS)
def test_distill_logits_are_numpys(name: str) -> None:
    reference, slope = REFERENCES[name]
    teacher = TEACHER.numpy()
    check(
        lambda s: LOSSES[name].make(s, TEACHER, LABELS, T),
        lambda s: reference(s, teacher),
        STUDENT,
        slope and (lambda s: slope(s, teacher)),
    )


def ignores_a_shift(reference: Callable[[Array, Array], float]) -> bool:
    student, teacher = STUDENT.numpy(), TEACHER.numpy()
    return math.isclose(reference(student + 1, teacher), reference(student, teacher), rel_tol=1e-9)


ROW = [[math.log(3), 0.0]]  # probabilities 3/4 and 1/4
FLAT = [[0.0, 0.0]]
BY_HAND = [
    # From the teacher's (3/4, 1/4) to the student's (1/2, 1/2); at T = 2 the teacher's are as sqrt(3) to 1.
    ("kd", FLAT, ROW, 1.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    ("kd", FLAT, ROW, 2.0, 4 * (math.log(2) + math.log(3) * 0.5 * math.sqrt(3) / (1 + math.sqrt(3))
                                - math.log(1 + math.sqrt(3)))),
    # Not symmetric: from the student's side it would be 0.75 log(1.5) + 0.25 log(0.5).
    ("kd", ROW, FLAT, 1.0, 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
    ("mse", [[1.0, 2.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 3.0]], 5.0, (1 + 4 + 9) / 4),
    # Two classes: there is one other, so that nothing but alpha's part is left, which is kd.
    ("dkd", FLAT, ROW, 1.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    # The label has 1/2 of both; the others (1/4, 1/4) of the teacher's and (3/8, 1/8) of the student's.
    ("dkd", [[math.log(4), math.log(3), 0.0]], [[math.log(2), 0.0, 0.0]], 1.0,
     8 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))),
    # The z-scores of any two logits are 1 and -1, so what the student has in reverse is +-1 against -+1.
    ("std", [[5.0, 6.0]], [[3.0, -20.0]], 1.0, 2 * (math.e**2 - 1) / (math.e**2 + 1)),
    ("std", [[2.0, 1.0]], [[3.0, -20.0]], 1.0, 0.0),
    # In reverse over classes and over samples, where the correlations are -1.
    ("dist", [[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [2.0, 0.0]], 1.0, 4.0),
    # Over the classes of a sample equal, over the samples of a class in reverse for one of two pairs.
    ("dist", [[1.0, 0.0], [3.0, 0.0]], [[2.0, 0.0], [1.0, 0.0]], 2.0, 4 * 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "student", "teacher", "temperature", "expected"), BY_HAND)
def test_distill_logits_by_hand(
    name: str, student: list[list[float]], teacher: list[list[float]], temperature: float, expected: float
) -> None:
    s, t = torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    value = LOSSES[name].make(s, t, torch.zeros(len(s), dtype=torch.int64), temperature)
    assert float(value) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_distill_dkd_is_kd_where_the_others_count_as_much_as_the_teacher_doubts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equation 6 of the paper: with beta = 1 - p of the label's class it is kd."""
    student, teacher, labels = STUDENT[:1], TEACHER[:1], LABELS[:1]
    monkeypatch.setattr(logit_losses, "DKD_BETA", 1 - (teacher / T).softmax(1)[0, labels])
    torch.testing.assert_close(
        logit_losses.dkd(student, teacher, labels, T).squeeze(), logit_losses.kd(student, teacher, labels, T)
    )


@pytest.mark.parametrize("name", ON_LOGITS)
def test_distill_logits_lose_nothing_to_bfloat16_and_autocast(name: str) -> None:
    check_precision(lambda s, t: LOSSES[name].make(s, t, LABELS, T), STUDENT, TEACHER)


EXTREMES: dict[str, Tensor] = {
    "large": torch.tensor([[1e4, -1e4, 0.0], [-1e4, 0, 1e4], [0, 1e4, 1e4]]),
    "all for one class": torch.tensor([[1e4, 0.0, -1e4]]).repeat(3, 1),
    "constant": torch.full((3, 3), 2.5),
    "zero": torch.zeros(3, 3),
    "tiny": torch.tensor([[1e-30, 0, -1e-30]]).repeat(3, 1),
    "usual": normal(3, 3).float(),
}


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("student", EXTREMES)
def test_distill_logits_are_finite_at_extremes(name: str, student: str) -> None:
    for teacher, temperature in itertools.product(EXTREMES.values(), (0.5, 20.0)):
        value, grad = gradient(
            lambda s, t=teacher, by=temperature: LOSSES[name].make(s, t, torch.arange(3), by),
            EXTREMES[student],
        )
        assert math.isfinite(value)
        assert value >= -1e-6
        assert grad.isfinite().all()
        if ignores_a_shift(REFERENCES[name][0]):  # so that probabilities alone count
            assert grad.abs().max() <= 100 * temperature


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (1, 1)])
def test_distill_logits_of_one_sample_or_one_class_are_finite(name: str, shape: tuple[int, int]) -> None:
    teacher, labels = normal(*shape, seed=1).float(), torch.zeros(shape[0], dtype=torch.int64)
    value, grad = gradient(lambda s: LOSSES[name].make(s, teacher, labels, T), normal(*shape).float())
    assert math.isfinite(value)
    assert grad.isfinite().all()
    if shape[1] == 1 and ignores_a_shift(REFERENCES[name][0]):  # then one logit says nothing
        assert not grad.any()


@pytest.mark.parametrize("name", ON_LOGITS)
def test_distill_logits_take_mixed_labels_unless_the_loss_reads_labels(name: str) -> None:
    def value(labels: Tensor) -> Tensor:
        loss: Tensor = LOSSES[name].make(STUDENT, TEACHER, labels, T)
        return loss

    mixed = torch.full((4, 5), 0.2)
    if value(LABELS) == value((LABELS + 1) % 5):
        assert value(mixed) == value(LABELS)
        return
    with pytest.raises(UsageError, match=f"^loss: {name} needs one label for each sample"):
        value(mixed)
