"""Fine-tuning of networks with clustered weights, and the callbacks that keep weights clustered meanwhile.

The callbacks (``modelopt_cli/training/config.py``) leave only clustered weights behind after each step, in
the network and in its moving average. ``TUNINGS`` in ``choices.py`` lists them.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.share.choices import Tuning
from modelopt_cli.methods.share.clustered_weight import ClusteredWeight, TrainableCodebook, read_back
from modelopt_cli.methods.share.dkm import SoftClusters, spacing
from modelopt_cli.program import Program
from modelopt_cli.training import Callback
from modelopt_cli.training.fitting import fit
from modelopt_cli.training.objectives import objective

FIRST_PULL = 1e-2
"""Fraction of the distance to its centroid that a latent value loses in the first step."""
CLOSED_AT = 0.75
"""Fraction of the steps after which none is left."""
ITERATIONS = 3
"""Iterations of differentiable k-means in a step."""
SOFTNESS = (0.3, 0.003)
"""Its temperature at the first and the last step, in squared distances between neighbouring centroids."""


def fine_tune(
    program: Program,
    clustered: Mapping[str, ClusteredWeight],
    context: Context,
    tuning: Tuning,
    stage: str,
    *callbacks: Callback,
) -> tuple[Program, dict[str, ClusteredWeight]]:
    """A trained copy of a network with clustered weights, and their new clusters.

    Everything else learns as usual. The teacher, where there is one, is the network as it is given.

    Args:
        program: with the weights from before they were clustered.
        clustered: the clusters to start from, by parameter name.
        context: seed and training; it must have one.
        tuning: a row of ``TUNINGS``.
        stage: the name of this training in the run and in the log.
        callbacks: further callbacks, such as the masks of weights that are not clustered.

    Raises:
        as ``modelopt_cli.training.fit``.
    """
    training = context.training
    assert training is not None
    network = copy.deepcopy(program).requires_grad_(True)
    latents = {name: program.get_parameter(name) for name in clustered}
    with torch.no_grad():
        for name, each in clustered.items():
            network.get_parameter(name).copy_(each.decode())
    callback = tuning.callback(clustered, latents, training.config.epochs)
    fit(
        network,
        training,
        seed=context.seed,
        stage=stage,
        objective=objective(training.config, program, training.task),
        callbacks=[*callbacks, callback],
    )
    return network, read_all_back(network, clustered)


def read_all_back(network: nn.Module, before: Mapping[str, ClusteredWeight]) -> dict[str, ClusteredWeight]:
    """The clusters of weights after training, read off the network.

    Raises:
        ModeloptError: training did not keep them clustered, or brought pruned weights back.
    """
    after = {}
    for name, clustered in before.items():
        weight = network.get_parameter(name).detach()
        after[name] = read_back(weight, clustered)
        if clustered.pruned and bool(weight[clustered.decode() == 0].any()):
            raise ModeloptError("training brought pruned weights back", where=name)
    return after


class FixedAssignment:
    """Every weight keeps its centroid, and the centroids learn.

    The gradient with respect to a centroid is the sum of its members' (S. Han, H. Mao and W. Dally, "Deep
    Compression", ICLR 2016, section 3). Members move by the mean of the moves that the optimizer made, which
    with plain gradients is that sum divided by their number: the nearest to the optimizer's step that keeps
    the weights clustered. So a learning rate means what it means elsewhere, however many members a centroid
    has, and any optimizer, momentum and moving average will do.

    Args:
        clustered: by parameter name.
        latents: weights from before they were clustered, by parameter name; for subclasses that train them.
        epochs: of the training; for subclasses that work by epoch.
    """

    def __init__(
        self, clustered: Mapping[str, ClusteredWeight], latents: Mapping[str, Tensor], epochs: int
    ) -> None:
        self._codebooks = {name: TrainableCodebook(each) for name, each in clustered.items()}

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Do nothing: clusters are restored after each step."""

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Give the members of every centroid one value again, their mean."""
        for _, codebook, parameter in self._weights_of(network):
            _write(parameter, codebook.means(codebook.blocks(parameter))[codebook.codes])

    def state(self) -> dict[str, Tensor]:
        """Empty: the network holds all that changes."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes up nothing."""

    def _weights_of(self, network: nn.Module) -> Iterator[tuple[str, TrainableCodebook, nn.Parameter]]:
        for name, codebook in self._codebooks.items():
            parameter = network.get_parameter(name)
            yield name, codebook.on(parameter), parameter


