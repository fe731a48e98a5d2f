"""Layers of a network, each as compressed or with the reason why not; made by ``measure.coverage``."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerStatus:
    """One layer that carries a weight matrix or kernel.

    Attributes:
        name: its path in the network.
        kind: the class it has, or had before it was quantized.
        compressed: True if its weights take less space than they did.
        scheme: how, or an empty string.
        reason: why not, or an empty string.
        bytes: what its weights took before they were compressed.
        plain_bytes: of those, what is stored as it was although the layer is compressed: a recurrent layer
            has several weights.
        before: how it was compressed before the method whose coverage this is, or an empty string.
    """

    name: str
    kind: str
    compressed: bool
    scheme: str = ""
    reason: str = ""
    bytes: int = 0
    plain_bytes: int = 0
    before: str = ""


@dataclass(frozen=True)
class Coverage:
    """All weight-carrying layers of a network, in graph order."""

    layers: tuple[LayerStatus, ...]

    @property
    def compressed(self) -> int:
        """Number of compressed layers."""
        return sum(layer.compressed for layer in self.layers)

    @property
    def total(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def fraction(self) -> float:
        """Compressed layers among all, 0 to 1; 0 where there are none."""
        return self.compressed / self.total if self.total else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of the weights of all layers before they were compressed."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def byte_fraction(self) -> float:
        """Compressed bytes among all, 0 to 1; 0 where there are none."""
        return self.compressed_bytes / (self.bytes or 1)

    @property
    def compressed_bytes(self) -> int:
        """Bytes that the compressed weights took before."""
        return sum(layer.bytes - layer.plain_bytes for layer in self.layers if layer.compressed)

    @property
    def before(self) -> tuple[LayerStatus, ...]:
        """The layers that were compressed before the method whose coverage this is."""
        return tuple(layer for layer in self.layers if layer.before)

    @property
    def left_out(self) -> list[tuple[str, tuple[LayerStatus, ...]]]:
        """The layers that are not compressed, grouped by their reason, those with the most bytes first."""
        groups: dict[str, list[LayerStatus]] = {}
        for layer in self.layers:
            if not layer.compressed:
                groups.setdefault(layer.reason, []).append(layer)
        largest = sorted(groups.items(), key=lambda group: -sum(layer.bytes for layer in group[1]))
        return [(reason, tuple(layers)) for reason, layers in largest]


def recorded(covered: Coverage) -> dict[str, Any]:
    """The coverage of a method as its history entry has it."""
    return {"coverage": {"compressed": covered.compressed, "total": covered.total}}
