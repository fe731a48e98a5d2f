"""What a method made, ready to be written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt_cli import artifact
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.coverage import Coverage


@dataclass(frozen=True)
class Product:
    """A Program or a state dict with what its file should say, ready to be written."""

    coverage: Coverage
    subject: Program | dict[str, Tensor]
    encodings: dict[str, Encoding]
    about: dict[str, Any]

    def predicted_bytes(self) -> int:
        if isinstance(self.subject, Program):
            return artifact.predicted_bytes(self.subject)
        return artifact.predicted_bytes(self.subject, self.encodings, **self.about)

    def write(self, output: str | Path, force: bool) -> artifact.Written:
        if isinstance(self.subject, Program):
            return artifact.write_program(self.subject, Path(output), force=force)
        return artifact.write_tensors(self.subject, self.encodings, Path(output), force=force, **self.about)
