"""Values that a kernel computes, with the gradients of the layer's own pass, which stand for the same."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Mark = tuple[int, int | None]


def mark_of(tensor: Tensor) -> Mark:
    """Mark of a tensor's values, another one once they are replaced or, but in inference tensors, written."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def wants_gradients(layer: nn.Module, *inputs: Tensor) -> bool:
    """True if the result of a layer is to have a gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in inputs) or any(p.requires_grad for p in layer.parameters())


def with_own_gradients(
    layer: nn.Module, own: Callable[..., Tensor], kernel: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """Values of a kernel, the same with gradients as without; the gradients are those of the own pass.

    Args:
        layer: whose parameters have the gradients.
        own: computes the layer by ordinary operators.
        kernel: computes the same.
        inputs: of both.
    """
    if not wants_gradients(layer, *inputs):
        return kernel(*inputs)
    with torch.no_grad():
        value = kernel(*inputs)
    y: Tensor = _WithGradientsOf.apply(own(*inputs), value)  # type: ignore[no-untyped-call]
    return y


class _WithGradientsOf(torch.autograd.Function):
    """A value that passes its gradient on to another one, which stands for the same."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
