"""Training networks whose weights are shared.

Companions of the training loop that keep weights shared (``modelopt_cli/training/config.py``).

All of them leave only shared weights behind after each step, in the network and in its moving average.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.share.clustered_weight import Book, Shared, read_back
from modelopt_cli.methods.share.dkm import SoftClusters, spacing
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


FIRST_PULL = 1e-2
"""Share of the distance to its entry that a latent value loses in the first step."""
CLOSED_AT = 0.75
"""Share of the steps after which none is left."""
ITERATIONS = 3
"""Of differentiable k-means in a step."""
SOFTNESS = (0.3, 0.003)
"""Its temperature at the first and the last step, in squared distances between neighbouring entries."""


class Fixed:
    """Assignments stay, and the tables are trained.

    The gradient with respect to an entry is the sum of its members' (S. Han, H. Mao and W. Dally, "Deep
    Compression", ICLR 2016, section 3). Members move by the mean of the moves that the optimizer made, which
    with plain gradients is that sum divided by their number: the nearest to the optimizer's step that keeps
    the weights shared. So a learning rate means what it means elsewhere, however many members an entry has,
    and any optimizer, momentum and moving average will do.

    Args:
        shared: by parameter name.
    """

    def __init__(self, shared: Mapping[str, Shared]) -> None:
        self._books = {name: Book(each) for name, each in shared.items()}

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Nothing: what is shared is put back after each step."""

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Let the members of every entry be one again, their mean."""
        for _, book, parameter in self._of(network):
            _show(parameter, book.means(book.blocks(parameter))[book.codes])

    def state(self) -> dict[str, Tensor]:
        """Nothing: the network holds all that changes."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take up."""

    def _of(self, network: nn.Module) -> Iterator[tuple[str, Book, nn.Parameter]]:
        for name, book in self._books.items():
            parameter = network.get_parameter(name)
            yield name, book.on(parameter), parameter


class _Latent(Fixed):
    """Every weight has a value of its own, too, which takes the optimizer's moves.

    The moving average of the network follows what is shared; in it, the members of every entry as they now
    are have their mean.

    Args:
        shared: by parameter name.
        latents: the values to start from, by parameter name.
    """

    def __init__(self, shared: Mapping[str, Shared], latents: Mapping[str, Tensor]) -> None:
        super().__init__(shared)
        self._latents = {
            name: torch.where(book.kept[:, None], book.blocks(latents[name]), 0)
            for name, book in self._books.items()
        }
        self._trained: nn.Module | None = None

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Know which network is the one that learns."""
        self._trained = network

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Let the latent values follow the optimizer, and what is shared follow them."""
        if network is not self._trained:
            super().after_step(network, step, steps)
            return
        for name, book, parameter in self._of(network):
            self._follow(name, book, book.blocks(parameter))
            _show(parameter, book.values())

    def state(self) -> dict[str, Tensor]:
        """Latent values, codes and tables."""
        parts = {f"latents/{name}": latents for name, latents in self._latents.items()}
        for name, book in self._books.items():
            parts |= {f"codes/{name}": book.codes, f"table/{name}": book.table}
        return parts

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state."""
        for name, book in self._books.items():
            self._latents[name] = state[f"latents/{name}"]
            book.adopt(state[f"codes/{name}"], state[f"table/{name}"])

    def _follow(self, name: str, book: Book, moved: Tensor) -> None:
        """Take in what the optimizer made of a weight, in blocks."""
        raise NotImplementedError

    def _of(self, network: nn.Module) -> Iterator[tuple[str, Book, nn.Parameter]]:
        for name, book, parameter in super()._of(network):
            self._latents[name] = self._latents[name].to(book.table)
            yield name, book, parameter


class Reassigned(_Latent):
    """Weights go to the nearest entry at the beginning of every epoch but the first.

    M. Carreira-Perpiñán and Y. Idelbayev, "Model compression as constrained optimization, with application
    to neural nets. Part II: quantization", 2017: the network learns with the latent values, which a penalty
    pulls towards their entries, and between epochs k-means finds new entries for them. Here every step takes
    a share off a latent value's distance to its entry, the mean of its members. That share grows
    geometrically until it is all of it at ``CLOSED_AT``; from then on this is ``Fixed``.

    Straight-through gradients, without the pull, carry latent values so far in an epoch that assigning them
    anew destroys the network.

    Args:
        shared: by parameter name.
        latents: the values to start from, by parameter name.
        epochs: of the training.
    """

    def __init__(self, shared: Mapping[str, Shared], latents: Mapping[str, Tensor], epochs: int) -> None:
        super().__init__(shared, latents)
        self._epochs, self._pull = epochs, 0.0

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Assign anew if an epoch begins, and put the latent values into the network."""
        super().before_step(network, step, steps)
        self._pull = FIRST_PULL ** max(0.0, 1 - step / (CLOSED_AT * steps))
        for name, book, parameter in self._of(network):
            if step and step % (steps // self._epochs) == 0:
                book.reassign(self._latents[name])
            _show(parameter, self._latents[name])

    def _follow(self, name: str, book: Book, moved: Tensor) -> None:
        book.adopt_means(moved)
        self._latents[name] = torch.lerp(moved, book.values(), self._pull)
        self._latents[name] = torch.where(book.kept[:, None], self._latents[name], 0)


class Soft(_Latent):
    """Differentiable k-means (``modelopt_cli/methods/share/dkm.py``) whose temperature falls.

    In a step the network has the softly shared weights, and the gradient goes through them to the latent
    values; after it, it has the nearest entries. The temperature falls geometrically, so that in the end the
    two hardly differ.
    """

    def __init__(self, shared: Mapping[str, Shared], latents: Mapping[str, Tensor]) -> None:
        super().__init__(shared, latents)
        self._spacings = {
            name: [spacing(book.table[entries]) for _, entries in book.groups]
            for name, book in self._books.items()
        }
        self._values: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Share softly, and have the gradient follow."""
        super().before_step(network, step, steps)
        first, last = SOFTNESS
        softness = first * (last / first) ** (step / max(steps - 1, 1))
        for name, book, parameter in self._of(network):
            soft = [
                SoftClusters.of(
                    self._latents[name][members], book.table[entries], softness * unit, ITERATIONS
                )
                for (members, entries), unit in zip(book.groups, self._spacings[name], strict=True)
            ]
            values = book.values()
            for (members, _), clusters in zip(book.groups, soft, strict=True):
                values[members] = clusters.values()
            _show(parameter, values)
            self._values[name] = values
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(_pass_on, book, soft)))

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Move the latent values, and share hard."""
        while self._hooks:
            self._hooks.pop().remove()
        super().after_step(network, step, steps)

    def _follow(self, name: str, book: Book, moved: Tensor) -> None:
        self._latents[name] += moved - self._values[name]
        book.reassign(self._latents[name])


def _show(parameter: nn.Parameter, blocks: Tensor) -> None:
    """Put blocks into the network."""
    with torch.no_grad():
        parameter.copy_(blocks.view(parameter.shape))


def _pass_on(book: Book, soft: list[SoftClusters], parameter: Tensor) -> None:
    """Turn the gradient with respect to softly shared weights into that with respect to latent values."""
    assert parameter.grad is not None
    upstream = book.blocks(parameter.grad)
    gradient = torch.zeros_like(upstream)
    for (members, _), clusters in zip(book.groups, soft, strict=True):
        gradient[members] = clusters.gradient(upstream[members])
    parameter.grad.copy_(gradient.view(parameter.shape))
