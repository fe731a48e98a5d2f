"""What a method made, ready to be written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt_cli import artifact
from modelopt_cli.artifact.coding import Code
from modelopt_cli.checkpoint import Opened
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.coverage import Coverage, coverage


def about_tensors(opened: Opened) -> dict[str, Any]:
    """What a file of opened tensors says beside them: keyword arguments of ``artifact.write_tensors``."""
    about: dict[str, Any] = {"history": opened.tensors.history if opened.tensors is not None else ()}
    if (architecture := opened.architecture) is not None:
        about |= {"arch": architecture.spec, "input": architecture.input, "labels": architecture.labels}
    return about


def _with_entry(opened: Opened, entry: dict[str, Any]) -> dict[str, Any]:
    about = about_tensors(opened)
    return {**about, "history": (*about["history"], entry)}


@dataclass(frozen=True)
class Product:
    """A Program or a state dict with what its file should say, ready to be written.

    Attributes:
        coverage: what became of each layer.
        subject: the Program, or tensors by name, or a stream of them.
        encodings: how tensors are stored, where there is no Program.
        about: history, architecture, input and labels, where there is no Program.
    """

    coverage: Coverage
    subject: Program | artifact.Stream | dict[str, Tensor]
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
        return cls(covered, dict(state), dict(encodings), _with_entry(opened, entry))

    @classmethod
    def of_stream(
        cls, opened: Opened, stream: artifact.Stream, covered: Coverage, entry: dict[str, Any]
    ) -> "Product":
        """As :meth:`of_tensors`, for tensors that are made while they are written."""
        return cls(covered, stream, {}, _with_entry(opened, entry))

    def predicted_bytes(self, code: Code = "plain") -> int:
        """Length of the file."""
        if isinstance(self.subject, Program):
            return artifact.predicted_bytes(self.subject, code=code)
        return artifact.predicted_bytes(self.subject, self.encodings, code=code, **self.about)

    def write(self, output: str | Path, force: bool, code: Code = "plain") -> artifact.Written:
        """Write the file; raises as ``artifact.write_program``."""
        path = Path(output)
        if isinstance(self.subject, Program):
            return artifact.write_program(self.subject, path, force=force, code=code)
        if isinstance(self.subject, artifact.Stream):
            return artifact.write_stream(self.subject, path, force=force, code=code, **self.about)
        about = self.about
        return artifact.write_tensors(self.subject, self.encodings, path, force=force, code=code, **about)
