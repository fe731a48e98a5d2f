"""Recovery from divergence: training returns to a good state and goes on with a smaller learning rate."""

from collections.abc import Mapping

import torch
from torch import Tensor

from modelopt_cli.errors import UsageError
from modelopt_cli.settings import option
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.objectives import CrossEntropy
from modelopt_cli.training.snapshot import Place, kept, restore
from modelopt_cli.training.state import State

WINDOW = 50
"""Steps of an epoch between looks at how the loss has developed; another is at the epoch's end."""
LOWER = 4
"""Divisor of the learning rate at each return."""
MOST = 5
"""Returns in one training before it ends with an error."""
LIMIT = 100
"""Training has diverged when the loss is so many times what it was at the start, or 1 if that was less. Ten
times is nothing in the first ``EARLY`` steps: networks with batch norm come back from there."""
EARLY = 2 * WINDOW
LATE_LIMIT = 1.1
"""After those and at the end, the loss may be so many times that at the start, or half of what guessing
has if that was less: training must not make a network worse than none does. Below that half the loss of a
network that was trained before may rise: of fewer weights or of harder samples, say."""


class Diverged(UsageError):
    """Training has diverged at ``step``, which counts from 1."""

    def __init__(self, problem: str, step: int, steps: int, stage: str) -> None:
        rate = f"lower {option('lr')}, or limit the gradient with {option('clip')}"
        hint = rate if step > 1 else "look for it in the data and in the weights it starts from"
        super().__init__(f"{problem} at step {step} of {steps}", where=stage, hint=hint)
        self.step = step


class Recovery:
    """Keeps good states of a training: that at the start, and those where the loss was no higher since.

    It keeps the last two. Training returns to the first of them: the loss may rise so late that the other was
    taken on the way to divergence.

    What is decided here is decided from figures that all processes have.

    Attributes:
        returns: how often training went back to it.
    """

    def __init__(self, learner: Learner, stage: str) -> None:
        self.learner, self.stage, self.returns = learner, stage, 0
        self._good: list[State] = []

    def keep(self, place: Place, best: Mapping[str, Tensor]) -> None:
        """Take the present state for a good one."""
        self._good = [*self._good[-1:], kept(self.learner, place, best)]

    def judge(self, total: float, samples: int, place: Place) -> None:
        """Check the weights and the losses since the last check, and note in ``place`` if all is well.

        Args:
            total: sum of the losses of this epoch's samples so far, of all processes.
            samples: their number.
            place: how far the training is.

        Raises:
            Diverged: a weight is not finite, or the losses are above their limit.
        """
        mean = (total - place.judged) / (samples - place.judged_samples)
        place.judged, place.judged_samples = total, samples
        assert place.start is not None
        place.good = mean <= place.start
        if mean > self._limit(place.start, place.step):
            raise self.diverged(f"the loss is {mean:.3g}, from {place.start:.3g} at the start,", place.step)
        if not all(bool(torch.isfinite(p).all()) for p in self.learner.parameters):
            raise self.diverged("a weight is not a finite number", place.step)

    def _limit(self, start: float, step: int) -> float:
        """The largest loss after ``step`` steps that is no divergence.

        The late limit ends no training: after the last return the loss may be what it is.
        """
        if self.returns < MOST and (step > EARLY or step == self.learner.steps):
            return LATE_LIMIT * max(start, self.learner.guessing / 2)
        return LIMIT * max(start, 1.0)

    def still_high(self, place: Place) -> str | None:
        """Warning for a training that ends with a loss no lower than it began; None where it is lower.

        A network that was trained before may end with a loss somewhat higher: of fewer weights, say.
        """
        assert place.start is not None
        guessing = self.learner.guessing
        untrained = (
            min(place.start, guessing) if isinstance(self.learner.objective, CrossEntropy) else place.start
        )
        if place.loss < max(untrained, guessing / 2):
            return None
        chance = f"guessing has {guessing:.4g} and " if guessing else ""
        return (
            f"the loss is still high: its mean over the last epoch is {place.loss:.4g}, where {chance}"
            f"the first step had {place.start:.4g}; give more {option('epochs')} or "
            f"another {option('lr')}, and look at the labels"
        )

    def diverged(self, problem: str, step: int) -> Diverged:
        """The error that ends a training which cannot be brought back."""
        return Diverged(problem, step, self.learner.steps, self.stage)

    def back(self) -> tuple[Place, dict[str, Tensor]]:
        """Return to the last good state, with a smaller rate; its place, and its best weights so far."""
        self.returns += 1
        self.learner.lr /= LOWER
        self._good = self._good[:1]
        return restore(self.learner, self._good[0])

    def into(self, state: State, place: Place) -> State:
        """Add what this knows to a state of the training, which may itself be the last good one."""
        tensors, abouts = dict(state.tensors), []
        for number, good in enumerate(self._good):
            present = good.about["place"]["step"] == place.step
            abouts.append(None if present else good.about)
            if not present:
                tensors |= {f"good{number}/{name}": tensor for name, tensor in good.tensors.items()}
        about = {"lr": self.learner.lr, "returns": self.returns, "good": abouts}
        return State(tensors, {**state.about, **about})

    def restore(self, state: State) -> tuple[Place, dict[str, Tensor]]:
        """Take up what :meth:`into` returned; the place, and the best weights so far."""
        place, best = restore(self.learner, state)
        self.learner.lr = state.about.get("lr", self.learner.lr)  # states of older versions have none
        self.returns = state.about.get("returns", 0)
        self._good = [
            kept(self.learner, place, best) if about is None else State(_part(state, number), about)
            for number, about in enumerate(state.about.get("good", [None]))
        ]
        return place, best


def _part(state: State, number: int) -> dict[str, Tensor]:
    """The tensors of a good state."""
    prefix = f"good{number}/"
    return {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
