"""Models to evaluate: each with the file it came from, and what is known about both."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from modelopt_cli.data.targets import Targets
from modelopt_cli.measure.conditions import Obstacle
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.program.input_batch import Inputs
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.program import Program
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.settings import option

StageProgress = Callable[[str, int, int | None], None]
"""Called with the name of the stage, how much is done, and the total if it is known."""


class LabelledBatches(Protocol):
    """Batches of samples in a fixed order, such as ``modelopt_cli.data.Data``."""

    @property
    def name(self) -> str:
        """The data spec, or another name for messages."""

    @property
    def labelled(self) -> bool:
        """True if the labels mean anything."""

    def batches(
        self, batch_size: int, *, limit: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Inputs, Targets]]:
        """The network's inputs and their targets, in a fixed order."""

    def where(self, index: int) -> str:
        """Name of a sample for an error."""


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """One checkpoint or artifact, loaded.

    Attributes:
        path: as the user wrote it.
        model: the network, in evaluation mode; None for a bare state dict that no architecture fits,
            which is then measured by its size alone.
        program: the same network as a Program; None where it cannot be traced.
        file_bytes: length of the file.
        coverage: its layers and which are compressed; None where that is not known.
        input: shape of one sample; None where it is not known, and then nothing is run.
        tensor_bytes: bytes of tensors in the file; None lets :mod:`modelopt_cli.measure.size` find out.
        state: the tensors of a bare state dict.
        arch: name of the architecture on the command line, to load the file again.
        unknown: why there is no network, where the file names one that cannot be built.
        columns: for each of the baseline's classes, its place among this model's logits; None for the same.
    """

    path: str
    model: nn.Module | None
    program: Program | None
    file_bytes: int
    coverage: Coverage | None = None
    input: InputSpec | None = None
    tensor_bytes: int | None = None
    state: Mapping[str, Tensor] | None = None
    arch: str | None = None
    columns: tuple[int, ...] | None = None
    unknown: str | None = None

    @property
    def runs(self) -> bool:
        """True if the model can be called."""
        return self.obstacle is None

    @property
    def obstacle(self) -> Obstacle | None:
        """Reason why the model cannot be called, or None."""
        if self.model is None:
            return Obstacle(self.unknown or "nothing says its architecture", f"give {option('arch')}")
        if self.input is None:
            return Obstacle("nothing says what its input is", f"give {option('input_shape')}")
        return None


def is_quantized(model: nn.Module) -> bool:
    """True if any layer computes in int8."""
    return any(isinstance(module, Quantized) for module in model.modules())
