"""Freeing the batch size of a graph that ``torch.export`` made for so many samples.

Without ``dynamic_shapes`` every size is a number in the graph. The number of samples in views, ``expand`` and
new tensors is found by following two batch sizes through the graph on the meta device, and replaced. Whether
that was right is then tried: several samples must give what each gives alone.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.aten_network import AtenNetwork
from modelopt_cli.program.input_batch import call, concatenate, named, tensors_of
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.output_structure import plain
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.verification import random_input, same_outputs
from modelopt_cli.text import first_line

_VIEWS = ("view", "reshape", "_unsafe_view")
_NEW = {
    "zeros": 0,
    "ones": 0,
    "full": 0,
    "empty": 0,
    "new_zeros": 1,
    "new_ones": 1,
    "new_full": 1,
    "new_empty": 1,
}
"""Operators that make a tensor, to the place of its size among their arguments."""
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_HINT = "export it with dynamic_shapes, the first dimension of each input torch.export.Dim('batch')"
_META = torch.device("meta")


def free_batch(network: AtenNetwork, input_spec: InputSpec, batch: int) -> None:
    """Let a network take any number of samples.

    Args:
        network: its graph is replaced.
        input_spec: what one sample is.
        batch: the number of samples that the graph was made for.

    Raises:
        CaptureError: the batch size cannot be freed.
    """
    original = copy.copy(network)
    graph = fx.Graph()
    graph.output(graph.graph_copy(original.aten_graph, {}))
    try:
        outputs = _Freeing(network, graph, batch).run(input_spec)
        network.aten_graph = graph
        network.aten_sizes = {
            name: [size for size in sizes if size.place] for name, sizes in network.aten_sizes.items()
        }
        agree = _agree(network, original, input_spec, batch, outputs)
    except CaptureError:
        raise
    except Exception as error:  # whatever an operator makes of sizes that do not fit
        raise CaptureError(f"computes {batch} at a time: {first_line(error)}", hint=_HINT) from error
    if not agree:
        raise CaptureError(f"computes {batch} at a time, which depend on each other", hint=_HINT)


class _Freeing:
    """The graph while it is rewritten, and every value in it at two batch sizes."""

    def __init__(self, network: AtenNetwork, graph: fx.Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self.tensors = network.aten_tensors()
        self.values: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = ({}, {})
        self.before: dict[fx.Node, int] = {}
        self.samples: fx.Node | None = None

    def run(self, input_spec: InputSpec) -> list[int | None]:
        """Rewrite the graph; returns the dimension of the samples in each output."""
        batches = [tensors_of(zeros(input_spec, size, "meta")) for size in (self.batch, 2 * self.batch + 1)]
        places = self.graph.find_nodes(op="placeholder")
        with torch.no_grad(), _META:
            for node in list(self.graph.nodes):
                if node.op == "call_function":
                    self._rewrite(node)
                for values, batch in zip(self.values, batches, strict=True):
                    values[node] = batch[places.index(node)] if node in places else self._value(node, values)
                self._inherit(node)
                if node is places[-1]:
                    self._count_samples(places[0])
        (output,) = self.graph.find_nodes(op="output")
        return [self._moving(value) for value in pytree.tree_leaves(output.args[0])]

    def _inherit(self, node: fx.Node) -> None:
        """Let a value that is no view have as much before its samples as what it was made of."""
        moving = self._moving(node)
        for argument in node.all_input_nodes if moving is not None else ():
            place, shape = self._moving(argument), self.values[0][node].shape
            if (
                place is not None
                and argument in self.before
                and self.values[0][argument].shape[place] == shape[moving]
            ):
                self.before.setdefault(node, self.before[argument])

    def _count_samples(self, first: fx.Node) -> None:
        with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
            self.samples = self.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
        for values in self.values:
            values[self.samples] = len(values[first])

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        def known(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return values[argument]
            return _META if isinstance(argument, torch.device) else argument

        if node.op == "get_attr":
            return torch.empty_like(self.tensors[str(node.target)], device="meta")
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), known)
        return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]

    def _moving(self, value: Any) -> int | None:
        """The dimension of a value that follows the batch size; None where none does."""
        node = value if isinstance(value, fx.Node) else None
        one, other = (values.get(node) for values in self.values)  # type: ignore[arg-type]
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return None
        return next(
            (i for i, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if sizes[0] != sizes[1]),
            None,
        )

    def _rewrite(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        args: list[Any] = list(node.args)
        if name in _VIEWS and isinstance(args[1], list):
            args[1] = self._viewed(node, args[0], args[1])
            node.target = torch.ops.aten.reshape.default  # one sample lies in memory as several may not
        elif name == "unflatten" and self._moving(args[0]) == args[1]:
            args[2] = self._with(args[2], 0, -1)
        elif name in ("expand", "repeat") and isinstance(args[1], list):
            args[1] = self._spread(args[0], args[1], keep=-1 if name == "expand" else 1)
        elif name in _NEW:
            place = 1 if any(_is_recurrent(user) for user in node.users) else 0
            args[_NEW[name]] = self._made(args[_NEW[name]], place)
        node.args = tuple(args)

    def _viewed(self, node: fx.Node, tensor: Any, sizes: list[Any]) -> list[Any]:
        """Sizes of a view, with -1 where the samples are: as many elements stand before them as did."""
        moving = self._moving(tensor)
        if moving is None or not all(isinstance(size, int) for size in sizes):
            return sizes
        shape = self.values[0][tensor].shape
        known = math.prod(size for size in sizes if size != -1)
        sizes = [shape.numel() // known if size == -1 else size for size in sizes]
        before = math.prod(shape[:moving]) * self.before.get(tensor, 1)
        place = self._place(sizes, before)
        self.before[node] = before // math.prod(sizes[:place])
        return self._with(sizes, place, -1)

    def _place(self, sizes: list[int], before: int) -> int:
        """The dimension of a view that the samples are in, alone or with others.

        Args:
            sizes: of the view.
            before: number of elements before the first step from one sample to the next.
        """
        starts = [math.prod(sizes[:place]) for place in range(len(sizes))]
        alone = [p for p, start in enumerate(starts) if start == before and sizes[p] == self.batch]
        if alone:
            return alone[0]
        fits = [p for p, start in enumerate(starts) if before % start == 0]
        joined = [p for p in fits if sizes[p] % (before // starts[p] * self.batch) == 0]
        inner = [p for p in joined if p < len(sizes) - 1]  # features come last, and are no samples
        return max(inner or joined or fits, key=lambda p: starts[p])

    def _spread(self, tensor: Any, sizes: list[Any], keep: int) -> list[Any]:
        """Sizes of ``expand`` or ``repeat``: what was repeated for each sample is for each that there is."""
        added = len(sizes) - self.values[0][tensor].dim()
        moving = self._moving(tensor)
        if moving is not None:
            return self._with(sizes, moving + added, keep)
        return self._made(sizes, 0)

    def _made(self, sizes: list[Any], place: int) -> list[Any]:
        fits = len(sizes) > max(place, int(self.batch == 1)) and sizes[place] == self.batch
        return self._with(sizes, place, self.samples) if fits else sizes

    def _with(self, sizes: list[Any], place: int, size: Any) -> list[Any]:
        return [*sizes[:place], size, *sizes[place + 1 :]]


def _is_recurrent(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").partition(".")[0] in _RECURRENT


def _agree(
    network: AtenNetwork, original: AtenNetwork, input_spec: InputSpec, batch: int, places: list[int | None]
) -> bool:
    """True if samples together give what they give in batches of the size that the graph was made for."""
    batches = [named(random_input(network, input_spec, batch + more), input_spec) for more in (0, 1)]
    batches = [{name: tensor[:batch] for name, tensor in each.items()} for each in batches]
    with torch.no_grad():
        results = [pytree.tree_flatten(call(original, each)) for each in batches]
        expected = [
            torch.cat(pair, place) if place is not None else pair[0]
            for *pair, place in zip(results[0][0], results[1][0], places, strict=True)
        ]
        actual = call(network, concatenate(batches))
    return same_outputs(actual, plain(pytree.tree_unflatten(expected, results[0][1])), exact=False)
