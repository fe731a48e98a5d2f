"""The state of a training: everything that the rest of it depends on, as tensors and JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.settings import option
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.meter import LossMeter
from modelopt_cli.training.optim import optimizer_state, restore_optimizer
from modelopt_cli.training.state import State


@dataclass
class Place:
    """Progress of a training.

    Attributes:
        epoch: complete epochs done.
        step: steps done, of all epochs.
        step_in_epoch: steps done in the epoch that is not.
        best: largest validation accuracy, percent.
        best_epoch: the epoch, from 1, after which it was reached.
        stale: epochs since then.
        loss: mean of the last complete epoch.
        done: no epoch is to follow.
        start: loss of the first step; None before it.
        judged: sum of the losses of this epoch's samples that ``recovery.py`` has looked at.
        judged_samples: their number.
        good: True if that check found nothing wrong, and a loss no higher than at the start.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    best_epoch: int | None = None
    stale: int = 0
    loss: float = 0.0
    done: bool = False
    start: float | None = None
    judged: float = 0.0
    judged_samples: int = 0
    good: bool = False


def snapshot(learner: Learner, place: Place, best: Mapping[str, Tensor]) -> State:
    """The state now; its tensors are the live ones, to be written before the next step."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "network": tensors_of(learner.network),
        "optimizer": optimizer_state(learner.optimizer),
        "average": tensors_of(learner.average.network) if learner.average is not None else {},
        "best": best,
    }
    parts |= {f"objective{i}": tensors_of(module) for i, module in enumerate(learner.learning[1:])}
    parts |= {f"callback{i}": callback.state() for i, callback in enumerate(learner.callbacks)}
    tensors = {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}
    meter = {"total": learner.meter.total, "samples": learner.meter.samples}
    return State(tensors, {"place": asdict(place), "meter": meter, "steps": learner.steps})


def kept(learner: Learner, place: Place, best: Mapping[str, Tensor]) -> State:
    """The state now, as :func:`snapshot`, in tensors of its own; those of ``best`` never change."""
    state = snapshot(learner, place, best)
    tensors = {n: t if n.startswith("best/") else t.clone() for n, t in state.tensors.items()}
    return State(tensors, state.about)


def restore(learner: Learner, state: State) -> tuple[Place, dict[str, Tensor]]:
    """Put a learner into the state that :func:`snapshot` was given; the place, and the best weights so far.

    Raises:
        ArtifactError: it is the state of another training.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in state.tensors.items():
        part, _, name = path.partition("/")
        parts.setdefault(part, {})[name] = tensor
    if state.about["steps"] != learner.steps:
        raise _other(f"of {state.about['steps']} steps, not {learner.steps}")
    _fill(learner.network, parts.get("network", {}))
    restore_optimizer(learner.optimizer, parts.get("optimizer", {}))
    if learner.average is not None:
        _fill(learner.average.network, parts.get("average", {}))
    for i, module in enumerate(learner.learning[1:]):
        _fill(module, parts.get(f"objective{i}", {}))
    for i, callback in enumerate(learner.callbacks):  # which may change what they are given
        callback.restore({name: t.clone() for name, t in parts.get(f"callback{i}", {}).items()})
    learner.meter = LossMeter()
    if learner.world.main:  # which has had the others' losses handed over
        learner.meter.total, learner.meter.samples = (state.about["meter"][k] for k in ("total", "samples"))
    live = tensors_of(learner.network)
    best = {name: torch.empty_like(live[name]).copy_(t) for name, t in parts.get("best", {}).items()}
    return Place(**state.about["place"]), best


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, the live ones, by name."""
    return {
        **{name: p.detach() for name, p in network.named_parameters()},
        **dict(network.named_buffers()),
    }


def copy_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers, by name."""
    return {name: tensor.clone() for name, tensor in tensors_of(network).items()}


def put_tensors(tensors: Mapping[str, Tensor], network: nn.Module) -> None:
    """Give the parameters and buffers, which stay the same objects, these values by name."""
    with torch.no_grad():
        for name, tensor in tensors_of(network).items():
            tensor.copy_(tensors[name])


def _fill(network: nn.Module, saved: Mapping[str, Tensor]) -> None:
    live = tensors_of(network)
    if {n: t.shape for n, t in live.items()} != {n: t.shape for n, t in saved.items()}:
        raise _other("with other weights")
    put_tensors(saved, network)


def _other(difference: str) -> ArtifactError:
    return ArtifactError(
        f"the saved training is another one, {difference}", hint=f"start over with {option('force', True)}"
    )
