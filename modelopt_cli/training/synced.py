"""Batch norm over the batch of all processes: exact, differentiable, on any backend.

S. Ioffe and C. Szegedy, Batch Normalization, ICML 2015. torch's own SyncBatchNorm needs CUDA and replaces the
modules; here the network stays as it is, and only the function its layers call is replaced.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from modelopt_cli.training.distributed import World, collective, reduce


def synced_batch_norm(world: World, *, counts: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Around a forward pass of training: batch norm uses the statistics of all processes' samples.

    The backward pass may come after the context ends. Running statistics become those of one process.

    Args:
        world: the processes; with one of them, nothing is changed.
        counts: True if this process's samples belong to the batch. One that got only a stand-in
            (``Batch.weight`` is 0) takes part in the exchange and adds nothing.
    """
    return _Synced(counts) if world.size > 1 else contextlib.nullcontext()


class _Synced(TorchFunctionMode):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,  # noqa: A002  a graph calls it by the name it has in torch
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        mean, variance, count = _statistics(input.detach(), self._counts)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        kind = torch.float64 if input.dtype is torch.float64 else torch.float32
        output: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, mean.to(kind), variance.to(kind), eps, count, self._counts
        )
        return output


def _statistics(features: Tensor, counts: bool) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance per channel, float64, and the values per channel, over all processes.

    Each process's own are combined as by Chan, Golub and LeVeque (1979), which loses no digits where the
    mean is large compared with the spread.
    """
    channels = features.shape[1]
    dims = [0, *range(2, features.dim())]
    values = features.numel() // channels if counts else 0
    own = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=features.device)
    if values:
        wide = features if features.dtype in (torch.float32, torch.float64) else features.float()
        variance, mean = torch.var_mean(wide, dims, correction=0)
        own = torch.cat([own.new_tensor([values]), mean.double(), variance.double() * values])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with collective():
        dist.all_gather(everyone, own)
    table = torch.stack(everyone)
    amounts, means, spreads = table[:, :1], table[:, 1 : 1 + channels], table[:, 1 + channels :]
    count = int(amounts.sum())
    if count < 2:
        raise ValueError(f"batch norm needs more than 1 value per channel to train, got {count}")
    mean = (amounts * means).sum(0) / count
    spread = (spreads + amounts * (means - mean) ** 2).sum(0)
    return mean, spread / count, count


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, whose mean and variance depend on every x."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        count: int,
        counts: bool,
    ) -> Tensor:
        ctx.save_for_backward(features, weight, mean, variance)
        ctx.eps, ctx.count, ctx.counts = eps, count, counts
        return F.batch_norm(features, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight, mean, variance = ctx.saved_tensors
        features, upstream = narrow.to(mean.dtype), gradients[0].to(mean.dtype)
        factor = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        # As if mean and variance were constants ...
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            upstream, features, factor, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # ... and what they pass on: -(sum(g) + x' sum(g x')) * weight / (deviation * count).
        sums = torch.stack([of_bias, of_weight]).double()
        reduce(sums)
        inverse = (variance.double() + ctx.eps).rsqrt()
        scale = -factor.double() * inverse / ctx.count
        shape = [1, -1] + [1] * (features.dim() - 2)
        offset, slope, centre = (
            each.to(mean.dtype).view(shape) for each in (scale * sums[0], scale * sums[1] * inverse, mean)
        )
        direct = (direct + (features - centre) * slope + offset).to(narrow.dtype)
        if not ctx.counts:
            direct = torch.zeros_like(direct)
        unused = (None, None, None, None, None)
        return (
            direct,
            of_weight if weight is not None else None,
            of_bias if weight is not None else None,
            *unused,
        )
