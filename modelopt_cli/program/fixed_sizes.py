"""Sizes that follow from the network's own values, such as those of a mask, become sizes of constants.

    x[:, gate > 0]                       becomes   x[:, places]
    repeat_interleave(x, counts, 1)      becomes   index_select(x, 1, places)
    x[:, nonzero(gate).flatten()]        becomes   x[:, places]
    x * one_hot(index).sum(0)            becomes   x * constant

Whoever asks for the shapes of a graph, and whoever follows its channels, knows no values; and how much a mask
picks is fixed by the layers after it anyway. The network is run on examples to see the values. One is its own
if nothing of the input goes into it but sizes that are the same for every batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.program.allowlist import is_in_place
from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.spelling import rewrite

_GATHERING = frozenset(["nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"])
_MASKS = (torch.bool, torch.uint8)


def fix_sizes(
    graph: fx.Graph,
    root: nn.Module,
    constants: dict[str, Tensor],
    examples: Callable[[], Sequence[Mapping[str, Tensor]]],
) -> None:
    """Write a graph without sizes that follow from the network's own values.

    Sizes that follow from values of the input stay what they are; no shapes will be found for them.

    Args:
        graph: as traced; changed in place.
        root: where its layers and tensors are; not changed.
        constants: tensors that the graph fetches and ``root`` does not have; gets those that are made here.
        examples: makes the inputs by name, for different batch sizes; called only where some size may follow
            from values.
    """
    has_values = not any(parameter.is_meta for parameter in root.parameters())
    if not has_values or not any(_is_sized(node, root, constants) for node in graph.nodes):
        return
    try:
        runs = [_Run(root, graph, constants, example) for example in examples()]
    except Exception:  # whatever the graph raises is told where it is verified
        return
    _Fixing(graph, root, constants, runs).run()


def _is_sized(node: fx.Node, root: nn.Module, constants: Mapping[str, Tensor]) -> bool:
    """True if the size of a node's result may follow from values."""
    if operation(node) != "getitem":
        return _gathers(node) or bool(_deciding(node))
    paths = [str(part.target) if part.op == "get_attr" else None for part in _deciding(node)]
    tensors = [None if p is None else constants[p] if p in constants else attrgetter(p)(root) for p in paths]
    return any(tensor is None or tensor.dtype in _MASKS for tensor in tensors)


def _gathers(node: fx.Node) -> bool:
    """True if a node's result has a size that follows from the values of all that it reads."""
    name = operation(node) or getattr(node.target, "__name__", "")  # a Program may hold but some of these
    if name == "one_hot":
        return bool(arguments(node)["num_classes"] == -1)
    if name == "repeat_interleave":
        return "input" not in arguments(node)
    return name in _GATHERING or (name == "where" and len(node.all_input_nodes) == 1)


def _deciding(node: fx.Node) -> list[fx.Node]:
    """Arguments that say what a node picks, and how often."""
    name = operation(node)
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return [part for part in index if isinstance(part, fx.Node)]
    if name != "repeat_interleave" or _gathers(node):
        return []
    repeats = arguments(node)["repeats"]
    return [repeats] if isinstance(repeats, fx.Node) else []


