"""Zeros in weights: scores, how many each layer gives, masks, and how the zeros are stored."""

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
from modelopt_cli.methods.prune.criteria import AUTO_CRITERION, weight_scores
from modelopt_cli.methods.prune.criterion_statistics import score_weights
from modelopt_cli.methods.prune.figures import nonzeros
from modelopt_cli.methods.prune.masks import Masks, weight_masks
from modelopt_cli.methods.prune.pruner import Pruner, nothing_to_prune
from modelopt_cli.methods.prune.sensitivity import STEEP, Variant, curves, measure
from modelopt_cli.methods.prune.structures import SparsityPattern
from modelopt_cli.methods.prune.targets import Nonzeros, search_ratio
from modelopt_cli.program import Program

LEAST_KEPT = 1
"""Units that a layer keeps at least: a layer of zeros alone would cut the network in two."""


class WeightPruner(Pruner):
    """Structures that leave zeros."""

    @cached_property
    def pattern(self) -> SparsityPattern:
        """Which zeros may be put where."""
        assert self.config.pattern is not None
        return self.config.pattern

    @cached_property
    def layers(self) -> dict[str, str]:
        """The parameters to prune, and what each is called in reports: its layer, mostly.

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
            why = self._obstacle(parameter)
            if why is None:
                chosen[parameter] = layer
            else:
                self.reasons[layer] = why
        if not chosen:
            raise nothing_to_prune(self.reasons)
        return chosen

    def _obstacle(self, parameter: str) -> str | None:
        criterion = self.config.criterion_row
        why = self.pattern.obstacle(self.original.get_parameter(parameter).shape)
        if why is None and criterion.watches_inputs:
            why = unseen_inputs(self.original, parameter)
        return why or criterion.obstacle(self.original, parameter, self.pattern)

    def prune(self, program: Program, left: float, final: bool) -> Program:
        """Zero the weights of the lowest scores, wherever the allocation finds them."""
        scores, pattern = self.scores(program), self._pattern_at(left)
        curves = self._curves(program)
        ratio = self._ratio(program, scores, pattern, left, curves)
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

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[Variant]:
        """The Program with one layer pruned at a time."""
        scores, pattern = self.scores(program), self.pattern
        if pattern.fixed:
            sparsities = (pattern.sparsity,)
        for name, layer in self.layers.items():
            for sparsity in sparsities:
                masks = weight_masks({name: scores[name]}, pattern, {name: sparsity})
                yield Variant(layer, (layer,), sparsity, partial(self.masked, program, masks))

    @property
    def reestimates(self) -> bool:
        """Training gives batch norms new statistics by itself, where zeros have moved them little."""
        return self.context.training is None and super().reestimates

    def ratios(self, program: Program, left: float) -> tuple[float, float]:
        """What is gone already and what should be in the end, of all weights that may go."""
        scores = self.scores(program)
        gone = sum(int(torch.isneginf(score).sum()) for score in scores.values())
        total = sum(score.numel() for score in scores.values())
        return gone / total, self._ratio(program, scores, self.pattern, left, None)

    def choose(self, network: nn.Module, ratio: float) -> dict[str, Tensor]:
        """Masks by the weights that a network in training has now; zeros of earlier pruning stay."""
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

    def _pattern_at(self, left: float) -> SparsityPattern:
        """The pattern of a round: more of M stay in the early ones."""
        pattern = self.pattern
        return (
            replace(pattern, keep=max(pattern.keep, round(left * pattern.group)))
            if pattern.fixed
            else pattern
        )

    def sparsities(
        self, scores: Mapping[str, Tensor], ratio: float, curves: Mapping[str, Curve] | None
    ) -> dict[str, float]:
        """How much of each weight goes when ``ratio`` of all of them go together."""
        if self.pattern.fixed:
            return dict.fromkeys(scores, ratio)
        units = {name: self.pattern.units(score) for name, score in scores.items()}
        return allocate(
            self.config.chosen_allocation,
            units,
            {name: tuple(score.shape) for name, score in scores.items()},
            ratio,
            costs=dict.fromkeys(scores, float(self.pattern.unit)),
            curves=curves,
            comparable=self.config.criterion_row.comparable,
            least_kept=LEAST_KEPT,
        )

    def _ratio(
        self,
        program: Program,
        scores: Mapping[str, Tensor],
        pattern: SparsityPattern,
        left: float,
        curves: Mapping[str, Curve] | None,
    ) -> float:
        if pattern.fixed:
            return pattern.sparsity
        units = {name: pattern.units(score) for name, score in scores.items()}
        total = sum(unit.numel() for unit in units.values())
        gone = sum(int(torch.isneginf(unit).sum()) for unit in units.values())
        most = sum(unit.numel() - LEAST_KEPT for unit in units.values())
        counted = self.config.target_row.counted
        weights = {name: program.get_parameter(name) for name in scores}
        others = int(nonzeros(program)) - sum(int(torch.count_nonzero(w)) for w in weights.values())
        size, original = sum(w.numel() for w in weights.values()), int(nonzeros(self.given))

        def left_at(ratio: float) -> float:
            masks = weight_masks(scores, pattern, self.sparsities(scores, ratio, curves))
            if counted is None:
                return self.left(self.masked(program, masks))
            kept = sum(int(((weights[name] != 0) & mask).sum()) for name, mask in masks.items())
            return counted(Nonzeros(kept, size, others, original))

        return search_ratio(left_at, left, 1 - left, gone / total, max(gone, most) / total)

    def count_parameters(self, program: Program) -> float:
        """Zeros do not count."""
        return nonzeros(program)

    def units_left(self, program: Program) -> float:
        """The nonzeros among the weights that were to be pruned, as a fraction of those weights."""
        weights = [program.get_parameter(name) for name in self.layers]
        return sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)

    def untouched(self, program: Program) -> bool:
        """Whether there are no more zeros than there were."""
        return all(zeros(program, name) <= zeros(self.original, name) for name in self.layers)

    def describe(self, program: Program) -> dict[str, object]:
        """The sparsity of every layer."""
        return {"sparsity": {self.layers[name]: zeros(program, name) for name in self.layers}}

    def skipped(self, program: Program) -> dict[str, str]:
        """Layers left out, and those that the allocation left as they were."""
        whole = {
            layer: f"allocation {self.config.chosen_allocation} takes nothing from it"
            for name, layer in self.layers.items()
            if zeros(program, name) <= zeros(self.original, name)
        }
        return self.reasons | whole


def zeros(program: Program, parameter: str) -> float:
    """The fraction of a parameter that is zero, to four places."""
    tensor = program.get_parameter(parameter)
    return round(1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel()), 4)
