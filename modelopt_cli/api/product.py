"""What a method made, ready to be written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt_cli import artifact
from modelopt_cli.checkpoint import Opened
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.coverage import Coverage, coverage


def about_tensors(opened: Opened) -> dict[str, Any]:
    """What a file of opened tensors says beside them: keyword arguments of ``artifact.write_tensors``."""
    about: dict[str, Any] = {"history": opened.tensors.history if opened.tensors is not None else ()}
    if (architecture := opened.architecture) is not None:
        about |= {"arch": architecture.spec, "input": architecture.input, "labels": architecture.labels}
    return about


@dataclass(frozen=True)
class Product:
    """A Program or a state dict with what its file should say, ready to be written.

    Attributes:
        coverage: what became of each layer.
        subject: the Program, or tensors by name.
        encodings: how tensors are stored, where there is no Program.
        about: history, architecture, input and labels, where there is no Program.
    """

    coverage: Coverage
    subject: Program | dict[str, Tensor]
    encodings: dict[str, Encoding]
    about: dict[str, Any]

    @classmethod
    def of_program(cls, program: Program) -> "Product":
        """A Program says everything itself."""
        return cls(coverage(program), program, {}, {})

    @classmethod
    def of_tensors(
        cls,
        opened: Opened,
        state: Mapping[str, Tensor],
        encodings: Mapping[str, Encoding],
        covered: Coverage,
        entry: dict[str, Any],
    ) -> "Product":
        """Tensors that were made of those of ``opened``; ``entry`` is added to its history."""
        about = about_tensors(opened)
        about["history"] = (*about["history"], entry)
        return cls(covered, dict(state), dict(encodings), about)

    def predicted_bytes(self) -> int:
        """Length of the file."""
        if isinstance(self.subject, Program):
            return artifact.predicted_bytes(self.subject)
        return artifact.predicted_bytes(self.subject, self.encodings, **self.about)

    def write(self, output: str | Path, force: bool) -> artifact.Written:
        """Write the file; raises as ``artifact.write_program``."""
        if isinstance(self.subject, Program):
            return artifact.write_program(self.subject, Path(output), force=force)
        return artifact.write_tensors(self.subject, self.encodings, Path(output), force=force, **self.about)
