"""What the losses of distillation are checked against: NumPy, and differences of what NumPy computes."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numeric_gradient(function: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Central differences."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        ends = []
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            ends.append(function(moved))
        found[index] = (ends[0] - ends[1]) / (2 * step)
    return found


def gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[float, Tensor]:
    """A loss and its gradient for the student."""
    student = student.detach().clone().requires_grad_()
    value = loss(student)
    value.backward()
    assert value.shape == ()
    assert value.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert student.grad is not None
    return float(value.detach()), student.grad


def check(
    loss: Callable[[Tensor], Tensor],
    reference: Callable[[Array], float],
    student: Tensor,
    slope: Callable[[Array], Array] | None = None,
) -> None:
    """Value and gradient against NumPy's, and against what torch makes of small changes.

    Args:
        slope: the gradient in closed form; None takes differences of ``reference``.
    """
    value, grad = gradient(loss, student)
    at = student.numpy().copy()
    np.testing.assert_allclose(value, reference(at), rtol=1e-10, atol=1e-13)
    expected = slope(at) if slope is not None else numeric_gradient(reference, at)
    tolerance = 1e-10 if slope is not None else 1e-7
    np.testing.assert_allclose(
        grad.numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )
    assert torch.autograd.gradcheck(loss, (student.clone().requires_grad_(),))


def check_precision(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> None:
    """Bfloat16 gives just what its values give in float32, autocast or not; float64 stays float64."""
    coarse = student.bfloat16(), teacher.bfloat16()
    exact = loss(coarse[0].double(), coarse[1].double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*coarse), loss(coarse[0].float(), coarse[1].float())
    for one in (*found, loss(*coarse)):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-7)
