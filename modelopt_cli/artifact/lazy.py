"""State dicts that stay in their files: a tensor is read when it is asked for, and not kept."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from modelopt_cli.artifact.container import read_layout, read_tensor
from modelopt_cli.artifact.dtypes import DTYPES
from modelopt_cli.artifact.header import KEY, Kind
from modelopt_cli.errors import CheckpointError
from modelopt_cli.regular import HeldFile


class LazyState(Mapping[str, Tensor]):
    """Tensors by name, of which only types and shapes are held.

    Every look-up reads the tensor again, into memory of its own: hold on to one no longer than needed.

    Attributes:
        kinds: element type and shape of each tensor.
    """

    def __init__(self, kinds: Mapping[str, Kind], read: Callable[[str], Tensor]) -> None:
        self.kinds, self._read = dict(kinds), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.kinds:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def described(self) -> dict[str, Tensor]:
        """The same with tensors on the meta device: nothing is read."""
        return {
            name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            for name, (dtype, shape) in self.kinds.items()
        }

    def renamed(self, names: Mapping[str, str]) -> "LazyState":
        """Some of the tensors under other names: ``names`` maps new to old."""
        return LazyState({new: self.kinds[old] for new, old in names.items()}, lambda new: self[names[new]])


def gather(homes: Mapping[str, str], states: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """One state dict out of several, lazy where they all are; ``homes`` says which has each tensor."""
    lazy = {home: state for home, state in states.items() if isinstance(state, LazyState)}
    if len(lazy) < len(states):
        return {name: states[home][name] for name, home in homes.items()}
    kinds = {name: lazy[home].kinds[name] for name, home in homes.items()}
    return LazyState(kinds, lambda name: lazy[homes[name]][name])


def described(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors to ask for types and shapes, without reading what is not in memory."""
    return state.described() if isinstance(state, LazyState) else state


def open_safetensors(source: Path | HeldFile) -> LazyState:
    """The tensors of a safetensors file, in file order; the file is held open until the last look-up.

    Raises:
        CheckpointError: missing, damaged, not safetensors, or changed since.
    """
    held = source if isinstance(source, HeldFile) else HeldFile(source, CheckpointError)
    where = str(held.path)
    held.file.seek(0)
    layout = read_layout(held.file, where, CheckpointError)
    if KEY in layout.metadata:
        raise CheckpointError(
            "is a modelopt artifact whose header was written again, so that its digest is lost",
            where=where,
            hint="use the file that modelopt wrote",
        )

    def read(name: str) -> Tensor:
        tensor = read_tensor(held.file, layout, layout.tensors[name], where, CheckpointError)
        held.check()
        return tensor

    return LazyState({name: (info.dtype, info.shape) for name, info in layout.tensors.items()}, read)
