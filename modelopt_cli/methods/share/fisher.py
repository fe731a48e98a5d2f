"""Diagonal Fisher information of a network's parameters: how much the outputs depend on each."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.methods.batches import comparable, input_batches, require_finite
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import calibration_data, evaluation_copy, no_samples
from modelopt_cli.methods.share.choices import NO_DATA
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, call, to
from modelopt_cli.settings import option
from modelopt_cli.tasks import TaskSpec


def fisher(program: Program, names: Iterable[str], context: Context, samples: int) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: mean squared gradient of the log-likelihood, by parameter.

    Targets are drawn from the network's own outputs, which makes it the true Fisher information and not the
    empirical one (Martens, "New insights and perspectives on the natural gradient method", 2020, section 5).
    What is drawn follows from the task: a class of each sample, pixel or token, each class by itself, or
    numbers with the outputs for means and variances of 1. So drawn, gradients of different samples have mean
    zero and are independent: the expected square of their sum is the sum of their squares, and a batch needs
    one backward pass.

    Args:
        program: the network; it is not changed.
        names: parameters.
        context: data, seed, batch size, device, progress.
        samples: most samples to look at.

    Raises:
        UsageError: no data.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    alternative = option("weighting", NO_DATA)
    data = calibration_data(context, "the Fisher information", samples, alternative)
    network = evaluation_copy(program, context.device).requires_grad_(True)
    parameters = {name: network.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    draw, seen = torch.Generator().manual_seed(context.seed), 0
    for inputs in input_batches(data, context):
        outputs = call(network, to(inputs, context.device))
        parts, exclusive = _outputs(outputs, inputs, context.task)
        for part in parts:
            require_finite(part, data.name)
        loss = torch.stack([_drawn_loss(part, exclusive, draw) for part in parts]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.float().square()
        seen += batch_size(inputs)
        if context.progress is not None:
            context.progress(seen, data.size)
    if not seen:
        raise no_samples()
    return {name: (total / seen).cpu() for name, total in sums.items()}


def _outputs(outputs: Any, inputs: Inputs, task: TaskSpec) -> tuple[list[Tensor], bool | None]:
    """Logits as rows ``(M, classes)``, and whether one class alone is right; or rows of numbers, and None."""
    where, logits = task.row.logits, task.logits(outputs)
    if where is None or logits is None:
        return comparable(outputs, inputs, task).parts, None
    return [logits], where.exclusive


def _drawn_loss(rows: Tensor, exclusive: bool | None, draw: torch.Generator) -> Tensor:
    """Negative log-likelihood of targets that are drawn from the outputs, its sum over rows ``(M, D)``.

    Up to a constant. Of numbers its gradient is that of their products with standard normal noise.
    """
    detached = rows.detach().double().cpu()
    if exclusive is None:
        noise = torch.randn(rows.shape, generator=draw, dtype=torch.float64)
        return (rows * noise.to(rows)).sum()
    if not exclusive:
        there = torch.bernoulli(detached.sigmoid(), generator=draw)
        return F.binary_cross_entropy_with_logits(rows, there.to(rows), reduction="sum")
    labels = torch.multinomial(F.softmax(detached, 1), 1, generator=draw).squeeze(1)
    return F.cross_entropy(rows, labels.to(rows.device), reduction="sum")
