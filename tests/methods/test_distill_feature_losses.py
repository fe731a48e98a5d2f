"""Losses on features: against loops over positions and channels, and by hand."""

import math

import numpy as np
import pytest
import torch
from distill_cases import Array, check, check_precision, gradient, normal, numeric_gradient
from torch import Tensor, nn
from torch.func import functional_call

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.feature_losses import Attention, Hint, Shape

SHAPES = [
    pytest.param((3, 4, 4), (2, 4, 4), id="maps"),
    pytest.param((3, 5, 4), (2, 3, 2), id="larger maps"),
    pytest.param((2, 2, 2), (3, 5, 4), id="smaller maps"),
    pytest.param((2, 4, 2), (3, 3, 3), id="higher and narrower maps"),
    pytest.param((3, 3, 3), (3, 3, 3), id="equal maps"),
    pytest.param((4, 3), (4, 2), id="tokens"),
    pytest.param((3,), (4,), id="vectors"),
]


def features(student: Shape, teacher: Shape) -> tuple[Tensor, Tensor]:
    return normal(2, *student), normal(2, *teacher, seed=1)


def positions(feature: Array, size: tuple[int, ...]) -> Array:
    """``(N, positions, C)``: maps are averaged over the part of them that a position of ``size`` covers."""
    if feature.ndim != 4:
        return feature if feature.ndim == 3 else feature[:, None]
    parts = []
    for i in range(size[0]):
        for j in range(size[1]):
            (top, bottom), (left, right) = (
                (math.floor(at * length / count), math.ceil((at + 1) * length / count))
                for at, count, length in zip((i, j), size, feature.shape[2:], strict=True)
            )
            parts.append(feature[:, :, top:bottom, left:right].mean((2, 3)))
    return np.stack(parts, 1)


def both(student: Array, teacher: Array) -> tuple[Array, Array]:
    size = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return positions(student, size), positions(teacher, size)


def hint(student: Array, teacher: Array, weight: Array, bias: Array) -> float:
    s, t = both(student, teacher)
    total = 0.0
    for n, p, c in np.ndindex(t.shape):
        total += (bias[c] + sum(weight[c, k] * s[n, p, k] for k in range(s.shape[2])) - t[n, p, c]) ** 2
    return total / t.size


def attention(student: Array, teacher: Array) -> float:
    total, maps = 0.0, both(student, teacher)
    samples, count, _ = maps[0].shape
    for n in range(samples):
        squares = [[sum(x**2 for x in feature[n, p]) for p in range(count)] for feature in maps]
        a, b = (np.array(one) / math.sqrt(sum(x**2 for x in one)) for one in squares)
        total += sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return total / (samples * count)


@pytest.mark.parametrize(("of_student", "of_teacher"), SHAPES)
def test_distill_hint_is_numpys(of_student: Shape, of_teacher: Shape) -> None:
    student, teacher = features(of_student, of_teacher)
    loss = Hint(of_student, of_teacher).double()
    weight = normal(*loss.adapter.weight.shape, seed=2)
    bias = normal(*loss.adapter.bias.shape, seed=3)
    loss.adapter.weight.data, loss.adapter.bias.data = weight, bias
    s, t, w, b = (x.numpy() for x in (student, teacher, weight, bias))
    check(lambda x: loss(x, teacher), lambda x: hint(x, t, w, b), student)

    loss.zero_grad()
    loss(student, teacher).backward()
    for parameter, expected in (
        (loss.adapter.weight, numeric_gradient(lambda x: hint(s, t, x, b), w)),
        (loss.adapter.bias, numeric_gradient(lambda x: hint(s, t, w, x), b)),
    ):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-7, atol=1e-8)

    def of_weight(x: Tensor) -> Tensor:
        result: Tensor = functional_call(loss, {"adapter.weight": x}, (student, teacher))
        return result

    assert torch.autograd.gradcheck(of_weight, (weight.clone().requires_grad_(),))


def test_distill_hint_by_hand() -> None:
    """One number becomes two, ``2 x + 1`` and ``-x``: (3, -1) and (5, -2) against (3, 0) and (1, 0)."""
    loss = Hint((1,), (2,))
    loss.adapter.weight.data = torch.tensor([[2.0], [-1.0]])
    loss.adapter.bias.data = torch.tensor([1.0, 0.0])
    found = loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    assert float(found.detach()) == (0 + 1 + 16 + 4) / 4