class _LatentWeights(FixedAssignment):
    """Base of callbacks where every weight has a latent value, too, which takes the optimizer's moves.

    The moving average of the network follows the clusters; in it, the members that every centroid has now
    have their mean.
    """

    def __init__(
        self, clustered: Mapping[str, ClusteredWeight], latents: Mapping[str, Tensor], epochs: int
    ) -> None:
        super().__init__(clustered, latents, epochs)
        self._latents = {
            name: torch.where(codebook.unpruned[:, None], codebook.blocks(latents[name]), 0)
            for name, codebook in self._codebooks.items()
        }
        self._trained: nn.Module | None = None

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Remember the network that learns: `after_step` is called for its moving average, too."""
        self._trained = network

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Let the latent values follow the optimizer, and the clusters follow them."""
        if network is not self._trained:
            super().after_step(network, step, steps)
            return
        for name, codebook, parameter in self._weights_of(network):
            self._follow(name, codebook, codebook.blocks(parameter))
            _write(parameter, codebook.values())

    def state(self) -> dict[str, Tensor]:
        """Latent values, codes and centroids."""
        parts = {f"latents/{name}": latents for name, latents in self._latents.items()}
        for name, codebook in self._codebooks.items():
            parts |= {f"codes/{name}": codebook.codes, f"table/{name}": codebook.centroids}
        return parts

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state."""
        for name, codebook in self._codebooks.items():
            self._latents[name] = state[f"latents/{name}"]
            codebook.adopt(state[f"codes/{name}"], state[f"table/{name}"])

    def _follow(self, name: str, codebook: TrainableCodebook, moved: Tensor) -> None:
        """Take in a weight, in blocks, as the optimizer left it."""
        raise NotImplementedError

    def _weights_of(self, network: nn.Module) -> Iterator[tuple[str, TrainableCodebook, nn.Parameter]]:
        for name, codebook, parameter in super()._weights_of(network):
            self._latents[name] = self._latents[name].to(codebook.centroids)
            yield name, codebook, parameter


class EpochAssignment(_LatentWeights):
    """Weights go to the nearest centroid at the beginning of every epoch but the first.

    M. Carreira-Perpiñán and Y. Idelbayev, "Model compression as constrained optimization, with application
    to neural nets. Part II: quantization", 2017: the network learns with the latent values, which a penalty
    pulls towards their centroids, and between epochs k-means finds new centroids for them. Here every step
    takes a fraction off a latent value's distance to its centroid, the mean of its members. That fraction
    grows geometrically until it is all of it at ``CLOSED_AT``; from then on this is ``FixedAssignment``.

    Straight-through gradients, without the pull, carry latent values so far in an epoch that assigning them
    again destroys the network.
    """

    def __init__(
        self, clustered: Mapping[str, ClusteredWeight], latents: Mapping[str, Tensor], epochs: int
    ) -> None:
        super().__init__(clustered, latents, epochs)
        self._epochs, self._pull = epochs, 0.0

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Assign again if an epoch begins, and put the latent values into the network."""
        super().before_step(network, step, steps)
        self._pull = FIRST_PULL ** max(0.0, 1 - step / (CLOSED_AT * steps))
        for name, codebook, parameter in self._weights_of(network):
            if step and step % (steps // self._epochs) == 0:
                codebook.reassign(self._latents[name])
            _write(parameter, self._latents[name])

    def _follow(self, name: str, codebook: TrainableCodebook, moved: Tensor) -> None:
        codebook.adopt_means(moved)
        latents = torch.lerp(moved, codebook.values(), self._pull)
        self._latents[name] = torch.where(codebook.unpruned[:, None], latents, 0)


class SoftAssignment(_LatentWeights):
    """Differentiable k-means (``dkm.py``) whose temperature falls.

    In a step the network has the softly clustered weights, and the gradient goes through them to the latent
    values; after it, it has the nearest centroids. The temperature falls geometrically, so that in the end
    the two hardly differ.
    """

    def __init__(
        self, clustered: Mapping[str, ClusteredWeight], latents: Mapping[str, Tensor], epochs: int
    ) -> None:
        super().__init__(clustered, latents, epochs)
        self._spacings = {
            name: [spacing(codebook.centroids[own]) for _, own in codebook.groups]
            for name, codebook in self._codebooks.items()
        }
        self._values: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Cluster softly, and have the gradient follow."""
        super().before_step(network, step, steps)
        first, last = SOFTNESS
        softness = first * (last / first) ** (step / max(steps - 1, 1))
        for name, codebook, parameter in self._weights_of(network):
            values, soft = codebook.values(), []
            for (members, own), unit in zip(codebook.groups, self._spacings[name], strict=True):
                points, start = self._latents[name][members], codebook.centroids[own]
                soft.append(SoftClusters.of(points, start, softness * unit, ITERATIONS))
                values[members] = soft[-1].values()
            _write(parameter, values)
            self._values[name] = values
            hook = partial(_gradient_to_latents, codebook, soft)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Move the latent values, and cluster hard."""
        while self._hooks:
            self._hooks.pop().remove()
        super().after_step(network, step, steps)

    def _follow(self, name: str, codebook: TrainableCodebook, moved: Tensor) -> None:
        # The optimizer moved the soft weights; its move, not where they are, is the latent values'.
        self._latents[name] += moved - self._values[name]
        codebook.reassign(self._latents[name])


def _write(parameter: nn.Parameter, blocks: Tensor) -> None:
    """Put blocks into the network."""
    with torch.no_grad():
        parameter.copy_(blocks.view(parameter.shape))


def _gradient_to_latents(codebook: TrainableCodebook, soft: list[SoftClusters], parameter: Tensor) -> None:
    """Turn the gradient with respect to softly clustered weights into that with respect to latent values."""
    assert parameter.grad is not None
    upstream = codebook.blocks(parameter.grad)
    gradient = torch.zeros_like(upstream)
    for (members, _), clusters in zip(codebook.groups, soft, strict=True):
        gradient[members] = clusters.gradient(upstream[members])
    parameter.grad.copy_(gradient.view(parameter.shape))
