"""Layer names: how two sets of them differ, and the spellings that mean the same network."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from modelopt_cli.text import short

Shape = tuple[int, ...]
# A pattern's dimension is a number, or a letter for one that depends on how the network was made.
Pattern = tuple[int | str, ...]

_COUNTER = "num_batches_tracked"
# torchvision's own published DenseNet and ViT files still have the names of its first versions.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..+)$")
_OLD_VIT = (re.compile(r"(\.mlp)\.linear_1\."), re.compile(r"(\.mlp)\.linear_2\."))
_PREFIX_DEPTH = 3
_PREFIX_SHARE = 0.5


def is_counter(name: str) -> bool:
    """True if a name is batch-norm's step counter, which no inference reads and old files lack."""
    return name.rpartition(".")[2] == _COUNTER


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    """Shapes by name, without batch-norm's counters."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not is_counter(name)}


@dataclass(frozen=True)
class Difference:
    """Difference between a file's tensors and a network's.

    Attributes:
        missing: in the network, not in the file.
        unexpected: in the file, not in the network.
        reshaped: in both, as (name, shape in the file, shape in the network).
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[tuple[str, Shape, Pattern], ...]

    @property
    def count(self) -> int:
        """Number of tensors that differ."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    @property
    def first(self) -> str:
        """The first difference in words."""
        if self.reshaped:
            name, have, want = self.reshaped[0]
            return f"'{short(name)}' is {show(have)} in the file, {show(want)} in the network"
        if self.missing:
            return f"'{short(self.missing[0])}' is not in the file"
        return f"'{short(self.unexpected[0])}' is not in the network" if self.unexpected else "none"


def show(shape: Pattern) -> str:
    """``(64, 3, 7, 7)``; a dimension that depends on the class count is written ``classes``."""
    dims = ["classes" if dim == "C" else str(dim) for dim in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def compare(have: Mapping[str, Shape], want: Mapping[str, Pattern]) -> Difference:
    """Compare a file's shapes with a network's; counters must have been left out of both."""
    return Difference(
        tuple(name for name in want if name not in have),
        tuple(name for name in have if name not in want),
        tuple(
            (name, have[name], want[name])
            for name in want
            if name in have and not fits(have[name], want[name])
        ),
    )


def fits(shape: Shape, pattern: Pattern) -> bool:
    """True if a shape is one that a pattern allows, taken by itself."""
    return len(shape) == len(pattern) and all(
        dim == want if isinstance(want, int) else dim > 0 for dim, want in zip(shape, pattern, strict=True)
    )


def spellings(state: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The state dict as it is, then under the other names its tensors may be meant by.

    A Lightning module keeps its network under an attribute (``model.``), next to losses and metrics; so
    for each leading part that most names share, the tensors below it are offered without it.
    """
    for candidate in _without_prefix(dict(state)):
        yield candidate
        modern = {_modern(name): tensor for name, tensor in candidate.items()}
        if len(modern) == len(candidate) and modern.keys() != candidate.keys():
            yield modern


def _without_prefix(state: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    yield state
    for _ in range(_PREFIX_DEPTH):
        counts: dict[str, int] = {}
        for name in state:
            head, dot, _rest = name.partition(".")
            counts[head + dot] = counts.get(head + dot, 0) + bool(dot)
        prefix = max(counts, key=lambda key: counts[key], default="")
        if not prefix or counts[prefix] <= _PREFIX_SHARE * len(state):
            return
        state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        yield state


def _modern(name: str) -> str:
    old = _OLD_DENSENET.match(name)
    if old:
        return old[1] + old[2]
    for pattern, index in zip(_OLD_VIT, ("0", "3"), strict=True):
        name = pattern.sub(rf"\1.{index}.", name)
    return name
