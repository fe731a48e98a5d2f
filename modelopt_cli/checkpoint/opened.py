"""An opened model: the most that could be made of what the user gave."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt_cli import artifact
from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.checkpoint.sources import FORMS
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.program import Encoding, InputSpec, Program
from modelopt_cli.settings import option


def shape_hint() -> str:
    """Next step where nothing says what a network takes."""
    return f"add {option('input_shape', '3x224x224')}, or what one of its samples has"


@dataclass(frozen=True)
class Opened:
    """An opened model; the first of program, module and state that is there is the one to work on.

    Attributes:
        state: its tensors by name; float weights in float32 where a network was built. Where none was,
            those of safetensors files and artifacts stay there, see ``artifact.lazy``.
        is_artifact: it was in our own format.
        source_sha256: of the file or files; empty where there is none.
        program: the network as a Program.
        module: the network where it could not be traced.
        architecture: what it was built from.
        notes: one line each for the user: what was recognised, assumed or left aside.
        untraced: why there is a module and no Program.
        unknown: why there is no network, where the file names one that cannot be built.
        tensors: an artifact without a graph as it was read, with its history and encodings.
        tensor_bytes: of a checkpoint's tensors as they are stored, whatever ``state`` holds them in.
        path: what it was opened from; empty for fresh weights.
        file_bytes: length of a checkpoint's file, or of all files that were read.
    """

    state: Mapping[str, torch.Tensor]
    is_artifact: bool
    source_sha256: str
    program: Program | None = None
    module: nn.Module | None = None
    architecture: Architecture | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    untraced: str | None = None
    unknown: str | None = None
    tensors: artifact.TensorFile | None = None
    tensor_bytes: int | None = None
    path: str = ""
    file_bytes: int | None = None

    @property
    def network(self) -> Program | nn.Module | None:
        """The network, traced or not; None of bare tensors."""
        return self.program or self.module

    @property
    def input(self) -> InputSpec | None:
        """Shape and preprocessing of a sample, or None where nothing says so."""
        if self.program is not None:
            return self.program.input
        return self.architecture.input if self.architecture is not None else None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, in logit order, or None."""
        return self.program.labels if self.program is not None else None

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """Commands that a file says made it, the oldest first."""
        if self.program is not None:
            return self.program.history
        return self.tensors.history if self.tensors is not None else ()

    @property
    def encodings(self) -> Mapping[str, Encoding]:
        """Forms in which tensors are stored beyond their plain values, by name."""
        if self.program is not None:
            return self.program.encodings
        return self.tensors.encodings if self.tensors is not None else {}

    @property
    def without_graph(self) -> str | None:
        """Why there is no Program, as far as that is known."""
        return self.untraced or self.unknown

    @property
    def holds_network(self) -> bool:
        """True if it is an artifact with its own network, to which no ``--arch`` applies."""
        return self.is_artifact and self.program is not None and self.architecture is None


def require_network(opened: Opened, path: str | Path) -> Program | nn.Module:
    """The network of an opened model, for what cannot work on bare tensors.

    Raises:
        ArchitectureError: there is none; says what came closest.
    """
    if (network := opened.network) is None:
        raise ArchitectureError(
            next(iter(opened.notes[-1:]), "architecture not recognised"),
            where=str(path),
            hint=f"name it with {option('arch')}: {FORMS}",
        )
    return network
