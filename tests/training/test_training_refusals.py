"""A network that autograd refuses is the user's to mend: one line that says what to change."""

import pytest
import torch
from torch import Tensor, nn
from training_helpers import CLASSES, noisy_patterns

from modelopt_cli.errors import UsageError
from modelopt_cli.training import TrainConfig, Training, fit


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(72, 8), nn.Sigmoid()
        self.gate, self.last = nn.ReLU(inplace=True), nn.Linear(8, CLASSES)
        self.kept: Tensor | None = None


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x.flatten(1))))


class SavedValue(Base):
    """Sigmoid needs its output for the gradient, which the ReLU changes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.act(self.first(x.flatten(1)))))


class Leaf(Base):
    """A weight itself is changed."""

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.mul_(0.9)
        return self.last(self.first(x.flatten(1)))


class View(Base):
    """A view that unbind made is changed."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x.flatten(1)).unflatten(1, (2, 4)).unbind(1)
        parts[0].mul_(2)
        return self.last(torch.cat(parts, 1))


class Detached(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.last(self.first(x.flatten(1)))


class Remembering(Base):
    """A value with its gradient is kept from step to step."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1)).mean(0)
        self.kept = y if self.kept is None else 0.5 * (self.kept + y)
        return self.last(self.first(x.flatten(1)) + self.kept)


CHANGED = "a value that its gradient needs is changed in place"
REFUSED = {
    SavedValue: f"the network (in place: gate): cannot be trained: {CHANGED} (that of Sigmoid); compute a",
    Leaf: f"the network (in place: gate): cannot be trained: {CHANGED}; compute a new one: inplace=False",
    View: f"the network (in place: gate): cannot be trained: {CHANGED} (that of Unbind); compute a new one",
    Detached: "no gradient leads from its outputs to its weights; leave out no_grad()",
    Remembering: "it keeps a value of one step for the next one; compute it in each forward pass",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_autograd_refuses_is_said_in_one_line(kind: type[nn.Module]) -> None:
    training = Training(noisy_patterns(), config=TrainConfig(epochs=2, batch_size=16, lr=0.01))
    with pytest.raises(UsageError) as error:
        fit(kind(), training, seed=0)
    assert error.value.exit_code == 2
    assert REFUSED[kind] in str(error.value)


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Tensor) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Tensor, "backward", fails)
    with pytest.raises(RuntimeError, match="no kernel"):
        fit(Plain(), Training(noisy_patterns(), config=TrainConfig(epochs=1, batch_size=16)), seed=0)
