"""Training networks whose weights are shared."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.share.companions import Fixed, Reassigned, Soft
from modelopt_cli.methods.share.shared import Shared, read_back
from modelopt_cli.program import Program
from modelopt_cli.training import Companion
from modelopt_cli.training.fitting import fit
from modelopt_cli.training.objectives import objective

MODES: dict[str, str] = {
    "fixed": "assignments stay, and the tables are trained",
    "epoch": "weights go to the nearest entry at the beginning of every epoch",
    "dkm": "differentiable k-means: assignments are soft, and trained too",
}


def companion(
    mode: str, shared: Mapping[str, Shared], latents: Mapping[str, Tensor], epochs: int
) -> Companion:
    """What shares in one of the ``MODES``; see the classes."""
    if mode == "fixed":
        return Fixed(shared)
    return Reassigned(shared, latents, epochs) if mode == "epoch" else Soft(shared, latents)


def fine_tune(
    program: Program,
    shared: Mapping[str, Shared],
    context: Context,
    mode: str,
    stage: str,
    *others: Companion,
) -> tuple[Program, dict[str, Shared]]:
    """A trained copy of a network with shared weights, and their new form.

    Everything else learns as usual. The teacher, where there is one, is the network as it is given.

    Args:
        program: with the weights from before they were shared.
        shared: the form to start from, by parameter name.
        context: seed and training; it must have one.
        mode: one of ``MODES``.
        stage: what the run and the log call this training.
        others: companions beside, such as the masks of weights that are not shared.

    Raises:
        as ``modelopt_cli.training.fit``.
    """
    training = context.training
    assert training is not None
    network = copy.deepcopy(program).requires_grad_(True)
    latents = {name: program.get_parameter(name) for name in shared}
    with torch.no_grad():
        for name, each in shared.items():
            network.get_parameter(name).copy_(each.decode())
    sharing = companion(mode, shared, latents, training.config.epochs)
    fit(
        network,
        training,
        seed=context.seed,
        stage=stage,
        objective=objective(training.config, program),
        companions=[*others, sharing],
    )
    return network, trained(network, shared)


def trained(network: nn.Module, shared: Mapping[str, Shared]) -> dict[str, Shared]:
    """The form of weights after training, read off the network; ``shared`` is that from before.

    Raises:
        ModeloptError: training did not keep them shared, or brought pruned weights back.
    """
    found = {}
    for name, before in shared.items():
        weight = network.get_parameter(name).detach()
        found[name] = read_back(weight, before)
        if before.pruned and bool(weight[before.decode() == 0].any()):
            raise ModeloptError("training brought pruned weights back", where=name)
    return found
