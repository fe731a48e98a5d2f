"""Which layers of a Program are compressed, and why the others are not.

A layer counts as compressed if its weights take less space than they did: they are stored in fewer bits
(``int8``, ``affine8``), zeros among them were put there by pruning and stay (``sparse 90 %``: so many of
its weights are zero, counted here), inputs or outputs of it were removed (``pruned 40 %``: so many of its
weights are gone), or it was removed altogether (``removed``). What is gone cannot be seen in the Program
any more: that is taken from the history, several prunings multiplied. A layer can be several of these.

Layers count alike, whatever their size, so the share of the weights' bytes stands next to their number: the
bytes of all weight matrices in float32, before anything of them was removed. Tied weights count once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from modelopt_cli.program.kinds import KINDS, class_of
from modelopt_cli.program.program import Encoding, Program
from modelopt_cli.program.quantized import Weighted

WEIGHTED_KINDS = tuple(class_of(kind) for kind, row in KINDS.items() if row.weighted)

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_MATMULS = ("matmul", "mm", "mv", "bmm", "baddbmm", "addmm", "einsum", "tensordot")
_RECURRENT = (
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
)
_PRODUCTS = frozenset(("linear", "bilinear", "embedding", *_CONVOLUTIONS, *_MATMULS, *_RECURRENT))
_TURNS = frozenset(("t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "contiguous"))
"""Functions and methods, by name, that multiply matrices, and that only lay them out differently."""

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class LayerStatus:
    """One layer that carries a weight matrix or kernel.

    Attributes:
        name: its path in the network.
        kind: the class it has, or had before it was quantized.
        compressed: whether its weights take less space than they did.
        scheme: how, or an empty string.
        reason: why not, or an empty string.
        bytes: what its weights took before they were compressed.
        plain_bytes: of those, what is stored as it was although the layer is compressed: a recurrent layer
            has several weights.
    """

    name: str
    kind: str
    compressed: bool
    scheme: str = ""
    reason: str = ""
    bytes: int = 0
    plain_bytes: int = 0


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
    def left_out(self) -> "list[tuple[str, tuple[LayerStatus, ...]]]":
        """The layers that are not compressed, grouped by their reason, those with the most bytes first."""
        groups: dict[str, list[LayerStatus]] = {}
        for layer in self.layers:
            if not layer.compressed:
                groups.setdefault(layer.reason, []).append(layer)
        largest = sorted(groups.items(), key=lambda group: -sum(layer.bytes for layer in group[1]))
        return [(reason, tuple(layers)) for reason, layers in largest]


@dataclass(frozen=True)
class _Past:
    """The history's record of layers: reasons for leaving them out, share left of each, and removals."""

    reasons: dict[str, str]
    left: dict[str, float]
    removed: dict[str, int]

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]]) -> "_Past":
        past = cls({}, {}, {})
        for entry in history:
            past.reasons.update(entry.get("skipped", {}))
            for name, share in entry.get("left", {}).items():
                past.left[name] = past.left.get(name, 1.0) * share
            counts = entry.get("removed_weights", {})
            past.removed.update({name: counts.get(name, 0) for name in entry.get("removed", ())})
        return past


