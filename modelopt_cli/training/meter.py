"""The mean training loss, without waiting for the device at every step."""

import math

import torch
from torch import Tensor


class LossMeter:
    """Sums the losses of the steps, each weighted by its samples.

    Attributes:
        total: sum over the samples whose losses were taken in.
        samples: their number.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.samples = 0
        self._waiting: list[tuple[Tensor, int, int]] = []
        self._bad: int | None = None

    def add(self, loss: Tensor, samples: int, step: int) -> None:
        """Note a step's mean loss over ``samples``; it is looked at in :meth:`take_in`."""
        if samples:
            self._waiting.append((loss.detach(), samples, step))

    def take_in(self) -> int | None:
        """Add up what was noted; the first step ever whose loss is not finite, or None."""
        if self._bad is not None or not self._waiting:
            return self._bad
        losses = [loss for loss, _, _ in self._waiting]
        values = [losses[0].item()] if len(losses) == 1 else torch.stack(losses).tolist()
        waiting, self._waiting = self._waiting, []
        for value, (_, samples, step) in zip(values, waiting, strict=True):
            if not math.isfinite(value):
                self._bad = step
                break
            self.total += value * samples
            self.samples += samples
        return self._bad

    def clear(self) -> None:
        """Begin a new epoch."""
        self.total, self.samples = 0.0, 0
