"""What a training would cost, for the verbs that train."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from modelopt_cli.measure.flops import count_macs
from modelopt_cli.measure.size import logical_parameters
from modelopt_cli.program.input_spec import InputType
from modelopt_cli.training import Forecast


@dataclass(frozen=True)
class Cost:
    """A network and what it costs, counted as in the table.

    Attributes:
        role: ``network``, ``teacher`` or ``student``.
        name: a file's name, or an architecture.
        parameters: logical ones, see ``measure.size``.
        flops: for one sample, see ``measure.flops``.
    """

    role: str
    name: str
    parameters: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """What a command would train, and how long that would take.

    Attributes:
        networks: teachers first.
        stages: its trainings, one after another.
        predicted_bytes: length of the file, but for a few digits in its history; None where that depends
            on what is learned.
        cache_bytes: that the teachers' answers would take on disk; None without a cache.
    """

    networks: Sequence[Cost]
    stages: Sequence[Forecast]
    predicted_bytes: int | None = None
    cache_bytes: int | None = None

    @property
    def epochs(self) -> int:
        """Of all trainings together."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def steps(self) -> int:
        """Of all trainings together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all trainings together; measuring the result and writing it come on top."""
        return sum(stage.seconds for stage in self.stages)


def cost_of(
    role: str, name: str, network: nn.Module, shape: tuple[int, ...], dtype: InputType = "float32"
) -> Cost:
    """What a network costs that takes samples of ``shape``."""
    parameters = sum(tensor.numel() for tensor in logical_parameters(network))
    return Cost(role, name, parameters, count_macs(network, shape, dtype).flops)
