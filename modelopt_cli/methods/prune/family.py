"""What the three families of structures (weights, channels, layers) have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.errors import NothingCompressed
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import CRITERIA
from modelopt_cli.methods.prune.latency import Timer
from modelopt_cli.methods.prune.reestimate import reestimate
from modelopt_cli.methods.prune.sensitivity import Variant
from modelopt_cli.methods.prune.targets import Figures
from modelopt_cli.program import Program
from modelopt_cli.program.coverage import WEIGHTED_KINDS


class Family(ABC):
    """Prunes one Program, in one round or several, and measures what is left of it.

    Args:
        given: the Program to prune; it is not changed.
        config: what to do.
        context: calibration data, seed, progress.
        figures: counts what targets are made of.

    Attributes:
        original: the same network in the form that is pruned.
        reasons: why layers cannot be pruned or shall not be, by name, known before anything is pruned.
        notes: one line for each thing the user should know.
    """

    def __init__(self, given: Program, config: PruneConfig, context: Context, figures: Figures) -> None:
        self.given, self.original = given, self.prepared(given)
        self.config, self.context, self.figures = config, context, figures
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
    def left(self, program: Program) -> float:
        """The fraction of the original that is left of a Program, in the unit of the target."""

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

    @property
    def pattern(self) -> str | None:
        """Of the zeros of freshly pruned weights, as the codec ``sparse`` knows it."""
        return None

    @cached_property
    def full(self) -> float:
        """The figure of the original that the target is a fraction of."""
        return self.figures.of(self.config.target[0], self.given)

    @cached_property
    def timer(self) -> Timer:
        """Compares latencies with the original's."""
        return Timer(self.original, self.context.device, self.context.seed)

    def fraction(self, program: Program) -> float:
        """What is left of the original in flops, params, bytes or latency."""
        metric, _ = self.config.target
        if metric == "latency":
            return self.timer.fraction(program)
        return self.figures.pruned(metric, program) / self.full

    @cached_property
    def samples(self) -> Data | None:
        """Calibration samples, always the same."""
        data = self.context.data
        return None if data is None else data.sample(self.config.calibration_samples, self.context.seed)

    @property
    def calibration(self) -> Data | None:
        """The data that decide about the result besides those it is trained on, or None."""
        needed = CRITERIA[self.config.chosen_criterion].needs != "nothing"
        if self.ranks_by_data or needed or self.config.allocation == "sensitivity":
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


def nothing(reasons: Mapping[str, str]) -> NothingCompressed:
    """The error that says why nothing could be pruned."""
    name, why = next(iter(reasons.items()), ("", ""))
    what = f"no layer can be pruned ({name}: {why})" if name else "no layer can be pruned"
    return NothingCompressed(what, hint="nothing was written; see --include, --exclude and --structure")
