"""Pruning of a state dict without a graph: single weights, blocks and N:M patterns, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.artifact.codecs.sparse import SPARSE
from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.artifact.dtypes import count_nonzero
from modelopt_cli.artifact.encodings import compact_state, is_pruned, require_not_shared
from modelopt_cli.errors import GraphNeeded
from modelopt_cli.measure.layer_status import Coverage, LayerStatus, recorded
from modelopt_cli.methods.context import Reached
from modelopt_cli.methods.layer_selection import (
    codec_of,
    has_weight_form,
    not_named_as_weights,
    select_layers,
    weight_labels,
)
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criterion_statistics import weight_scores
from modelopt_cli.methods.prune.masks import weight_masks
from modelopt_cli.methods.prune.pruner import PRUNE_FIRST, nothing_to_prune
from modelopt_cli.methods.prune.structures import STRUCTURES
from modelopt_cli.methods.prune.target_figures import DRAFT, Nonzeros, reached, require, search_ratio
from modelopt_cli.methods.prune.weight_pruner import ratio_bounds, weight_sparsities
from modelopt_cli.program import Encoding
from modelopt_cli.program.history import history_entry
from modelopt_cli.settings import option


@dataclass(frozen=True)
class PrunedState:
    """A pruned state dict.

    Attributes:
        state: tensors by name.
        encodings: how they are stored.
        coverage: status of each weight.
        target: the target and what was reached of it.
        entry: the history entry.
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
    code: Code = PLAIN_CODE,
) -> PrunedState:
    """Prune a state dict that has no graph.

    Args:
        state: tensors by name; they are not changed.
        encodings: how they are stored; what was pruned before stays pruned.
        config: a structure of single weights, a criterion that needs no data, one shot.
        seed: of random scores.
        origin: fields of the history entry that describe the source.
        about: what the file says next to the tensors, as ``artifact.write_tensors`` takes it.
        code: how the file will be written.

    Raises:
        UsageError: the config needs a graph, or weights are stored as int8 steps or the like.
        NothingCompressed: no tensor can be pruned.
        TargetNotReached: the target was missed by more than ``targets.TOLERANCE``.
    """
    about = about or {}
    refuse_without_graph(config, about.get("arch") is not None)
    require_not_shared(encodings, "pruning", PRUNE_FIRST)
    pruner = _StatePruner(state, encodings, config, seed, origin or {}, about, code)
    masks = pruner.masks()
    pruned, stored = pruner.applied(masks)
    metric, wanted = config.target
    target = reached(metric, wanted, pruner.kept_fraction(masks))
    if config.fixed_sparsity is None:
        require(target)
    entry = pruner.entry(masks, pruned, target.reached)
    if config.target_row.of_file:  # which is complete only now
        target = replace(target, reached=pruner.file_ratio(pruned, stored, entry))
    return PrunedState(pruned, stored, pruner.coverage(masks, pruned), target, entry)


def refuse_without_graph(config: PruneConfig, has_network: bool) -> None:
    """Refuse what looks at a graph or at outputs, of a module that cannot be traced or of bare tensors.

    Raises:
        GraphNeeded: names a choice that does without.
    """
    hint = "" if has_network else f"name its network with {option('arch')}, or "
    if config.pattern is None:
        zeros = " or ".join(name for name, row in STRUCTURES.items() if row.granularity.leaves_zeros)
        raise GraphNeeded(
            f"structure {config.structure} needs a network that can be traced",
            hint=f"{hint}use {option('structure')} {zeros}",
        )
    blind = PruneConfig()  # which looks at no data and does not train
    for setting, needs in (
        ("criterion", config.criterion_row.needs_data),
        ("allocation", config.allocation_row.needs_curves),
        ("schedule", config.schedule_row.trains),
    ):
        if needs:
            raise GraphNeeded(
                f"{setting} {getattr(config, setting)} needs a network that can be traced",
                hint=f"{hint}use {option(setting, getattr(blind, setting))}",
            )