def weight_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weight matrices and kernels that a layer holds itself by their own names, integer ones included."""
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor for name, tensor in held if "weight" in name and tensor.dim() > 1}


def _bytes(tensors: Iterable[torch.Tensor], counted: set[int], left: float = 1.0) -> int:
    """Bytes of tensors in float32 before pruning; those ``counted`` before take nothing."""
    fresh = {id(tensor): tensor.numel() for tensor in tensors if id(tensor) not in counted}
    counted.update(fresh)
    return round(_FLOAT_BYTES * sum(fresh.values()) / left) if left > 0 else 0


def _status(
    program: Program, name: str, module: nn.Module, past: _Past, counted: set[int]
) -> LayerStatus | None:
    if not isinstance(module, (Weighted, *WEIGHTED_KINDS)):
        return None
    kind = type(module).__name__
    schemes: list[str] = []
    if isinstance(module, Weighted):
        kind = kind.removeprefix("Quantized").removeprefix("Dynamic")
        schemes.append(module.scheme)
    stored = {own: _stored(program, f"{name}.{own}") for own, _ in module.named_parameters(recurse=False)}
    left, weights = past.left.get(name, 1.0), weight_tensors(module)
    as_it_was = not schemes and left == 1
    plain = _bytes((t for own, t in weights.items() if as_it_was and not stored.get(own)), counted)
    size = plain + _bytes(weights.values(), counted, left)
    schemes += dict.fromkeys(scheme for of_one in stored.values() for scheme in of_one)
    if left < 1:
        schemes.append(f"pruned {_percent(1 - left)} %")
    if schemes:
        return LayerStatus(name, kind, True, ", ".join(schemes), bytes=size, plain_bytes=plain)
    return LayerStatus(name, kind, False, reason=past.reasons.get(name, "not selected"), bytes=size)


def _stored(program: Program, parameter: str) -> list[str]:
    """How a parameter is stored, if not plainly."""
    encoding = program.encodings.get(parameter)
    if encoding is None or encoding.codec == "raw":
        return []
    found = _values(encoding)
    if encoding.codec != "sparse" and not encoding.params.get("pruned"):
        return found
    path, _, leaf = parameter.rpartition(".")
    tensor = getattr(program.get_submodule(path), leaf)
    zeros = tensor.numel() - int(torch.count_nonzero(tensor))
    return [*found, f"sparse {_percent(zeros / tensor.numel())} %"] if zeros else found


def _values(encoding: Encoding) -> list[str]:
    """On what set the values are: ``affine8``, ``shared 16`` by their number, or just any."""
    if encoding.codec == "codebook":
        return [f"shared {encoding.params['entries']}"]
    affine = encoding.params if encoding.codec == "affine" else encoding.params.get("values")
    return [f"affine{affine['bits']}"] if affine else []


def _percent(fraction: float) -> str:
    """Whole percents, or tenths where nearly nothing or nearly everything is gone."""
    return f"{100 * fraction:.0f}" if 0.01 <= fraction <= 0.99 else f"{100 * fraction:.1f}"


def fetched_weights(program: Program) -> dict[str, torch.Tensor]:
    """Weights that functions of the graph fetch without a layer, as Swin's attention does, by name.

    They have two or more dimensions, and are called ``weight`` or multiplied with something. A position
    embedding or a scale, which is not, is no weight.
    """
    found: dict[str, torch.Tensor] = {}
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name in found:
            continue
        tensor = attrgetter(name)(program)
        is_matrix = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
        if is_matrix and (name.endswith(".weight") or _is_multiplied(node)):
            found[name] = tensor
    return found


def _is_multiplied(node: fx.Node) -> bool:
    """Whether a value goes into a matrix product, turned around on the way or not."""
    for user in node.users:
        called = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
        if called in _PRODUCTS or (called in _TURNS and _is_multiplied(user)):
            return True
    return False


def weight_label(parameter: str) -> str:
    """What a weight is called in reports: its layer, or by its own name where it belongs to none."""
    return parameter.rpartition(".")[0] or parameter if parameter.endswith("weight") else parameter


def _fetched(program: Program, past: _Past, counted: set[int]) -> list[LayerStatus]:
    """What became of the weights that no layer has."""
    found = []
    for name, tensor in fetched_weights(program).items():
        label, size = weight_label(name), _bytes([tensor], counted)
        if schemes := _stored(program, name):
            found.append(LayerStatus(label, "fetched weight", True, ", ".join(schemes), bytes=size))
        else:
            why = past.reasons.get(label, "used inside a function, which has no int8 form")
            found.append(LayerStatus(label, "fetched weight", False, reason=why, bytes=size))
    return found


def coverage(program: Program, history: Iterable[Mapping[str, Any]] | None = None) -> Coverage:
    """The Program's weight-carrying layers: convolutions, linears, attention, embeddings.

    Weights that a function fetches without a layer of their own are listed after those, layers that
    pruning removed at the end. The reasons come from the history entries that list skipped layers.

    Args:
        program: as it is.
        history: instead of the Program's own.
    """
    past = _Past.of(program.history if history is None else history)
    counted: set[int] = set()
    found = (_status(program, name, module, past, counted) for name, module in program.named_modules())
    layers = [layer for layer in found if layer is not None]
    there = {layer.name for layer in layers}
    gone = (
        LayerStatus(name, "removed", True, "removed", bytes=_FLOAT_BYTES * count)
        for name, count in past.removed.items()
        if name not in there
    )
    fetched = (layer for layer in _fetched(program, past, counted) if layer.name not in there)
    return Coverage((*layers, *fetched, *gone))
