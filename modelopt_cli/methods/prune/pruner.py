"""Base of the pruners: one Program is pruned, in one round or several, and its figures are compared.

Each granularity (weights, channels, layers) has a pruner of its own, which says what may go and removes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.data import Data
from modelopt_cli.errors import NothingCompressed
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_status import recorded
from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context, Reached
from modelopt_cli.methods.layer_selection import nothing_done
from modelopt_cli.methods.prune.batch_norms import has_statistics, recalibrate
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.figures import Timer, parameters
from modelopt_cli.methods.prune.target_figures import DRAFT
from modelopt_cli.program import Program
from modelopt_cli.program.history import history_entry
from modelopt_cli.program.weighted import WEIGHTED_KINDS, fetched_weights, weight_label


@dataclass(frozen=True)
class PrunedVariant:
    """A network with one part of it pruned.

    Attributes:
        name: of the part: a layer, a group of channels, a block.
        layers: the layers that the part consists of.
        sparsity: the fraction of the part that is removed, 0 to 1.
        make: makes the network.
    """

    name: str
    layers: tuple[str, ...]
    sparsity: float
    make: Callable[[], Program]


class Pruner(ABC):
    """Pruner of one Program.

    Args:
        source: the Program to prune; it is not changed.
        config: the settings.
        context: calibration data, seed, device, progress.

    Attributes:
        original: the same network in the form that is pruned.
        reasons: reason why a layer cannot or shall not be pruned, by name; known before anything is pruned.
        notes: one line for each thing the user should know.
    """

    def __init__(self, source: Program, config: PruneConfig, context: Context) -> None:
        self.source, self.original = source, self.prepared(source)
        self.config, self.context = config, context
        self.reasons: dict[str, str] = {}
        self.notes: list[str] = []
        self._figures: dict[Callable[[Program], float], float] = {}

    @staticmethod
    def prepared(program: Program) -> Program:
        """The form of a network that is pruned."""
        return program

    @abstractmethod
    def prune(self, program: Program, kept: float, final: bool) -> Program:
        """A Program that keeps a fraction of the original, or the nearest that can be reached.

        Args:
            program: the original, or the result of an earlier round; it is not changed.
            kept: the fraction to keep, in the unit of the target; 1 for the original.
            final: True for the last round, which has to reach its target.

        Raises:
            NothingCompressed: nothing can be pruned.
        """

    @abstractmethod
    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[PrunedVariant]:
        """The Program with one part of it pruned at a time, at rising sparsities."""

    @abstractmethod
    def units_kept(self, program: Program) -> float:
        """The fraction of the original's weights, channels or blocks that may go and are still there."""

    @abstractmethod
    def describe(self, program: Program) -> dict[str, object]:
        """The part of the history entry that describes a result: deterministic and JSON-able."""

    @abstractmethod
    def skipped(self, program: Program) -> dict[str, str]:
        """The reason for every weight-carrying layer that a result has unpruned, by name."""

    def unchanged(self, program: Program) -> bool:
        """True if nothing was removed."""
        return self.skipped(program).keys() >= weighted_layers(self.original).keys()

    def closing_notes(self, program: Program) -> list[str]:
        """Notes on a result."""
        return []

    def kept_fraction(self, program: Program) -> float:
        """The fraction of the original that a Program keeps, in the unit of the target."""
        return self.config.target_row.kept_fraction(self, program)

    def count_parameters(self, program: Program) -> float:
        """The parameters of a network that the target ``params`` is a fraction of."""
        return parameters(program)

    def ratio_of(self, figure: Callable[[Program], float], program: Program) -> float:
        """A figure of a Program as a fraction of the original's."""
        if figure not in self._figures:
            self._figures[figure] = figure(self.source)
        return figure(program) / self._figures[figure]

    def file_ratio(self, program: Program) -> float:
        """Bytes of the file that a Program would be written to, its history included, over the original's."""
        before = program.history
        program.history = (*before, self.entry(program, Reached(*self.config.target, DRAFT)))
        try:
            return predicted_bytes(program, code=self.context.code) / self.original_bytes
        finally:
            program.history = before

    @cached_property
    def original_bytes(self) -> int:
        """Length of the file that the original would be written to as a plain artifact."""
        return predicted_bytes(self.source)

    @cached_property
    def timer(self) -> Timer:
        """Timer that compares latencies with the original's."""
        return Timer(self.original, self.context.device, self.context.seed)

    def entry(self, program: Program, target: Reached) -> dict[str, Any]:
        """The history entry of a result; nothing in it differs from one run to the next."""
        config, context = self.config, self.context
        figures: dict[str, Any] = {"metric": target.metric, "wanted": target.wanted}
        if not config.target_row.measured:
            figures["reached"] = round(target.reached, 4)
        entry = history_entry(
            config.method,
            config.as_dict(),
            seed=context.seed,
            origin=context.origin,
            skipped=self.skipped(program),
            criterion=config.chosen_criterion,
            allocation=config.chosen_allocation,
            target=figures,
        )
        entry |= self.describe(program)
        if (calibration := self.calibration) is not None:
            entry["calibration"] = calibration.name
        if context.training is not None:
            entry["training"] = {"data": context.training.train.name, **context.training.config.as_dict()}
        return entry | recorded(coverage(program, (*self.original.history, entry), given=self.original))

    @cached_property
    def samples(self) -> Data | None:
        """Calibration samples, always the same."""
        data = self.context.data
        return None if data is None else data.sample(self.config.calibration_samples, self.context.seed)

    @property
    def calibration(self) -> Data | None:
        """The data that decide about the result apart from those it is trained on, or None."""
        if self.ranks_by_data or self.config.chosen_by_data:
            return self.samples
        return self._norm_data if self.recalibrates else None

    @property
    def ranks_by_data(self) -> bool:
        """True if calibration data decide what goes although the criterion needs none."""
        return False

    @property
    def recalibrates(self) -> bool:
        """True if batch norms get new statistics."""
        return self.config.bn_recalibration and has_statistics(self.original)

    @cached_property
    def _norm_data(self) -> Data | None:
        if self.samples is not None or self.context.training is None:
            return self.samples
        return self.context.training.train.sample(self.config.calibration_samples, self.context.seed)

    def recalibrated(self, program: Program) -> Program:
        """The Program with batch-norm statistics of its own, if that is wanted and there are data."""
        data = self._norm_data
        if not self.recalibrates:
            return program
        if data is None:
            self.note("without data the batch norms keep the statistics of the network before pruning")
            return program
        batches = input_batches(data, self.context)
        return recalibrate(program, batches, self.context.progress, data.size)

    def note(self, line: str) -> None:
        """Add to the notes, once."""
        if line not in self.notes:
            self.notes.append(line)


