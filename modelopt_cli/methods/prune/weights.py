"""Zeros in weights: scores, how many each layer gives, masks, and how the zeros are stored."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from modelopt_cli.artifact.sparsity import compact
from modelopt_cli.methods.layer_selection import select_layers, weight_labels
from modelopt_cli.methods.matrices import unseen_inputs, weights_of
from modelopt_cli.methods.prune.allocation import Curve, allocate
from modelopt_cli.methods.prune.criteria import CRITERIA, held, weight_scores
from modelopt_cli.methods.prune.family import Family, nothing
from modelopt_cli.methods.prune.masks import Masks, Structure, weight_masks
from modelopt_cli.methods.prune.obs import obs_obstacle, obs_prune
from modelopt_cli.methods.prune.sensitivity import STEEP, Variant, curves, measure
from modelopt_cli.methods.prune.statistics import Statistics, collect
from modelopt_cli.methods.prune.targets import nonzeros, search_ratio
from modelopt_cli.program import Program

LEAST_KEPT = 1
"""Units that a layer keeps at least: a layer of zeros alone would cut the network in two."""


class Weights(Family):
    """Structures ``unstructured``, ``N:M`` and ``block``."""

    @cached_property
    def structure(self) -> Structure:
        """Which zeros may be put where."""
        return Structure.of(self.config)

    @cached_property
    def layers(self) -> dict[str, str]:
        """The parameters to prune, and what each is called in reports: its layer, mostly.

        Raises:
            NothingCompressed: there are none.
            UsageError: a glob matches no layer.
        """
        names = weight_labels(weights_of(self.original))
        if not names:
            raise nothing({})
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
            raise nothing(self.reasons)
        return chosen

    def _obstacle(self, parameter: str) -> str | None:
        why = self.structure.obstacle(self.original.get_parameter(parameter).shape)
        criterion = self.config.chosen_criterion
        if why is None and criterion == "obs":
            return obs_obstacle(self.original, parameter, self.structure)
        if why is None and CRITERIA[criterion].needs == "inputs":
            return unseen_inputs(self.original, parameter)
        return why

    @property
    def pattern(self) -> str | None:
        """``N:M`` or ``block:B``."""
        if self.structure.kind == "N:M":
            return self.config.structure
        return f"block:{self.config.block}" if self.structure.kind == "block" else None

    def prune(self, program: Program, left: float, final: bool) -> Program:
        """Zero the weights of the lowest scores, wherever the allocation finds them."""
        scores, structure = self.scores(program), self._structure_at(left)
        curves = self._curves(program)
        ratio = self._ratio(program, scores, structure, left, curves)
        sparsities = self.sparsities(scores, ratio, curves)
        if self.config.chosen_criterion != "obs":
            return self.masked(program, weight_masks(scores, structure, sparsities))
        samples = self.config.calibration_samples
        pruned = obs_prune(program, structure, sparsities, self.context, samples=samples)
        return self.masked(pruned.program, pruned.masks)

    def scores(self, program: Program) -> dict[str, Tensor]:
        """The importance of every weight that may go."""
        criterion, parameters = self.config.chosen_criterion, tuple(self.layers)
        if criterion == "obs" and self.config.chosen_allocation not in ("global", "lamp"):
            criterion = "l2"  # obs chooses within the layers; no other allocation asks for scores
        samples = self.config.calibration_samples
        statistics = collect(program, criterion, parameters, self.context, samples=samples)
        return weight_scores(program, criterion, statistics, parameters, seed=self.context.seed)

    def _curves(self, program: Program) -> dict[str, Curve] | None:
        if self.config.chosen_allocation != "sensitivity":
            return None
        known = curves(measure(self, program, STEEP))
        return {name: known[layer] for name, layer in self.layers.items()}

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[Variant]:
        """The Program with one layer pruned at a time."""
        scores, structure = self.scores(program), self.structure
        if structure.kind == "N:M":
            sparsities = (1 - structure.keep / structure.group,)
        for name, layer in self.layers.items():
            for sparsity in sparsities:
                masks = weight_masks({name: scores[name]}, structure, {name: sparsity})
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
        return gone / total, self._ratio(program, scores, self.structure, left, None)

    def choose(self, network: nn.Module, ratio: float) -> dict[str, Tensor]:
        """Masks by the weights that a network in training has now; zeros of earlier pruning stay."""
        score = CRITERIA[self.config.chosen_criterion].score
        assert score is not None
        weights = {name: network.get_parameter(name).detach().cpu() for name in self.layers}
        scores = {name: score(name, w, Statistics(), self.context.seed) for name, w in weights.items()}
        scores = held(scores, self._promised)
        return weight_masks(scores, self.structure, self.sparsities(scores, ratio, None))

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
        result.encodings = compact(result, pruned, self.pattern)
        return result

    def _structure_at(self, left: float) -> Structure:
        """The pattern of a round: more of M stay in the early ones."""
        if self.structure.kind != "N:M":
            return self.structure
        group = self.structure.group
        keep = max(self.structure.keep, round(left * group))
        return Structure("N:M", group, keep)

    def sparsities(
        self, scores: Mapping[str, Tensor], ratio: float, curves: Mapping[str, Curve] | None
    ) -> dict[str, float]:
        """How much of each weight goes when ``ratio`` of all of them go together."""
        if self.structure.kind == "N:M":
            return dict.fromkeys(scores, ratio)
        units = {name: self.structure.units(score) for name, score in scores.items()}
        return allocate(
            self.config.chosen_allocation,
            units,
            {name: tuple(score.shape) for name, score in scores.items()},
            ratio,
            costs=dict.fromkeys(scores, float(self.structure.group)),
            curves=curves,
            comparable=CRITERIA[self.config.chosen_criterion].comparable,
            least_kept=LEAST_KEPT,
        )

    def _ratio(
        self,
        program: Program,
        scores: Mapping[str, Tensor],
        structure: Structure,
        left: float,
        curves: Mapping[str, Curve] | None,
    ) -> float:
        if structure.kind == "N:M":
            return 1 - structure.keep / structure.group
        units = {name: structure.units(score) for name, score in scores.items()}
        total = sum(unit.numel() for unit in units.values())
        gone = sum(int(torch.isneginf(unit).sum()) for unit in units.values())
        most = sum(unit.numel() - LEAST_KEPT for unit in units.values())
        metric, _ = self.config.target

        def left_at(ratio: float) -> float:
            masks = weight_masks(scores, structure, self.sparsities(scores, ratio, curves))
            if metric == "bytes":
                return self.left(self.masked(program, masks))
            return self._counted(program, masks)

        return search_ratio(left_at, left, 1 - left, gone / total, max(gone, most) / total)

    def _counted(self, program: Program, masks: Mapping[str, Tensor]) -> float:
        """What is left, of a sparsity or of the parameters, without making the Program."""
        weights = {name: program.get_parameter(name) for name in masks}
        kept = sum(int(((weights[name] != 0) & mask).sum()) for name, mask in masks.items())
        if self.config.target[0] == "sparsity":
            return kept / sum(mask.numel() for mask in masks.values())
        before = sum(int(torch.count_nonzero(weight)) for weight in weights.values())
        return (nonzeros(program) - before + kept) / self.full

    def left(self, program: Program) -> float:
        """Of a sparsity: the nonzeros among the weights that were to be pruned."""
        if self.config.target[0] != "sparsity":
            return self.fraction(program)
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
            if zeros(program, name) == 0
        }
        return self.reasons | whole


def zeros(program: Program, parameter: str) -> float:
    """The fraction of a parameter that is zero, to four places."""
    tensor = program.get_parameter(parameter)
    return round(1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel()), 4)
