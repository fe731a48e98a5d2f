"""Whole blocks that go: which may, in what order, and how many."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial

from torch import Tensor

from modelopt_cli.artifact.sparsity import compact
from modelopt_cli.methods.layer_selection import select_layers
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.config import AUTO
from modelopt_cli.methods.prune.family import Family, nothing, weighted_layers
from modelopt_cli.methods.prune.layers import Removal, by_output, by_weights
from modelopt_cli.methods.prune.sensitivity import Variant
from modelopt_cli.methods.prune.statistics import score_weights
from modelopt_cli.program import Program
from modelopt_cli.program.coverage import weight_tensors
from modelopt_cli.program.removable import Block, find_blocks, obstacles, without


class Layers(Family):
    """Structure ``layers``."""

    @cached_property
    def barred(self) -> frozenset[str]:
        """Layers whose blocks shall not go; fills in ``reasons`` for all that are in no block that may.

        Raises:
            NothingCompressed: there are none.
            UsageError: a glob matches no layer.
        """
        blocks = find_blocks(self.original)
        self.reasons = obstacles(self.original, blocks)
        inside = {layer for block in blocks for layer in block.layers}
        order = [name for name in weighted_layers(self.original) if name in inside]
        order += sorted(inside.difference(order))
        if not order:
            raise nothing(self.reasons)
        _, left_out = select_layers(order, self.config, weighted_layers(self.original))
        self.reasons |= left_out
        if all(left_out.keys() & set(block.layers) for block in blocks):
            raise nothing(left_out | self.reasons)
        return frozenset(left_out)

    def blocks(self, program: Program) -> tuple[Block, ...]:
        """Those of the blocks that may go which a Program still has."""
        # By their layers: a block's name may change once another one beside it is gone.
        return tuple(block for block in find_blocks(program) if not self.barred & set(block.layers))

    def prune(self, program: Program, left: float, final: bool) -> Program:
        """Remove blocks one after another until nearest to the target."""
        if not self.blocks(program):
            raise nothing(self.reasons)
        best, miss, gone = program, abs(self.left(program) - left), []
        for removal in self._order(program):
            gone.append(removal.block)
            candidate = self._without(program, gone)
            reached = self.left(candidate)
            if abs(reached - left) < miss:
                best, miss = candidate, abs(reached - left)
            if reached <= left:
                break
        return best

    def _without(self, program: Program, blocks: Iterable[Block]) -> Program:
        result = copy.deepcopy(without(program, blocks))
        result.encodings = compact(result)
        return result

    def _order(self, program: Program) -> Iterator[Removal]:
        blocks = self.blocks(program)
        if self.ranks_by_data:
            return by_output(program, blocks, self._batches, self.context.progress)
        criterion, samples = self.config.chosen_criterion, self.config.calibration_samples
        scores = score_weights(program, criterion, tuple(weights_of(program)), self.context, samples=samples)
        return by_weights(blocks, scores, total=self.config.criterion_row.additive)

    @property
    def ranks_by_data(self) -> bool:
        """The order is by the output where there are data to compare outputs on."""
        return self.config.criterion == AUTO and self.samples is not None

    def _batches(self) -> Iterator[Tensor]:
        assert self.samples is not None
        for images, _ in self.samples.batches(self.context.batch_size, workers=self.context.workers):
            yield images

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[Variant]:
        """The Program without one block at a time."""
        for block in self.blocks(program):
            yield Variant(block.name, block.layers, 1.0, partial(self._without, program, [block]))

    def units_left(self, program: Program) -> float:
        """The fraction of the blocks that may go and have not."""
        parameters, blocks = program.state_dict().keys(), self.blocks(self.original)
        return sum(not parameters.isdisjoint(block.parameters) for block in blocks) / len(blocks)

    def describe(self, program: Program) -> dict[str, object]:
        """The layers that are gone, and how many weights each had."""
        gone, layers = sorted(self._gone(program)), weighted_layers(self.original)
        weights = {name: weight_tensors(layers[name]).values() for name in gone if name in layers}
        counts = {name: sum(tensor.numel() for tensor in tensors) for name, tensors in weights.items()}
        return {"removed": gone, "removed_weights": counts}

    def _gone(self, program: Program) -> set[str]:
        parameters = program.state_dict().keys()
        blocks = self.blocks(self.original)
        gone = [block for block in blocks if parameters.isdisjoint(block.parameters)]
        return {layer for block in gone for layer in block.layers}

    def skipped(self, program: Program) -> dict[str, str]:
        """All layers that are still there."""
        why = "other blocks were enough to reach the target"
        return {name: self.reasons.get(name, why) for name in weighted_layers(program)}
