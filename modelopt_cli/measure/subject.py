"""What is measured: a model, the file it came from, and what is known about both."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from modelopt_cli.measure.conditions import Obstacle
from modelopt_cli.program.coverage import Coverage
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.program import Program
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.settings import option

StageProgress = Callable[[str, int, int | None], None]
"""Called with the name of the stage, how much is done, and the total if it is known."""


class LabelledBatches(Protocol):
    """The part of a data set that measuring needs; ``modelopt_cli.data.Data`` has it."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def labelled(self) -> bool:
        """Whether the labels mean anything."""

    def batches(
        self, batch_size: int, *, limit: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Float ``(N, *shape)`` and int64 ``(N,)``, in a fixed order."""

    def where(self, index: int) -> str:
        """Name of a sample for an error."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One checkpoint or artifact, loaded.

    Attributes:
        path: as the user wrote it.
        model: the network in evaluation form; None for a bare state dict that no architecture fits,
            which is then measured by its size alone.
        program: the same as a Program; None where the network cannot be traced.
        file_bytes: length of the file.
        coverage: which of its layers are compressed, or None where that is not known.
        input: shape of one sample; None where it is not known, and then nothing is run.
        tensor_bytes: bytes of tensors in the file; None lets :mod:`modelopt_cli.measure.size` find out.
        state: the tensors of a bare state dict.
        arch: what the architecture was called on the command line, to load the file once more.
        columns: where among its logits the classes are in the baseline's order; None for the same order.
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

    @property
    def runs(self) -> bool:
        """Whether the model can be called."""
        return self.obstacle is None

    @property
    def obstacle(self) -> Obstacle | None:
        """Why the model cannot be called, or None where it can."""
        if self.model is None:
            return Obstacle("nothing says its architecture", f"give {option('arch')}")
        if self.input is None:
            return Obstacle("nothing says what its input is", f"give {option('input_shape')}")
        return None


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer computes in int8."""
    return any(isinstance(module, Quantized) for module in model.modules())
