"""How much an error of each weight matters, from data without labels."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.walk import calibration, evaluation_copy, no_samples, refuse_infinite
from modelopt_cli.program import Program


def fisher(program: Program, names: Iterable[str], context: Context, samples: int) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: mean squared gradient of the log-likelihood, by parameter.

    Labels are drawn from the network's own answers, which makes it the true Fisher information and not the
    empirical one (Martens, "New insights and perspectives on the natural gradient method", 2020, section 5).
    So drawn, gradients of different samples have mean zero and are independent: the expected square of their
    sum is the sum of their squares, and a batch needs one backward pass.

    Args:
        program: the network; it is not changed.
        names: parameters.
        context: data, seed, batch size, device, progress.
        samples: how many to look at, at most.

    Raises:
        UsageError: no data.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    data = calibration(context, "weighting fisher", samples, "--weighting none")
    network = evaluation_copy(program, context.device).requires_grad_(True)
    parameters = {name: network.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    draw, seen = torch.Generator().manual_seed(context.seed), 0
    for images, _ in data.batches(context.batch_size, workers=context.workers):
        logits = network(images.to(context.device)).flatten(1)
        refuse_infinite(logits, data.name)
        chances = F.softmax(logits.detach().double(), 1).cpu()
        labels = torch.multinomial(chances, 1, generator=draw).squeeze(1)
        loss = F.cross_entropy(logits, labels.to(context.device), reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.float().square()
        seen += len(images)
        if context.progress is not None:
            context.progress(seen, data.size)
    if not seen:
        raise no_samples()
    return {name: (total / seen).cpu() for name, total in sums.items()}
