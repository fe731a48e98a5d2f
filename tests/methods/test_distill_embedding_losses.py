"""Losses on embeddings: against loops over pairs and triples, by hand, and where samples are the same."""

import math

import numpy as np
import pytest
import torch
from distill_cases import Array, check, check_precision, gradient, normal, numeric_gradient
from torch import Tensor
from torch.func import functional_call

from modelopt_cli.methods.distill import embedding_losses
from modelopt_cli.methods.distill.embedding_losses import Contrastive, Relational
from modelopt_cli.methods.distill.losses import LOSSES

STUDENT, TEACHER = normal(6, 3), normal(6, 4, seed=1)
SAMPLES = 50


def huber(x: float) -> float:
    return x**2 / 2 if abs(x) <= 1 else abs(x) - 0.5


def distance(a: Array, b: Array) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def cosine(a: Array, b: Array, c: Array) -> float:
    """Of the angle at b; 0 where there is none."""
    lengths = distance(a, b) * distance(c, b)
    return float(np.dot(a - b, c - b)) / lengths if lengths else 0.0


def rkd(student: Array, teacher: Array) -> float:
    n = range(len(student))
    pairs = [(i, j) for i in n for j in n if i != j]
    triples = [(i, j, k) for i, j in pairs for k in n if k not in (i, j)]
    means = [sum(distance(x[i], x[j]) for i, j in pairs) / len(pairs) or 1 for x in (student, teacher)]
    far = sum(
        huber(distance(student[i], student[j]) / means[0] - distance(teacher[i], teacher[j]) / means[1])
        for i, j in pairs
    )
    turned = sum(
        huber(cosine(student[i], student[j], student[k]) - cosine(teacher[i], teacher[j], teacher[k]))
        for i, j, k in triples
    )
    return 1.0 * far / len(pairs) + 2.0 * turned / len(triples)


def crd(student: Array, teacher: Array, heads: tuple[Array, Array, Array, Array]) -> float:
    of_student, student_bias, of_teacher, teacher_bias = heads
    s = [of_student @ x + student_bias for x in student]
    t = [of_teacher @ x + teacher_bias for x in teacher]
    s, t = ([x / math.sqrt(np.dot(x, x)) for x in one] for one in (s, t))
    negatives = len(s) - 1

    def h(i: int, j: int) -> float:
        e = math.exp(np.dot(t[i], s[j]) / 0.07)
        return e / (e + negatives / SAMPLES)

    total = 0.0
    for i in range(len(s)):
        others = [j for j in range(len(s)) if j != i]
        for_teacher = math.log(h(i, i)) + sum(math.log(1 - h(i, j)) for j in others)
        for_student = math.log(h(i, i)) + sum(math.log(1 - h(j, i)) for j in others)
        total -= for_teacher + for_student
    return total / len(s)


@pytest.mark.parametrize("chunk", [2**20, 1, 80])
def test_distill_rkd_is_numpys(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_losses, "CHUNK_ELEMENTS", chunk)
    # Some cosines and some distances differ by more than 1, where Huber's loss is another.
    student = STUDENT.clone()
    student[0] *= 20
    for one in (STUDENT, student):
        check(lambda s: Relational()(s, TEACHER), lambda s: rkd(s, TEACHER.numpy()), one)


def test_distill_rkd_by_hand() -> None:
    """A triangle with sides 3, 4 and 5 against three points on a line, 0, 1 and 2."""
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0], [1.0], [2.0]])
    # Each side in units of the mean; those of the points are 1, 1 and 2 (0 to 1, 1 to 2, 0 to 2).
    far = sum(x**2 / 2 for x in (3 / 4 - 3 / 4, 5 / 4 - 3 / 4, 4 / 4 - 6 / 4)) / 3
    # At the first point 0 and not 1, at the second 3/5 and not -1, at the third 4/5 and not 1.
    turned = (1 / 2 + (8 / 5 - 1 / 2) + (1 / 5) ** 2 / 2) / 3
    assert float(Relational()(student, teacher)) == pytest.approx(far + 2 * turned, rel=1e-6)


def test_distill_rkd_sees_neither_place_nor_size_nor_direction() -> None:
    turn = torch.linalg.qr(normal(3, 3, seed=5)).Q
    moved = 7 * STUDENT @ turn + normal(3, seed=6)
    assert float(Relational()(moved, STUDENT)) == pytest.approx(0, abs=1e-12)
    assert float(Relational()(STUDENT, TEACHER)) > 0.1


