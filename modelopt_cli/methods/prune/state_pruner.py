"""What can be pruned without a graph: single weights, rows of them and N:M patterns, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.artifact.codecs.sparse import DTYPES
from modelopt_cli.artifact.coding import Code
from modelopt_cli.artifact.dtypes import count_nonzero
from modelopt_cli.artifact.encodings import compact_state, is_pruned, require_not_shared
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Reached
from modelopt_cli.methods.layer_selection import (
    codec_of,
    has_weight_form,
    not_named_as_weights,
    select_layers,
    weight_labels,
)
from modelopt_cli.methods.prune.allocation import allocate
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import weight_scores
from modelopt_cli.methods.prune.masks import weight_masks
from modelopt_cli.methods.prune.pruner import nothing_to_prune
from modelopt_cli.methods.prune.targets import DRAFT, Nonzeros, reached, require, search_ratio
from modelopt_cli.methods.prune.weight_pruner import LEAST_KEPT
from modelopt_cli.program import Encoding
from modelopt_cli.program.coverage import Coverage, LayerStatus, recorded


@dataclass(frozen=True)
class StateResult:
    """A pruned state dict.

    Attributes:
        state: tensors by name.
        encodings: how they are stored.
        coverage: what became of each weight.
        target: what was asked for and what was reached.
        entry: for the history.
    """

    state: dict[str, Tensor]
    encodings: dict[str, Encoding]
    coverage: Coverage
    target: Reached
    entry: dict[str, Any]


def apply_to_state(
    state: Mapping[str, Tensor],
    encodings: Mapping[str, Encoding],
    config: PruneConfig,
    seed: int = 0,
    *,
    origin: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    code: Code = "plain",
) -> StateResult:
    """Prune a state dict that has no graph.

    Args:
        state: tensors by name; they are not changed.
        encodings: how they are stored; what was pruned before stays pruned.
        config: a structure of single weights, a criterion that needs no data, one shot.
        seed: of the criterion ``random``.
        origin: what the history should say of the source.
        about: what the file says beside the tensors, as ``artifact.write_tensors`` takes it.
        code: how the file will be written.

    Raises:
        UsageError: the config needs a graph, or weights are stored as int8 steps or the like.
        NothingCompressed: no tensor can be pruned.
        TargetNotReached: the target was missed by more than ``targets.TOLERANCE``.
    """
    about = about or {}
    _check(config, encodings, about.get("arch") is not None)
    work = _Work(state, encodings, config, seed, origin or {}, about, code)
    masks = work.masks()
    pruned, stored = work.applied(masks)
    metric, wanted = config.target
    target = reached(metric, wanted, work.left(masks))
    if config.fixed_sparsity is None:
        require(target)
    entry = work.entry(masks, pruned, target.reached)
    if config.target_row.of_file:  # which is complete only now
        target = replace(target, reached=work.file_share(pruned, stored, entry))
    return StateResult(pruned, stored, work.coverage(masks, pruned), target, entry)


def _check(config: PruneConfig, encodings: Mapping[str, Encoding], has_network: bool) -> None:
    hint = "" if has_network else "name its network with --arch, or "
    if config.pattern is None:
        raise UsageError(
            f"structure {config.structure} needs a network that can be traced",
            hint=f"{hint}use --structure unstructured",
        )
    blind = PruneConfig()  # which looks at no data and does not train
    for option, needs in (
        ("criterion", config.criterion_row.needs_data),
        ("allocation", config.allocation_row.needs_curves),
        ("schedule", config.schedule_row.trains),
    ):
        if needs:
            raise UsageError(
                f"{option} {getattr(config, option)} needs a network that can be traced",
                hint=f"{hint}use --{option} {getattr(blind, option)}",
            )
    first = "prune first, then quantize or share: they keep what pruning did"
    require_not_shared(encodings, "pruning", first)


class _Work:
    """A state dict, the weights of it that may be pruned, and their scores.

    Attributes:
        origin: what the history should say of the source.
        about: what the file says beside the tensors.
        code: how the file will be written.
        names: what each weight is called, by parameter: its layer, mostly.
        reasons: why some of them are left whole.
        twins: parameters that are another one's tensor, by name the other's.
        scores: of those to prune.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        encodings: Mapping[str, Encoding],
        config: PruneConfig,
        seed: int,
        origin: Mapping[str, Any],
        about: Mapping[str, Any],
        code: Code,
    ) -> None:
        self.state, self.encodings, self.config = state, encodings, config
        self.seed, self.origin, self.about, self.code = seed, origin, about, code
        assert config.pattern is not None
        self.pattern = config.pattern
        self.twins = _twins(state)
        weights = {name: t for name, t in state.items() if has_weight_form(t) and name not in self.twins}
        others = not_named_as_weights(weights)
        self.names = weight_labels(weights)
        obstacles = {
            label: others.get(name) or self._obstacle(weights[name]) for name, label in self.names.items()
        }
        self.reasons = {layer: why for layer, why in obstacles.items() if why is not None}
        able = [layer for layer, why in obstacles.items() if why is None]
        selected, left_out = select_layers(able, config, obstacles) if able else ([], {})
        if not selected:
            raise nothing_to_prune(left_out | self.reasons)
        self.reasons |= left_out
        self.scores = self._scores([name for name in weights if self.names[name] in selected])

    def _obstacle(self, weight: Tensor) -> str | None:
        if weight.dtype not in DTYPES:
            return f"its type is {str(weight.dtype).removeprefix('torch.')}"
        return self.pattern.obstacle(weight.shape)

    def _scores(self, chosen: list[str]) -> dict[str, Tensor]:
        weights = {name: self.state[name].float() for name in chosen}
        promised = {name: self.state[name] != 0 for name, e in self.encodings.items() if is_pruned(e)}
        return weight_scores(weights, self.config.chosen_criterion, promised, seed=self.seed)

    def masks(self) -> dict[str, Tensor]:
        """False where the target has a weight go."""
        if self.pattern.fixed:
            return weight_masks(self.scores, self.pattern, dict.fromkeys(self.scores, 1.0))
        units = {name: self.pattern.units(score) for name, score in self.scores.items()}
        total = sum(unit.numel() for unit in units.values())
        gone = sum(int(torch.isneginf(unit).sum()) for unit in units.values())
        most = max(gone, total - LEAST_KEPT * len(units))
        left = self.config.fraction_left

        def masks_at(ratio: float) -> dict[str, Tensor]:
            return weight_masks(self.scores, self.pattern, self._sparsities(units, ratio))

        def left_at(ratio: float) -> float:
            return self.left(masks_at(ratio))

        return masks_at(search_ratio(left_at, left, 1 - left, gone / total, most / total))

    def _sparsities(self, units: Mapping[str, Tensor], ratio: float) -> dict[str, float]:
        return allocate(
            self.config.chosen_allocation,
            units,
            {name: tuple(score.shape) for name, score in self.scores.items()},
            ratio,
            costs=dict.fromkeys(units, float(self.pattern.unit)),
            comparable=self.config.criterion_row.comparable,
            least_kept=LEAST_KEPT,
        )

    def applied(self, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
        """The tensors with zeros where masks are False, and how to store them."""
        pruned = dict(self.state)
        for name, mask in masks.items():
            pruned[name] = self.state[name].masked_fill(~mask, 0)
        for twin, name in self.twins.items():
            pruned[twin] = pruned[name]
        fresh = {name for name, mask in masks.items() if not mask.all()}
        fresh |= {twin for twin, name in self.twins.items() if name in fresh}
        return pruned, compact_state(pruned, self.encodings, fresh, self.pattern.label)

    def left(self, masks: Mapping[str, Tensor]) -> float:
        """What is left of the target's figure."""
        counted = self.config.target_row.counted
        if counted is None:
            pruned, stored = self.applied(masks)
            return self.file_share(pruned, stored, self.entry(masks, pruned, DRAFT))
        kept = sum(int(((self.state[name] != 0) & mask).sum()) for name, mask in masks.items())
        size = sum(mask.numel() for mask in masks.values())
        others = sum(
            count_nonzero(tensor)
            for name, tensor in self.state.items()
            if name not in masks and name not in self.twins and _is_parameter(name, tensor)
        )
        before = sum(count_nonzero(self.state[name]) for name in masks)
        return counted(Nonzeros(kept, size, others, others + before))

    def file_share(
        self, pruned: Mapping[str, Tensor], stored: Mapping[str, Encoding], entry: dict[str, Any]
    ) -> float:
        """Bytes of the file, its history included, over those of the original as an artifact."""
        history = (*self.about.get("history", ()), entry)
        after = predicted_bytes(pruned, stored, code=self.code, **{**self.about, "history": history})
        return after / predicted_bytes(self.state, self.encodings, **self.about)

    def entry(
        self, masks: Mapping[str, Tensor], pruned: Mapping[str, Tensor], reached: float
    ) -> dict[str, Any]:
        """What the history says."""
        covered, (metric, wanted) = self.coverage(masks, pruned), self.config.target
        return {
            "method": "prune",
            "config": self.config.as_dict(),
            "criterion": self.config.chosen_criterion,
            "allocation": self.config.chosen_allocation,
            "seed": self.seed,
            "torch": str(torch.__version__),
            "target": {"metric": metric, "wanted": wanted, "reached": round(reached, 4)},
            "skipped": {layer.name: layer.reason for layer in covered.layers if not layer.compressed},
            **recorded(covered),
            **self.origin,
        }

    def coverage(self, masks: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> Coverage:
        """What became of every weight."""
        return Coverage(tuple(self._status(name, masks, pruned) for name in self.names))

    def _status(self, name: str, masks: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> LayerStatus:
        layer, tensor, earlier = self.names[name], pruned[name], self.encodings.get(name)
        left, size, before = count_nonzero(tensor), tensor.nbytes, codec_of(earlier)
        fresh = name in masks and not masks[name].all()
        if fresh and (not is_pruned(earlier) or left < count_nonzero(self.state[name])):
            scheme = f"sparse {100 * (1 - left / tensor.numel()):.0f} %"
            return LayerStatus(layer, "weight", True, scheme, bytes=size, before=before)
        allocated = f"allocation {self.config.chosen_allocation} takes nothing from it"
        why = self.reasons.get(layer, allocated)
        return LayerStatus(layer, "weight", False, reason=why, bytes=size, before=before)


def _is_parameter(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is learned, as far as a name can tell: statistics of batch norms are not."""
    return tensor.is_floating_point() and not name.endswith(("running_mean", "running_var"))


def _twins(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are stored under an earlier name, too: weights that layers share."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    twins = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            twins[name] = first[key]
    return twins
