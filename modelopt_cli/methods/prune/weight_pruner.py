"""Pruning of single weights, which become zeros: scores, masks, and the way the zeros are stored."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import compact
from modelopt_cli.methods.layer_selection import select_layers, weight_labels
from modelopt_cli.methods.matrices import unseen_inputs, weights_of
from modelopt_cli.methods.prune.allocation import Curve, allocate
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import AUTO_CRITERION
from modelopt_cli.methods.prune.criterion_statistics import score_weights, weight_scores
from modelopt_cli.methods.prune.figures import nonzeros
from modelopt_cli.methods.prune.masks import Masks, weight_masks
from modelopt_cli.methods.prune.pruner import PrunedVariant, Pruner, nothing_to_prune
from modelopt_cli.methods.prune.sensitivity import STEEP, curves, measure
from modelopt_cli.methods.prune.structures import SparsityPattern
from modelopt_cli.methods.prune.target_figures import Nonzeros, search_ratio
from modelopt_cli.program import Program

LEAST_KEPT = 1
"""Number of units that a layer keeps at least: a layer of zeros alone would cut the network in two."""


class WeightPruner(Pruner):
    """Pruner of single weights, blocks of weights and N:M patterns."""

    @cached_property
    def pattern(self) -> SparsityPattern:
        """The zeros that may be put."""
        assert self.config.pattern is not None
        return self.config.pattern

    @cached_property
    def layers(self) -> dict[str, str]:
        """The name that each parameter to prune has in reports: mostly its layer.

        Raises:
            NothingCompressed: there are none.
            UsageError: a glob matches no layer.
        """
        names = weight_labels(weights_of(self.original))
        if not names:
            raise nothing_to_prune({})
        _, self.reasons = select_layers(names.values(), self.config)
        chosen = {}
        for parameter, layer in names.items():
            if layer in self.reasons:
                continue
            reason = self._obstacle(parameter)
            if reason is None:
                chosen[parameter] = layer
            else:
                self.reasons[layer] = reason
        if not chosen:
            raise nothing_to_prune(self.reasons)
        return chosen

    def _obstacle(self, parameter: str) -> str | None:
        criterion = self.config.criterion_row
        reason = self.pattern.obstacle(self.original.get_parameter(parameter).shape)
        if reason is None and criterion.watches_inputs:
            reason = unseen_inputs(self.original, parameter)
        return reason or criterion.obstacle(self.original, parameter, self.pattern)

    def prune(self, program: Program, kept: float, final: bool) -> Program:
        """Zero the weights of the lowest scores, wherever the allocation finds them."""
        scores, pattern = self.scores(program), self._pattern_at(kept)
        curves = self._curves(program)
        ratio = self._ratio(program, scores, pattern, kept, curves)
        sparsities = self.sparsities(scores, ratio, curves)
        compensate = self.config.criterion_row.compensate
        if compensate is None:
            return self.masked(program, weight_masks(scores, pattern, sparsities))
        assert self.samples is not None
        pruned = compensate(program, pattern, sparsities, self.samples, self.context)
        return self.masked(pruned.program, pruned.masks)

    def scores(self, program: Program) -> dict[str, Tensor]:
        """The importance of every weight that may go."""
        criterion, parameters = self.config.chosen_criterion, tuple(self.layers)
        if self.config.criterion_row.compensate and not self.config.allocation_row.compares_scores:
            criterion = AUTO_CRITERION  # the layers are pruned by scores of their own, taken on the way
        samples = self.config.calibration_samples
        return score_weights(program, criterion, parameters, self.context, samples=samples)

    def _curves(self, program: Program) -> dict[str, Curve] | None:
        if not self.config.allocation_row.needs_curves:
            return None
        known = curves(measure(self, program, STEEP))
        return {name: known[layer] for name, layer in self.layers.items()}

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[PrunedVariant]:
        """The Program with one layer pruned at a time."""
        scores, pattern = self.scores(program), self.pattern
        if pattern.fixed:
            sparsities = (pattern.sparsity,)
        for name, layer in self.layers.items():
            for sparsity in sparsities:
                masks = weight_masks({name: scores[name]}, pattern, {name: sparsity})
                yield PrunedVariant(layer, (layer,), sparsity, partial(self.masked, program, masks))

    @property
    def recalibrates(self) -> bool:
        """False where training follows: zeros move the statistics so little that it catches up with them."""
        return self.context.training is None and super().recalibrates

    def ratios(self, program: Program, kept: float) -> tuple[float, float]:
        """The fractions of the weights that may go: that which is gone already, and that to remove in all."""
        scores = self.scores(program)
        gone = sum(int(torch.isneginf(score).sum()) for score in scores.values())
        total = sum(score.numel() for score in scores.values())
        return gone / total, self._ratio(program, scores, self.pattern, kept, None)

    def choose(self, network: nn.Module, ratio: float) -> dict[str, Tensor]:
        """Masks by the present weights of a network in training; zeros of earlier pruning stay."""
        weights = {name: network.get_parameter(name).detach().cpu() for name in self.layers}
        scores = weight_scores(weights, self.config.chosen_criterion, self._promised, seed=self.context.seed)
        return weight_masks(scores, self.pattern, self.sparsities(scores, ratio, None))

    @cached_property
    def _promised(self) -> dict[str, Tensor]:
        return Masks.of(self.original).masks

    def masked(self, program: Program, masks: Mapping[str, Tensor]) -> Program:
        """A copy with zeros where the masks are False, stored as sparse."""
        result = copy.deepcopy(program)
        with torch.no_grad():
            for name, mask in masks.items():
                result.get_parameter(name).masked_fill_(~mask, 0)
        pruned = [name for name, mask in masks.items() if not mask.all()]
        result.encodings = compact(result, pruned, self.pattern.label)
        return result

    def _pattern_at(self, kept: float) -> SparsityPattern:
        """The pattern of a round, which keeps more of every M in the early ones."""
        pattern = self.pattern
        return (
            replace(pattern, keep=max(pattern.keep, round(kept * pattern.group)))
            if pattern.fixed
            else pattern
        )

    def sparsities(
        self, scores: Mapping[str, Tensor], ratio: float, curves: Mapping[str, Curve] | None
    ) -> dict[str, float]:
        """The fraction of each weight that goes when ``ratio`` of all of them go together."""
        return weight_sparsities(self.config, self.pattern, scores, ratio, curves)

    def _ratio(
        self,
        program: Program,
        scores: Mapping[str, Tensor],
        pattern: SparsityPattern,
        kept: float,
        curves: Mapping[str, Curve] | None,
    ) -> float:
        if pattern.fixed:
            return pattern.sparsity
        least, most = ratio_bounds(pattern, scores)
        counted = self.config.target_row.counted
        weights = {name: program.get_parameter(name) for name in scores}
        outside = int(nonzeros(program)) - sum(int(torch.count_nonzero(w)) for w in weights.values())
        size, original = sum(w.numel() for w in weights.values()), int(nonzeros(self.source))

        def kept_at(ratio: float) -> float:
            masks = weight_masks(scores, pattern, self.sparsities(scores, ratio, curves))
            if counted is None:
                return self.kept_fraction(self.masked(program, masks))
            nonzero = sum(int(((weights[name] != 0) & mask).sum()) for name, mask in masks.items())
            return counted(Nonzeros(nonzero, size, outside, original))

        return search_ratio(kept_at, kept, 1 - kept, least, most)

    def count_parameters(self, program: Program) -> float:
        """The nonzero parameters of a network."""
        return nonzeros(program)

    def units_kept(self, program: Program) -> float:
        """The fraction of the weights to prune that is not zero."""
        weights = [program.get_parameter(name) for name in self.layers]
        return sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)

    def unchanged(self, program: Program) -> bool:
        """True if there are no more zeros than there were."""
        return all(zeros(program, name) <= zeros(self.original, name) for name in self.layers)

    def describe(self, program: Program) -> dict[str, object]:
        """The sparsity of every layer."""
        return {"sparsity": {self.layers[name]: zeros(program, name) for name in self.layers}}

    def skipped(self, program: Program) -> dict[str, str]:
        """The reason for every layer that was left out, or from which the allocation takes nothing."""
        untouched = {
            layer: f"allocation {self.config.chosen_allocation} takes nothing from it"
            for name, layer in self.layers.items()
            if zeros(program, name) <= zeros(self.original, name)
        }
        return self.reasons | untouched


def weight_sparsities(
    config: PruneConfig,
    pattern: SparsityPattern,
    scores: Mapping[str, Tensor],
    ratio: float,
    curves: Mapping[str, Curve] | None = None,
) -> dict[str, float]:
    """The fraction of each weight that goes when ``ratio`` of all of them go together.

    Args:
        config: allocation and criterion.
        pattern: what goes together.
        scores: of each weight, of its shape, by parameter name.
        ratio: 0 to 1.
        curves: errors at some sparsities of each weight, for an allocation that needs them.
    """
    if pattern.fixed:
        return dict.fromkeys(scores, ratio)
    return allocate(
        config.chosen_allocation,
        {name: pattern.units(score) for name, score in scores.items()},
        {name: tuple(score.shape) for name, score in scores.items()},
        ratio,
        costs=dict.fromkeys(scores, float(pattern.unit)),
        curves=curves,
        comparable=config.criterion_row.comparable,
        least_kept=LEAST_KEPT,
    )


def ratio_bounds(pattern: SparsityPattern, scores: Mapping[str, Tensor]) -> tuple[float, float]:
    """The smallest and largest ratio to remove: that which is gone already, and all but a few units."""
    units = [pattern.units(score) for score in scores.values()]
    total = sum(unit.numel() for unit in units)
    gone = sum(int(torch.isneginf(unit).sum()) for unit in units)
    return gone / total, max(gone, total - LEAST_KEPT * len(units)) / total


def zeros(program: Program, parameter: str) -> float:
    """The fraction of a parameter that is zero, to four places."""
    tensor = program.get_parameter(parameter)
    return round(1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel()), 4)