class _Run(fx.Interpreter):
    """One run of a graph on an example.

    Attributes:
        read: what a node read, as it was then, by the node and what it read from.
        plain: values that are no tensors, by node.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        constants: Mapping[str, Tensor],
        example: Mapping[str, Tensor],
    ) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self.made = {name: tensor.clone() for name, tensor in constants.items()}
        self.gathered = gathered_by(graph)
        self.read: dict[tuple[fx.Node, fx.Node], Any] = {}
        self.plain: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(*(tensor.clone() for tensor in example.values()))

    def fetch_attr(self, target: str) -> Any:
        """A tensor of the network's, or one that its forward pass makes."""
        return self.made[target] if target in self.made else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and keep what it read of masks, of counts and of what was gathered."""
        for argument in n.all_input_nodes:
            if argument in self.gathered or argument in _deciding(n):
                self.read[n, argument] = _copied(self.env[argument])
        result = super().run_node(n)
        if not isinstance(result, Tensor):
            self.plain[n] = result
        return result


def gathered_by(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that gather, and all that they go into."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if _gathers(node) or any(argument in dependent for argument in node.all_input_nodes):
            dependent.add(node)
    return dependent


def _copied(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_copied(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value


class _Fixing:
    """A graph on its way to sizes that are known."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        constants: dict[str, Tensor],
        runs: Sequence[_Run],
    ) -> None:
        self.graph, self.constants, self.runs = graph, constants, runs
        self.gathered = runs[0].gathered
        self.own = self._own(dict(root.named_modules(remove_duplicate=False)))

    def run(self) -> None:
        for node in list(self.graph.nodes):
            self._pick(node)
            if node not in self.gathered or node not in self.own:
                known = {a: self._constant(node, self._value(node, a)) for a in self._folded(node)}
                node.args = fx.node.map_arg(node.args, partial(_replaced, known))
                node.kwargs = fx.node.map_arg(node.kwargs, partial(_replaced, known))

    def _own(self, layers: Mapping[str, nn.Module]) -> set[fx.Node]:
        """The nodes whose values are the network's own; none where one of those is changed in place."""
        own: set[fx.Node] = set()
        for node in self.graph.nodes:
            plain = [run.plain.get(node) for run in self.runs]
            same = isinstance(plain[0], int | float | str | torch.Size) and plain[0] == plain[1]
            inside = node.op not in ("placeholder", "output") and own.issuperset(node.all_input_nodes)
            changed = source(node) if is_in_place(node, layers) else None
            if isinstance(changed, fx.Node) and changed in own:
                return set()
            if same or inside:
                own.add(node)
        return own

    def _folded(self, node: fx.Node) -> Iterator[fx.Node]:
        """The arguments of a node that were gathered from the network's own values."""
        return (a for a in node.all_input_nodes if a in self.gathered and a in self.own)

    def _value(self, node: fx.Node, argument: fx.Node) -> Any:
        return self.runs[0].read[node, argument]

    def _pick(self, node: fx.Node) -> None:
        """Let a node pick the places that a mask or counts of the network's own name."""
        own = {a: self._value(node, a) for a in _deciding(node) if a in self.own}
        own = {argument: value for argument, value in own.items() if isinstance(value, Tensor)}
        if not own:
            return
        if operation(node) == "repeat_interleave":
            for counts in own.values():
                self._repeat(node, counts)
            return
        masks = {a: value for a, value in own.items() if value.dtype in _MASKS}
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        parts: list[Any] = []
        for part in index:
            mask = masks.get(part) if isinstance(part, fx.Node) else None
            places = [part] if mask is None else self._constant(node, mask.nonzero(as_tuple=True))
            parts.extend(places)
        if masks:
            node.args = (node.args[0], tuple(parts))

    def _repeat(self, node: fx.Node, counts: Tensor) -> None:
        """Write ``repeat_interleave`` by counts as an ``index_select``."""
        bound = arguments(node)
        tensor, dim = bound["input"], bound["dim"]
        if counts.numel() == 1:
            rewrite(node, "repeat_interleave", {"input": tensor, "repeats": int(counts), "dim": dim})
            return
        if dim is None:
            with self.graph.inserting_before(node):
                tensor, dim = self.graph.call_function(torch.flatten, (tensor,)), 0
        places = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        rewrite(node, "index_select", {"input": tensor, "dim": dim, "index": self._constant(node, places)})

    def _constant(self, reader: fx.Node, value: Any) -> Any:
        """A value for the arguments of a node: tensors as new constants that the graph fetches."""
        if isinstance(value, tuple):
            return tuple(self._constant(reader, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        with self.graph.inserting_before(reader):
            return self.graph.create_node("get_attr", name, (), {})


def _replaced(known: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    return known.get(node, node)
