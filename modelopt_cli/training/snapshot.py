"""The state of a training: everything that the rest of it depends on, as tensors and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.training.config import Companion
from modelopt_cli.training.distributed import World
from modelopt_cli.training.ema import MovingAverage
from modelopt_cli.training.meter import LossMeter
from modelopt_cli.training.optim import optimizer_state, restore_optimizer
from modelopt_cli.training.state import State


@dataclass
class Place:
    """How far a training has come.

    Attributes:
        epoch: whole epochs done.
        step: steps done, of all epochs.
        step_in_epoch: steps done in the epoch that is not.
        best: largest validation accuracy, percent.
        best_epoch: the epoch, from 1, after which it was reached.
        stale: epochs since then.
        loss: mean of the last whole epoch.
        done: no epoch is to follow.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    best_epoch: int | None = None
    stale: int = 0
    loss: float = 0.0
    done: bool = False


class Stateful(Protocol):
    """What of a training makes up its state."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    best: dict[str, Tensor]
    companions: Sequence[Companion]
    meter: LossMeter
    place: Place
    steps: int
    world: World


def snapshot(training: Stateful) -> State:
    """The state now; its tensors are the live ones, to be written before the next step."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "network": tensors_of(training.network),
        "optimizer": optimizer_state(training.optimizer),
        "average": tensors_of(training.average.network) if training.average is not None else {},
        "best": training.best,
    }
    parts |= {f"companion{i}": companion.state() for i, companion in enumerate(training.companions)}
    tensors = {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}
    meter = {"total": training.meter.total, "samples": training.meter.samples}
    return State(tensors, {"place": asdict(training.place), "meter": meter, "steps": training.steps})


def restore(training: Stateful, state: State) -> None:
    """Put a training into the state that :func:`snapshot` gave.

    Raises:
        UsageError: it is that of another training.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in state.tensors.items():
        part, _, name = path.partition("/")
        parts.setdefault(part, {})[name] = tensor
    if state.about["steps"] != training.steps:
        raise _other(f"of {state.about['steps']} steps, not {training.steps}")
    _fill(training.network, parts.get("network", {}))
    restore_optimizer(training.optimizer, parts.get("optimizer", {}))
    if training.average is not None:
        _fill(training.average.network, parts.get("average", {}))
    live = tensors_of(training.network)
    training.best = {name: torch.empty_like(live[name]).copy_(t) for name, t in parts.get("best", {}).items()}
    for i, companion in enumerate(training.companions):
        companion.restore(parts.get(f"companion{i}", {}))
    training.place = Place(**state.about["place"])
    if training.world.main:  # the sums are its own; what others had added of the epoch is lost to the log
        training.meter.total, training.meter.samples = (state.about["meter"][k] for k in ("total", "samples"))


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, the live ones, by name."""
    return {
        **{name: p.detach() for name, p in network.named_parameters()},
        **dict(network.named_buffers()),
    }


def copy_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers, by name."""
    return {name: tensor.clone() for name, tensor in tensors_of(network).items()}


def _fill(network: nn.Module, saved: Mapping[str, Tensor]) -> None:
    live = tensors_of(network)
    if {n: t.shape for n, t in live.items()} != {n: t.shape for n, t in saved.items()}:
        raise _other("with other weights")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


def _other(what: str) -> UsageError:
    return UsageError(f"the saved training is another one, {what}", hint="start over with --force")