def test_distill_rkd_is_exact_in_float32_for_samples_that_are_close() -> None:
    """Two groups far apart, each close together: products in float32 would have no digit left."""
    student = (0.01 * normal(6, 3)).float()
    student[:3] += 1000
    expected = rkd(student.double().numpy(), TEACHER.float().double().numpy())
    assert float(Relational()(student, TEACHER.float())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("same", ["two", "all"])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_distill_rkd_has_no_angle_where_samples_are_the_same(who: str, same: str) -> None:
    def alike(embedding: Tensor, name: str) -> Tensor:
        embedding = embedding.float()
        if who in (name, "both"):
            embedding[1 if same == "two" else slice(None)] = embedding[0]
        return embedding

    teacher = alike(TEACHER.clone(), "teacher")
    student = alike(STUDENT.clone(), "student")
    value, grad = gradient(lambda s: Relational()(s, teacher), student)
    assert value == pytest.approx(rkd(student.double().numpy(), teacher.double().numpy()), rel=1e-5)
    assert grad.isfinite().all()
    assert grad.abs().max() < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distill_rkd_of_few_samples_has_no_angles_or_nothing(dtype: torch.dtype) -> None:
    for n in (1, 2):
        # The one distance of two samples is the mean of all.
        value, grad = gradient(lambda s, n=n: Relational()(s, TEACHER[:n].to(dtype)), STUDENT[:n].to(dtype))
        assert value == pytest.approx(0, abs=1e-12)
        assert grad.abs().max() < 1e-6


def contrastive() -> tuple[Contrastive, tuple[Array, Array, Array, Array]]:
    loss = Contrastive((3,), (4,), SAMPLES).double()
    for i, parameter in enumerate(loss.parameters()):
        parameter.data = normal(*parameter.shape, seed=i + 7)
    weights = [p.detach().numpy().copy() for p in loss.parameters()]
    return loss, (weights[0], weights[1], weights[2], weights[3])


def test_distill_crd_is_numpys() -> None:
    loss, heads = contrastive()
    assert [tuple(x.shape) for x in heads] == [(128, 3), (128,), (128, 4), (128,)]
    s, t = STUDENT.numpy(), TEACHER.numpy()
    check(lambda x: loss(x, TEACHER), lambda x: crd(x, t, heads), STUDENT)

    loss.zero_grad()
    loss(STUDENT, TEACHER).backward()
    for i, parameter in enumerate(loss.parameters()):
        assert parameter.grad is not None

        def of_some(some: Array, i: int = i) -> float:
            """As a function of the first six numbers of one parameter."""
            changed = [x.copy() for x in heads]
            changed[i].flat[:6] = some
            return crd(s, t, (changed[0], changed[1], changed[2], changed[3]))

        expected = numeric_gradient(of_some, heads[i].flatten()[:6])
        np.testing.assert_allclose(parameter.grad.flatten()[:6].numpy(), expected, rtol=1e-6, atol=1e-7)

    def of_heads(first: Tensor, second: Tensor) -> Tensor:
        given = {"student.bias": first, "teacher.bias": second}
        result: Tensor = functional_call(loss, given, (STUDENT, TEACHER))
        return result

    biases = [b.detach().clone().requires_grad_() for b in (loss.student.bias, loss.teacher.bias)]
    assert torch.autograd.gradcheck(of_heads, biases)


def test_distill_crd_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples at right angles, with heads that keep them: cosines 1 and 0; at temperature 1, N / M = 1/3.

    ``h`` is ``e / (e + 1/3)`` of the same and ``1 / (1 + 1/3)`` of different ones.
    """
    monkeypatch.setattr(embedding_losses, "CRD_TEMPERATURE", 1.0)
    loss = Contrastive((2,), (2,), 3)
    for head in (loss.student, loss.teacher):
        head.weight.data = torch.eye(128, 2)
        head.bias.data.zero_()
    embedding = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    expected = -2 * (math.log(math.e / (math.e + 1 / 3)) + math.log(1 / 4))
    assert float(loss(embedding, embedding).detach()) == pytest.approx(expected, rel=1e-6)


def test_distill_crd_learns_what_belongs_together() -> None:
    torch.manual_seed(0)
    loss = Contrastive((3,), (4,), SAMPLES).double()
    before = float(loss(STUDENT, TEACHER).detach())
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss(STUDENT, TEACHER).backward()
        optimizer.step()
    assert float(loss(STUDENT, TEACHER).detach()) < 0.5 * before


def test_distill_crd_of_one_sample_is_0_with_gradients_of_0() -> None:
    loss = Contrastive((3,), (4,), SAMPLES).double()
    value, grad = gradient(lambda s: loss(s, TEACHER[:1]), STUDENT[:1])
    assert value == 0
    assert not grad.any()
    for parameter in loss.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_distill_crd_of_zeros_is_finite() -> None:
    loss = Contrastive((3,), (4,), SAMPLES)
    value, grad = gradient(lambda s: loss(s, torch.zeros(6, 4)), torch.zeros(6, 3))
    assert math.isfinite(value)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["rkd", "crd"])
def test_distill_relations_lose_nothing_to_bfloat16_and_autocast(name: str) -> None:
    check_precision(LOSSES[name].make((3,), (4,), SAMPLES), STUDENT, TEACHER)
