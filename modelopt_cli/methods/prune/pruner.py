"""What the three families of structures (weights, channels, layers) have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.data import Data
from modelopt_cli.errors import NothingCompressed
from modelopt_cli.methods.context import Context, Reached
from modelopt_cli.methods.prune.batch_norms import reestimate
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.figures import Timer, parameters
from modelopt_cli.methods.prune.sensitivity import Variant
from modelopt_cli.methods.prune.targets import DRAFT
from modelopt_cli.program import Program
from modelopt_cli.program.coverage import coverage, recorded
from modelopt_cli.program.weighted import WEIGHTED_KINDS


class Pruner(ABC):
    """Prunes one Program, in one round or several, and measures what is left of it.

    Args:
        given: the Program to prune; it is not changed.
        config: what to do.
        context: calibration data, seed, progress.

    Attributes:
        original: the same network in the form that is pruned.
        reasons: why layers cannot be pruned or shall not be, by name, known before anything is pruned.
        notes: one line for each thing the user should know.
    """

    def __init__(self, given: Program, config: PruneConfig, context: Context) -> None:
        self.given, self.original = given, self.prepared(given)
        self.config, self.context = config, context
        self.reasons: dict[str, str] = {}
        self.notes: list[str] = []

    @staticmethod
    def prepared(program: Program) -> Program:
        """The form of a network that is pruned."""
        return program

    @abstractmethod
    def prune(self, program: Program, left: float, final: bool) -> Program:
        """A Program of which ``left`` of the original is left, or as near to it as can be.

        Args:
            program: the original, or what an earlier round made of it; it is not changed.
            left: fraction, 1 for the original.
            final: whether this is the last round, which has to reach its target.

        Raises:
            NothingCompressed: nothing can be pruned.
        """

    @abstractmethod
    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[Variant]:
        """The Program with one part of it pruned at a time, at rising sparsities."""

    @abstractmethod
    def units_left(self, program: Program) -> float:
        """The fraction that a Program has left of the original's weights, channels or blocks that may go."""

    @abstractmethod
    def describe(self, program: Program) -> dict[str, object]:
        """What the history entry says of a result: deterministic and JSON-able."""

    @abstractmethod
    def skipped(self, program: Program) -> dict[str, str]:
        """Every weight-carrying layer that a result has whole, and why."""

    def settled(self, program: Program) -> Program:
        """The Program after pruning, as it goes into training or out of the command."""
        return self.reestimated(program)

    def untouched(self, program: Program) -> bool:
        """Whether nothing was removed."""
        return self.skipped(program).keys() >= weighted_layers(self.original).keys()

    def closing_notes(self, program: Program) -> list[str]:
        """What the user should know of a result."""
        return []

    def left(self, program: Program) -> float:
        """The fraction of the original that is left of a Program, in the unit of the target."""
        return self.config.target_row.left(self, program)

    def count_parameters(self, program: Program) -> float:
        """The parameters of a network that the target ``params`` is a fraction of."""
        return parameters(program)

    def share_of(self, figure: Callable[[Program], float], program: Program) -> float:
        """A figure of a Program as a fraction of the original's."""
        if figure not in self._figures:
            self._figures[figure] = figure(self.given)
        return figure(program) / self._figures[figure]

    @cached_property
    def _figures(self) -> dict[Callable[[Program], float], float]:
        return {}

    def file_share(self, program: Program) -> float:
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
        return predicted_bytes(self.given)

    @cached_property
    def timer(self) -> Timer:
        """Compares latencies with the original's."""
        return Timer(self.original, self.context.device, self.context.seed)

    def entry(self, program: Program, target: Reached) -> dict[str, Any]:
        """What the history says: nothing that would differ from one run to the next."""
        config, context = self.config, self.context
        figures: dict[str, Any] = {"metric": target.metric, "wanted": target.wanted}
        if not config.target_row.measured:
            figures["reached"] = round(target.reached, 4)
        entry = {
            "method": "prune",
            "config": config.as_dict(),
            "criterion": config.chosen_criterion,
            "allocation": config.chosen_allocation,
            "seed": context.seed,
            "torch": str(torch.__version__),
            "target": figures,
            "skipped": self.skipped(program),
            **self.describe(program),
            **context.origin,
        }
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
        """The data that decide about the result besides those it is trained on, or None."""
        if self.ranks_by_data or self.config.chosen_by_data:
            return self.samples
        return self._norm_data if self.reestimates else None

    @property
    def ranks_by_data(self) -> bool:
        """Whether calibration data decide what goes although the criterion needs none."""
        return False

    @property
    def reestimates(self) -> bool:
        """Whether batch norms get new statistics."""
        return self.config.reestimate and _has_statistics(self.original)

    @cached_property
    def _norm_data(self) -> Data | None:
        if self.samples is not None or self.context.training is None:
            return self.samples
        return self.context.training.train.sample(self.config.calibration_samples, self.context.seed)

    def reestimated(self, program: Program) -> Program:
        """The Program with batch-norm statistics of what is left of it, if that is wanted and possible."""
        data = self._norm_data
        if not self.reestimates:
            return program
        if data is None:
            self.note("without data the batch norms keep the statistics of the network before pruning")
            return program
        batches = (
            images for images, _ in data.batches(self.context.batch_size, workers=self.context.workers)
        )
        return reestimate(program, batches, self.context.progress, data.size)

    def note(self, line: str) -> None:
        """Add to the notes, once."""
        if line not in self.notes:
            self.notes.append(line)


def _has_statistics(program: Program) -> bool:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(m, norms) and m.running_mean is not None for m in program.modules())


def weighted_layers(program: Program) -> dict[str, nn.Module]:
    """Every weight-carrying layer by name, in graph order."""
    found: dict[str, nn.Module] = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and str(node.target) not in found:
            module = program.get_submodule(str(node.target))
            if isinstance(module, WEIGHTED_KINDS):
                found[str(node.target)] = module
    return found


def shares(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> dict[str, float]:
    """The fraction of its weights that every layer still has, to four places; layers that are gone have 0."""
    return {
        name: round(_size(after[name].parameters()) / _size(layer.parameters()), 4) if name in after else 0.0
        for name, layer in before.items()
    }


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def nothing_to_prune(reasons: Mapping[str, str]) -> NothingCompressed:
    """The error that says why nothing could be pruned."""
    name, why = next(iter(reasons.items()), ("", ""))
    what = f"no layer can be pruned ({name}: {why})" if name else "no layer can be pruned"
    return NothingCompressed(what, hint="nothing was written; see --include, --exclude and --structure")