def test_distill_hint_of_maps_is_a_convolution() -> None:
    student, teacher = features((3, 4, 4), (2, 4, 4))
    loss, conv = Hint((3, 4, 4), (2, 4, 4)).double(), nn.Conv2d(3, 2, 1).double()
    conv.weight.data.copy_(loss.adapter.weight.data[:, :, None, None])
    conv.bias.data.copy_(loss.adapter.bias.data)  # type: ignore[union-attr]
    torch.testing.assert_close(loss(student, teacher), (conv(student) - teacher).square().mean())


@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 3), (3,)])
def test_distill_hint_begins_as_the_identity_and_learns_another_order(shape: Shape) -> None:
    feature = normal(8, *shape)
    loss = Hint(shape, shape).double()
    assert float(loss(feature, feature).detach()) == 0
    axis = 1 if len(shape) != 2 else 2
    other = feature.roll(1, axis)
    before = float(loss(feature, other).detach())
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        loss(feature, other).backward()
        optimizer.step()
    assert float(loss(feature, other).detach()) < 1e-3 * before


@pytest.mark.parametrize(("of_student", "of_teacher"), [s for s in SHAPES if s.id != "vectors"])
def test_distill_attention_is_numpys(of_student: Shape, of_teacher: Shape) -> None:
    student, teacher = features(of_student, of_teacher)
    loss = Attention(of_student, of_teacher)
    assert not list(loss.parameters())
    check(lambda x: loss(x, teacher), lambda x: attention(x, teacher.numpy()), student)


def test_distill_attention_by_hand() -> None:
    """Squares sum to (3, 4) and (1, 0), of length 1 (0.6, 0.8) and (1, 0): mean of 0.16 and 0.64."""
    student = torch.tensor([[[1.0, 2.0], [1.0, 0.0], [1.0, 0.0]]])[..., None]
    teacher = torch.tensor([[[-7.0, 0.0]]])[..., None]
    assert float(Attention((3, 2, 1), (1, 2, 1))(student, teacher)) == pytest.approx(0.4)


def test_distill_attention_does_not_depend_on_size_or_sign() -> None:
    student, teacher = features((3, 4, 4), (2, 4, 4))
    loss = Attention((3, 4, 4), (2, 4, 4))
    torch.testing.assert_close(loss(-5 * student, 0.1 * teacher), loss(student, teacher))


@pytest.mark.parametrize("kind", [Hint, Attention])
@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 3)])
def test_distill_features_of_zeros_have_finite_gradients(
    kind: type[Hint] | type[Attention], shape: Shape
) -> None:
    loss = kind(shape, shape)
    for student, teacher in ((torch.zeros(2, *shape), normal(2, *shape).float()),) * 2:
        for s, t in ((student, teacher), (teacher, student), (1e-8 * teacher, teacher)):
            value, grad = gradient(lambda x, t=t: loss(x, t), s)
            assert math.isfinite(value)
            assert grad.isfinite().all()


@pytest.mark.parametrize("kind", [Hint, Attention])
def test_distill_features_lose_nothing_to_bfloat16_and_autocast(kind: type[Hint] | type[Attention]) -> None:
    student, teacher = features((3, 5, 4), (2, 3, 2))
    check_precision(kind((3, 5, 4), (2, 3, 2)), student, teacher)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "said"),
    [
        (Hint, (3, 4, 4), (4, 3), "student's feature is maps, the teacher's a sequence of tokens"),
        (Attention, (3,), (3, 4, 4), "student's feature is a vector, the teacher's maps"),
        (Hint, (5, 3), (4, 3), "student has 5 tokens, the teacher 4; name layers with equally many"),
        (Hint, (2, 3, 4, 4), (3, 4, 4), r"student's feature has the shape \(2, 3, 4, 4\)"),
        (Hint, (3,), (), r"teacher's feature has the shape \(\)"),
        (Attention, (3,), (3,), "at compares positions, and a vector has none"),
    ],
)
def test_distill_features_refuse(
    kind: type[Hint] | type[Attention], student: Shape, teacher: Shape, said: str
) -> None:
    with pytest.raises(UsageError, match=f"^loss: .*{said}"):
        kind(student, teacher)
