"""State of a run of a Program's graph on labels instead of values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program.attention import undivided
from modelopt_cli.program.calls import operation, source
from modelopt_cli.program.channels.shuffles import Selection
from modelopt_cli.program.channels.ties import Ties, nothing
from modelopt_cli.program.layer_kinds import row_of
from modelopt_cli.program.program import Program
from modelopt_cli.program.shapes import value_shapes
from modelopt_cli.program.weighted import weight_label

OTHER_BATCH = 3
_MOVES = """
    reshape reshape_as flatten unflatten permute transpose t movedim squeeze unsqueeze expand expand_as repeat
    repeat_interleave tile broadcast_to chunk split tensor_split unbind narrow select roll flip cat stack
    getitem index_select pad channel_shuffle
"""
MOVES_ONLY = frozenset(_MOVES.split())
"""Operations that only move elements; a size among their arguments says where to."""
PLACES = frozenset(["roll", "getitem", "narrow", "select", "repeat", "tile", "repeat_interleave", "pad"])
"""Those of them called with places and amounts, which stay what they were along what is not removed."""
CONSTANTS = frozenset(["new_zeros", "new_ones", "new_full"])
"""Operations that make a tensor of equal elements, of the size that they are called with."""
_SAME = frozenset(["contiguous", "clone", "detach", "to", "type_as", "float", "double"])
READ_OUTSIDE = "has a weight that is read outside of its layer"
_MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Fetched:
    """A tensor that the graph fetches by path."""

    path: str
    tensor: Tensor


MAKES = "out"
"""Role of the weights that make a channel; ``dependencies.ROLES`` has all."""


@dataclass(frozen=True)
class Slot:
    """Labels of one dimension of a parameter or buffer; ``role`` and ``gates`` as in ``Member``."""

    tensor: str
    dim: int
    line: Tensor
    role: str
    gates: int = 1

    @property
    def makes_channels(self) -> bool:
        """True of weights whose outputs the channels are."""
        return self.role == MAKES


Rule = Callable[["Trace", fx.Node, dict[str, Any]], Any]


@dataclass
class Trace:
    """Labels of every value of a Program.

    Attributes:
        shapes: of every value at batch size 1, tuples of shapes for tuples of tensors.
        values: labels of tensors, and numbers as they are, by node name.
        slots: labels of parameters and buffers.
        fields: labels that hyperparameters count, by layer and name: a line, or a list of lines and numbers.
        counted: lines of labels that arguments of a function count, by node name and argument.
        selections: nodes that pick or reorder channels of an earlier value.
        inside: nodes between such a value and its selection, which need not be boxes of channels.
        boxed: whether values are tied so that what is removed leaves no holes.
        read: tensors that the graph reads by value, other than as a layer's weights.
        loose: those of them that have labels of their own.
        sole: channels without which a value would be empty, and a sentence that says so.
        sized: nodes that make a constant of which a layer's channels need some size.
        unfollowed: weighted layers, and weights fetched without one, that no rule follows; and the reason.
    """

    program: Program
    ties: Ties = field(default_factory=Ties)
    shapes: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    counted: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    selections: dict[str, Selection] = field(default_factory=dict)
    inside: frozenset[str] = frozenset()
    boxed: bool = False
    read: set[str] = field(default_factory=set)
    loose: set[str] = field(default_factory=set)
    sole: list[tuple[Tensor, str]] = field(default_factory=list)
    sized: set[str] = field(default_factory=set)
    unfollowed: dict[str, str] = field(default_factory=dict)
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors = dict(self.program.state_dict(keep_vars=True))
        for name, tensor in self._tensors.items():
            self._names.setdefault(id(tensor), name)

    @cached_property
    def batched(self) -> dict[str, Any]:
        """Shapes of every value at batch size ``OTHER_BATCH``."""
        return value_shapes(self.program, OTHER_BATCH)

    @cached_property
    def undivided(self) -> dict[str, str]:
        """Attention modules that are not taken apart, and why."""
        return undivided(self.program)

    @cached_property
    def called(self) -> frozenset[str]:
        """Names of the tensors of all layers that are called."""
        targets = (str(node.target) for node in self.program.graph.nodes if node.op == "call_module")
        layers = [self.program.get_submodule(target) for target in targets]
        tensors = [t for layer in layers for t in layer.state_dict(keep_vars=True).values()]
        return frozenset(self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names)

    def slot(self, tensor: str, dim: int, line: Tensor, role: str, gates: int = 1) -> None:
        """Say what the places of a tensor along ``dim`` belong to; nothing if the tensor does not exist."""
        if tensor in self._tensors:
            self.slots.append(Slot(self._names[id(self._tensors[tensor])], dim, line, role, gates))

    def has(self, tensor: str) -> bool:
        """True if there is a parameter or buffer of this name."""
        return tensor in self._tensors

    def count(self, node: fx.Node, **lines: Tensor | None) -> None:
        """Say that arguments of a call count the channels of these lines."""
        self.counted[node.name] = {name: line for name, line in lines.items() if line is not None}

    def block(self, tensor: str, labels: Tensor, role: str) -> None:
        """Say what the elements of a tensor belong to; ``labels`` has its shape."""
        labels = self.ties.product(labels)
        for dim in self.ties.varying(labels):
            self.slot(tensor, dim, self.ties.line(labels, dim), role)

    def loose_blocks(self) -> None:
        """The slots of tensors that no layer owns; those that one does own stay whole."""
        owned = self.read & (self.called | {slot.tensor for slot in self.slots})
        for slot in self.slots:
            if slot.tensor in owned:
                self.ties.freeze(slot.line, READ_OUTSIDE)
        for name in sorted(self.loose):
            labels = self.ties.fresh(f"tensor {name}", self._tensors[name].numel())
            if name in owned:
                self.ties.freeze(labels, READ_OUTSIDE)
            else:
                self.block(name, labels.view(self._tensors[name].shape), "tensor")

    def is_loose(self, fetched: Fetched) -> bool:
        """True if a fetched tensor is used outside of any layer, and so has labels of its own."""
        return self.name_of(fetched) in self.loose

    def name_of(self, fetched: Fetched) -> str:
        """A fetched tensor's name: the first of those it has."""
        return self._names[id(fetched.tensor)]

    def labels(self, value: Any) -> Tensor:
        """The labels of a tensor value; those of a fetched tensor are made on its first such use."""
        if not isinstance(value, Fetched):
            return value  # type: ignore[no-any-return]
        tensor, name = value.tensor, self.name_of(value)
        self.read.add(name)
        if not tensor.is_floating_point() or not 0 < tensor.numel() <= _MOST_ELEMENTS:
            return nothing(tensor.shape)
        labels = self.ties.fresh(f"tensor {name}", tensor.numel()).view(tensor.shape)
        self.loose.add(name)
        return self.ties.product(labels) if self.boxed else labels

    def unsupported(self, node: fx.Node, arguments: Any, why: str | None = None) -> Any:
        """Freeze everything that goes into a node; its output has no channels."""
        called = describe(node, self.program)
        clause = self.undivided.get(str(node.target), "which channels cannot be followed through")
        for name in self._weights_of(node, arguments):
            itself = f"{called.rpartition(' ')[2].strip('()')}, {clause}"
            self.unfollowed.setdefault(name, why or itself)
        why = why or f"goes through {called}, {clause}"
        for value in tensors_in(arguments):
            self.ties.freeze(self.labels(value), why)
        return blank(self.shapes[node.name])

    def _weights_of(self, node: fx.Node, arguments: Any) -> list[str]:
        """The weighted layer that a node calls, or the weights that a function is called with."""
        if node.op == "call_module":
            path = str(node.target)
            return [path] if row_of(self.program.get_submodule(path)).weighted else []
        fetched = [value for value in tensors_in(arguments) if isinstance(value, Fetched)]
        return [weight_label(value.path) for value in fetched if value.tensor.dim() > 1]

    def size(self, argument: Any) -> None:
        """Let the constants that an argument is made of have channels, from the next run on."""
        for read in argument if isinstance(argument, tuple | list) else [argument]:
            while isinstance(read, fx.Node) and operation(read) in MOVES_ONLY | _SAME:
                read = source(read)
            if isinstance(read, fx.Node) and operation(read) in CONSTANTS:
                self.sized.add(read.name)


def describe(node: fx.Node, program: Program) -> str:
    """Name of what a node calls, for a message."""
    if node.op == "call_module":
        return f"{node.target} ({type(program.get_submodule(str(node.target))).__name__})"
    return operation(node)


def tensors_in(arguments: Any) -> list[Any]:
    """The tensors, labelled or fetched, anywhere among a call's arguments."""
    tensors: list[Any] = []

    def look(value: Any) -> Any:
        if isinstance(value, Tensor | Fetched):
            tensors.append(value)
        return value

    fx.node.map_aggregate(arguments, look)
    return tensors


def blank(shape: Any) -> Any:
    """Labels without channels for a value of this shape; numbers stay."""
    if isinstance(shape, torch.Size):
        return nothing(shape)
    if isinstance(shape, tuple | list):
        return tuple(blank(part) for part in shape)
    return shape