class _StatePruner:
    """Pruner of a state dict; for the arguments see ``apply_to_state``.

    Attributes:
        names: the name of each weight in reports, by parameter: mostly its layer.
        reasons: reason why a weight is not pruned, by that name.
        tied: the name of the first of tied weights, by the name of each other one.
        scores: of the weights to prune.
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
        self.tied = _tied_weights(state)
        weights = {name: t for name, t in state.items() if has_weight_form(t) and name not in self.tied}
        unnamed = not_named_as_weights(weights)
        self.names = weight_labels(weights)
        obstacles = {
            label: unnamed.get(name) or self._obstacle(weights[name]) for name, label in self.names.items()
        }
        self.reasons = {layer: reason for layer, reason in obstacles.items() if reason is not None}
        able = [layer for layer in obstacles if layer not in self.reasons]
        selected, left_out = select_layers(able, config, obstacles) if able else ([], {})
        if not selected:
            raise nothing_to_prune(left_out | self.reasons)
        self.reasons |= left_out
        self.scores = self._scores([name for name in weights if self.names[name] in selected])

    def _obstacle(self, weight: Tensor) -> str | None:
        if weight.dtype not in SPARSE.dtypes:
            return f"its type is {str(weight.dtype).removeprefix('torch.')}"
        return self.pattern.obstacle(weight.shape)

    def _scores(self, chosen: list[str]) -> dict[str, Tensor]:
        weights = {name: self.state[name].float() for name in chosen}
        promised = {name: self.state[name] != 0 for name, e in self.encodings.items() if is_pruned(e)}
        return weight_scores(weights, self.config.chosen_criterion, promised, seed=self.seed)

    def masks(self) -> dict[str, Tensor]:
        """Masks that reach the target, by parameter: False for weights that go."""
        if self.pattern.fixed:
            return weight_masks(self.scores, self.pattern, dict.fromkeys(self.scores, 1.0))
        least, most = ratio_bounds(self.pattern, self.scores)
        target = self.config.kept_fraction

        def masks_at(ratio: float) -> dict[str, Tensor]:
            sparsities = weight_sparsities(self.config, self.pattern, self.scores, ratio)
            return weight_masks(self.scores, self.pattern, sparsities)

        def kept_at(ratio: float) -> float:
            return self.kept_fraction(masks_at(ratio))

        return masks_at(search_ratio(kept_at, target, 1 - target, least, most))

    def applied(self, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
        """The tensors with zeros where masks are False, and their encodings."""
        pruned = dict(self.state)
        for name, mask in masks.items():
            pruned[name] = self.state[name].masked_fill(~mask, 0)
        for alias, name in self.tied.items():
            pruned[alias] = pruned[name]
        fresh = {name for name, mask in masks.items() if not mask.all()}
        fresh |= {alias for alias, name in self.tied.items() if name in fresh}
        return pruned, compact_state(pruned, self.encodings, fresh, self.pattern.label)

    def kept_fraction(self, masks: Mapping[str, Tensor]) -> float:
        """The fraction of the original that is kept, in the unit of the target."""
        counted = self.config.target_row.counted
        if counted is None:
            pruned, stored = self.applied(masks)
            return self.file_ratio(pruned, stored, self.entry(masks, pruned, DRAFT))
        kept = sum(int(((self.state[name] != 0) & mask).sum()) for name, mask in masks.items())
        size = sum(mask.numel() for mask in masks.values())
        outside = sum(
            count_nonzero(tensor)
            for name, tensor in self.state.items()
            if name not in masks and name not in self.tied and _is_parameter(name, tensor)
        )
        before = sum(count_nonzero(self.state[name]) for name in masks)
        return counted(Nonzeros(kept, size, outside, outside + before))

    def file_ratio(
        self, pruned: Mapping[str, Tensor], stored: Mapping[str, Encoding], entry: dict[str, Any]
    ) -> float:
        """Bytes of the file, its history included, over those of the original as an artifact."""
        history = (*self.about.get("history", ()), entry)
        after = predicted_bytes(pruned, stored, code=self.code, **{**self.about, "history": history})
        return after / predicted_bytes(self.state, self.encodings, **self.about)

    def entry(
        self, masks: Mapping[str, Tensor], pruned: Mapping[str, Tensor], reached: float
    ) -> dict[str, Any]:
        """The history entry."""
        covered, (metric, wanted) = self.coverage(masks, pruned), self.config.target
        return history_entry(
            self.config.method,
            self.config.as_dict(),
            seed=self.seed,
            origin=self.origin,
            skipped={layer.name: layer.reason for layer in covered.layers if not layer.compressed},
            criterion=self.config.chosen_criterion,
            allocation=self.config.chosen_allocation,
            target={"metric": metric, "wanted": wanted, "reached": round(reached, 4)},
            **recorded(covered),
        )

    def coverage(self, masks: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> Coverage:
        """Status of every weight."""
        return Coverage(tuple(self._status(name, masks, pruned) for name in self.names))

    def _status(self, name: str, masks: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> LayerStatus:
        layer, tensor, earlier = self.names[name], pruned[name], self.encodings.get(name)
        kept, size, before = count_nonzero(tensor), tensor.nbytes, codec_of(earlier)
        fresh = name in masks and not masks[name].all()
        if fresh and (not is_pruned(earlier) or kept < count_nonzero(self.state[name])):
            scheme = f"sparse {100 * (1 - kept / tensor.numel()):.0f} %"
            return LayerStatus(layer, "weight", True, scheme, bytes=size, before=before)
        allocated = f"allocation {self.config.chosen_allocation} takes nothing from it"
        why = self.reasons.get(layer, allocated)
        return LayerStatus(layer, "weight", False, reason=why, bytes=size, before=before)


def _is_parameter(name: str, tensor: Tensor) -> bool:
    """True if a tensor is learned, as far as a name can tell: statistics of batch norms are not."""
    return tensor.is_floating_point() and not name.endswith(("running_mean", "running_var"))


def _tied_weights(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The first name of each tensor that has several, by its other names: weights that layers share."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    tied = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied
