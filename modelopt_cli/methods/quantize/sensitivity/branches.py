"""Running a graph once, and again from each layer on with that layer changed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program import Program

Compute = Callable[..., Any]
"""Computes a node in place of its layer, from the arguments that this is called with."""


@dataclass(frozen=True)
class Change:
    """A change of a network.

    Attributes:
        computes: what computes the changed nodes.
    """

    computes: Mapping[fx.Node, Compute]


class Branches(fx.Interpreter):
    """Runs a graph on a batch and, for each change, once more from the first changed node on.

    What comes before that node is computed once for all changes, and no value is kept longer than its last
    reader needs it: besides the batch there are at most twice the activations of one run in memory.

    Args:
        program: any Program whose graph takes its inputs.
        changes: each of at least one node.
    """

    def __init__(self, program: Program, changes: Sequence[Change]) -> None:
        super().__init__(program)
        self._nodes: list[fx.Node] = list(program.graph.nodes)
        position = {node: i for i, node in enumerate(self._nodes)}
        self._starting: dict[fx.Node, list[int]] = {}
        for number, change in enumerate(changes):
            first = min(change.computes, key=position.__getitem__)
            self._starting.setdefault(first, []).append(number)
        self._changes = changes

    def outputs(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Any]]:
        """The number of each change and the outputs with it, in the order in which changes begin.

        Args:
            tensors: the graph's inputs, by place.
        """
        inputs = (node for node in self._nodes if node.op == "placeholder")
        values: dict[fx.Node, Any] = dict(zip(inputs, tensors, strict=True))
        with torch.inference_mode():
            for position, node in enumerate(self._nodes):
                for number in self._starting.get(node, ()):
                    yield number, self._from(position, dict(values), self._changes[number].computes)
                self._step(node, values, {})

    def _from(self, position: int, values: dict[fx.Node, Any], computes: Mapping[fx.Node, Compute]) -> Any:
        """The outputs, computed from a node on."""
        for node in self._nodes[position:]:
            outputs = self._step(node, values, computes)
        return outputs

    def _step(self, node: fx.Node, values: dict[fx.Node, Any], computes: Mapping[fx.Node, Compute]) -> Any:
        if node.op == "placeholder":
            return None
        self.env = values
        if node in computes:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            values[node] = computes[node](*args, **kwargs)
        else:
            values[node] = self.run_node(node)
        result = values[node]
        for dead in self.user_to_last_uses.get(node, ()):
            values.pop(dead, None)
        return result
