"""Removal of blocks of layers: which may go, in what order, and how many.

With calibration data they go by the change of the output: every block that remains is bypassed in turn, and
the one goes without which the output stays closest to the original network's; then again. Removing the
layers that contribute least is from Chen and Zhao, Shallowing Deep Networks, TPAMI 2019; the greedy search
with scores computed again after each removal is that of Zhong et al., BlockPruner, Findings of ACL 2025; Men
et al., ShortGPT, 2024, and Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, ICLR 2025,
show how far it goes. Without data they go by the scores of their weights (Elkerdawy et al., To Filter Prune,
or to Layer Prune, That Is the Question, ACCV 2020).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from modelopt_cli.artifact.encodings import compact
from modelopt_cli.errors import DataError
from modelopt_cli.methods.batches import Comparable, comparable, input_batches, require_finite
from modelopt_cli.methods.layer_selection import select_layers
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.config import AUTO
from modelopt_cli.methods.prune.criterion_statistics import score_weights
from modelopt_cli.methods.prune.pruner import PrunedVariant, Pruner, nothing_to_prune, weighted_layers
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, call, to
from modelopt_cli.program.removable import Block, find_blocks, obstacles, without
from modelopt_cli.program.weighted import weight_tensors
from modelopt_cli.tasks import CLASSIFY, TaskSpec

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Removal:
    """One step of the removal order.

    Attributes:
        block: the block that goes.
        score: its cost in the unit of the criterion; for the change of the output, in nats per sample
            between the original network and the one without this and all earlier blocks.
    """

    block: Block
    score: float


class LayerPruner(Pruner):
    """Pruner of residual blocks, and of layers that keep the shape of their input."""

    @cached_property
    def protected(self) -> frozenset[str]:
        """Layers whose blocks must stay; fills in ``reasons`` for all layers that are in no removable block.

        Raises:
            NothingCompressed: no block may go.
            UsageError: a glob matches no layer.
        """
        blocks = find_blocks(self.original)
        self.reasons = obstacles(self.original, blocks)
        inside = {layer for block in blocks for layer in block.layers}
        order = [name for name in weighted_layers(self.original) if name in inside]
        order += sorted(inside.difference(order))
        if not order:
            raise nothing_to_prune(self.reasons)
        _, left_out = select_layers(order, self.config, weighted_layers(self.original))
        self.reasons |= left_out
        if all(left_out.keys() & set(block.layers) for block in blocks):
            raise nothing_to_prune(left_out | self.reasons)
        return frozenset(left_out)

    def blocks(self, program: Program) -> tuple[Block, ...]:
        """The blocks of a Program that may go."""
        protected = self.protected  # first: it says why there is none
        # Identified by their layers: a block's name may change once its neighbour is removed.
        return tuple(block for block in find_blocks(program) if not protected & set(block.layers))

    def prune(self, program: Program, kept: float, final: bool) -> Program:
        """Remove blocks one after another until nearest to the target."""
        if not self.blocks(program):
            raise nothing_to_prune(self.reasons)
        best, miss, removed = program, abs(self.kept_fraction(program) - kept), []
        for removal in self._order(program):
            removed.append(removal.block)
            candidate = self._without(program, removed)
            remaining = self.kept_fraction(candidate)
            if abs(remaining - kept) < miss:
                best, miss = candidate, abs(remaining - kept)
            if remaining <= kept:
                break
        return best

    def _without(self, program: Program, blocks: Iterable[Block]) -> Program:
        result = copy.deepcopy(without(program, blocks))
        result.encodings = compact(result)
        return result

    def _order(self, program: Program) -> Iterator[Removal]:
        blocks = self.blocks(program)
        if self.ranks_by_data:
            return by_output(program, blocks, self._batches, self.context.progress, self.context.task)
        criterion, samples = self.config.chosen_criterion, self.config.calibration_samples
        scores = score_weights(program, criterion, tuple(weights_of(program)), self.context, samples=samples)
        return by_weights(blocks, scores, total=self.config.criterion_row.additive)

    @property
    def ranks_by_data(self) -> bool:
        """True if the blocks go by the change of the output: no criterion was named, and there are data."""
        return self.config.criterion == AUTO and self.samples is not None

    def _batches(self) -> Iterator[Inputs]:
        assert self.samples is not None
        return input_batches(self.samples, self.context)

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[PrunedVariant]:
        """The Program without one block at a time."""
        for block in self.blocks(program):
            yield PrunedVariant(block.name, block.layers, 1.0, partial(self._without, program, [block]))

    def units_kept(self, program: Program) -> float:
        """The fraction of the removable blocks that a Program still has."""
        parameters, blocks = program.state_dict().keys(), self.blocks(self.original)
        return sum(not parameters.isdisjoint(block.parameters) for block in blocks) / len(blocks)

    def describe(self, program: Program) -> dict[str, object]:
        """The layers that were removed, and how many weights each had."""
        removed, layers = sorted(self._removed(program)), weighted_layers(self.original)
        weights = {name: weight_tensors(layers[name]).values() for name in removed if name in layers}
        counts = {name: sum(tensor.numel() for tensor in tensors) for name, tensors in weights.items()}
        return {"removed": removed, "removed_weights": counts}

    def _removed(self, program: Program) -> set[str]:
        parameters = program.state_dict().keys()
        blocks = self.blocks(self.original)
        removed = [block for block in blocks if parameters.isdisjoint(block.parameters)]
        return {layer for block in removed for layer in block.layers}

    def skipped(self, program: Program) -> dict[str, str]:
        """All layers that a Program still has, each with the reason."""
        reason = "other blocks were enough to reach the target"
        return {name: self.reasons.get(name, reason) for name in weighted_layers(program)}


def by_output(
    program: Program,
    blocks: Sequence[Block],
    batches: Callable[[], Iterable[Inputs]],
    progress: Progress | None = None,
    task: TaskSpec = CLASSIFY,
) -> Iterator[Removal]:
    """All blocks in greedy order of how little the output changes; each step is computed when asked for.

    The change is the Kullback-Leibler divergence of the softmax from the original network's, mean over the
    samples, pixels or tokens; of outputs that are no such logits the squared error relative to the output.
    Of blocks that cost the same the first in the network goes.

    Args:
        program: the original network, on any device; it is not changed.
        blocks: some of the result of ``find_blocks`` for it.
        batches: opens the calibration samples, always the same; read once for each step.
        progress: called with the number of samples done in this step, and None.
        task: says which output counts, and whether it is logits.

    Raises:
        DataError: no samples, or the network is not finite on them.
    """
    removed: list[Block] = []
    while remaining := [block for block in blocks if not _is_removed(block, removed)]:
        scores = _changes(program, [[*removed, block] for block in remaining], batches, progress, task)
        best = min(range(len(remaining)), key=scores.__getitem__)
        removed.append(remaining[best])
        yield Removal(remaining[best], scores[best])


def by_weights(
    blocks: Sequence[Block], scores: Mapping[str, Tensor], *, total: bool = False
) -> Iterator[Removal]:
    """All blocks in rising order of the mean score of their weights; of equals the first in the network.

    Args:
        blocks: the result of ``find_blocks``.
        scores: of single weights, of their shape, by parameter name; other parameters do not count.
        total: take the sum instead of the mean, for scores that are costs of removing a weight.
    """
    removals: list[Removal] = []
    for block in blocks:
        own = [scores[name].double() for name in block.parameters if name in scores]
        count = 1 if total else sum(tensor.numel() for tensor in own)
        removals.append(Removal(block, sum(float(tensor.sum()) for tensor in own) / max(count, 1)))
    removed: list[Block] = []
    for removal in sorted(removals, key=lambda removal: removal.score):
        if not _is_removed(removal.block, removed):
            removed.append(removal.block)
            yield removal


def _is_removed(block: Block, removed: Iterable[Block]) -> bool:
    """True for a block that has been removed, by itself or inside of another."""
    return any(set(block.layers) <= set(other.layers) for other in removed)


def _changes(
    program: Program,
    removed: Sequence[Sequence[Block]],
    batches: Callable[[], Iterable[Inputs]],
    progress: Progress | None,
    task: TaskSpec,
) -> list[float]:
    """The change of the output for each set of blocks that is bypassed."""
    original, *candidates = [without(program, blocks).eval() for blocks in ([], *removed)]
    device = str(next(program.parameters()).device)
    sums, done = [0.0] * len(candidates), 0
    with torch.inference_mode():
        for batch in batches():
            inputs = to(batch, device)
            expected = comparable(call(original, inputs), batch, task)
            for part in expected.parts:
                require_finite(part)
            for i, candidate in enumerate(candidates):
                sums[i] += _change(comparable(call(candidate, inputs), batch, task), expected)
            done += batch_size(batch)
            if progress is not None:
                progress(done, None)
    if done == 0:
        raise DataError("no samples to measure blocks on", hint="give data with at least one sample")
    # A candidate that gives NaN goes last.
    return [float("inf") if math.isnan(total) else total / done for total in sums]


def _change(actual: Comparable, expected: Comparable) -> float:
    """Sum over a batch of the divergence of the softmax, or of the relative squared error."""
    measure = _divergence if expected.are_logits else _relative_error
    pairs = zip(actual.parts, expected.parts, strict=True)
    return sum(float(measure(part.double(), reference.double())) for part, reference in pairs)


def _divergence(actual: Tensor, expected: Tensor) -> Tensor:
    actual, expected = actual.log_softmax(1), expected.log_softmax(1)
    return (expected.exp() * (expected - actual)).sum()


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    return ((actual - expected).square().sum(1) / expected.square().sum(1).clamp_min(1e-12)).sum()