def weighted_layers(program: Program) -> dict[str, nn.Module]:
    """Every weight-carrying layer by name, in graph order."""
    layers: dict[str, nn.Module] = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and str(node.target) not in layers:
            module = program.get_submodule(str(node.target))
            if isinstance(module, WEIGHTED_KINDS):
                layers[str(node.target)] = module
    return layers


def kept_weights(before: Program, after: Program) -> dict[str, float]:
    """The fraction of its values that every layer keeps, to four places; 0 for one that is removed.

    So do weights that a function of the graph fetches, by their names in reports.
    """
    left = _sizes(after)
    return {name: round(left.get(name, 0) / size, 4) for name, size in _sizes(before).items()}


def _sizes(program: Program) -> dict[str, int]:
    fetched = {weight_label(name): tensor.numel() for name, tensor in fetched_weights(program).items()}
    layers = weighted_layers(program).items()
    return fetched | {name: sum(tensor.numel() for tensor in layer.parameters()) for name, layer in layers}


PRUNE_FIRST = "prune first, then quantize or share: they keep what pruning did"
"""Hint for a network that is quantized or shared."""


def nothing_to_prune(reasons: Mapping[str, str]) -> NothingCompressed:
    """The error for a network without a layer that can be pruned, with the first layer's reason."""
    return nothing_done("pruned", reasons, "structure")
