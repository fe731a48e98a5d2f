"""Which layers of a Program are compressed, and why the others are not."""

from dataclasses import dataclass

import torch
from torch import nn

from modelopt_cli.program.program import Program
from modelopt_cli.program.quantized import DynamicLinear, QuantizedConv2d, QuantizedLinear, Weighted

WEIGHTED_KINDS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
)

SCHEMES: dict[type, str] = {
    QuantizedConv2d: "int8",
    QuantizedLinear: "int8",
    DynamicLinear: "int8-dynamic",
}


@dataclass(frozen=True)
class LayerStatus:
    """One layer that carries a weight matrix or kernel.

    Attributes:
        name: its path in the network.
        kind: the class it has, or had before it was quantized.
        compressed: whether its weights are stored in less than float32.
        scheme: how, or an empty string.
        reason: why not, or an empty string.
    """

    name: str
    kind: str
    compressed: bool
    scheme: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """All weight-carrying layers of a network, in graph order."""

    layers: tuple[LayerStatus, ...]

    @property
    def compressed(self) -> int:
        """How many layers are compressed."""
        return sum(layer.compressed for layer in self.layers)

    @property
    def total(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def fraction(self) -> float:
        """Compressed layers among all, 0 to 1; 0 where there are none."""
        return self.compressed / self.total if self.total else 0.0


def _status(program: Program, name: str, module: nn.Module, reasons: dict[str, str]) -> LayerStatus | None:
    if isinstance(module, Weighted):
        kind = type(module).__name__.removeprefix("Quantized").removeprefix("Dynamic")
        return LayerStatus(name, kind, True, SCHEMES[type(module)])
    if not isinstance(module, WEIGHTED_KINDS):
        return None
    kind = type(module).__name__
    for encoded in (f"{name}.weight", f"{name}.in_proj_weight"):
        if encoded in program.encodings:
            encoding = program.encodings[encoded]
            return LayerStatus(name, kind, True, f"{encoding.codec}{encoding.params.get('bits', '')}")
    return LayerStatus(name, kind, False, reason=reasons.get(name, "not selected"))


def _fetched(program: Program, reasons: dict[str, str]) -> list[LayerStatus]:
    """Weights that functions of the graph fetch directly, as Swin's windowed attention does."""
    found: dict[str, LayerStatus] = {}
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or not name.endswith(".weight") or name in found:
            continue
        parent, _, leaf = name.rpartition(".")
        weight = getattr(program.get_submodule(parent), leaf)
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
            continue
        if name in program.encodings:
            encoding = program.encodings[name]
            scheme = f"{encoding.codec}{encoding.params.get('bits', '')}"
            found[name] = LayerStatus(parent, "fetched weight", True, scheme)
        else:
            why = reasons.get(parent, "used inside a function, which has no int8 form")
            found[name] = LayerStatus(parent, "fetched weight", False, reason=why)
    return list(found.values())


def coverage(program: Program) -> Coverage:
    """The Program's weight-carrying layers: convolutions, linears, attention, embeddings.

    Weights that a function fetches without a layer of their own are listed after those. The
    reasons come from the history entries that list skipped layers.
    """
    reasons: dict[str, str] = {}
    for entry in program.history:
        reasons.update(entry.get("skipped", {}))
    found = (_status(program, name, module, reasons) for name, module in program.named_modules())
    layers = [layer for layer in found if layer is not None]
    return Coverage((*layers, *_fetched(program, reasons)))
