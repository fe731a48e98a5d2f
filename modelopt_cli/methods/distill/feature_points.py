"""Feature points: values inside a network, recorded while it runs.

A Program gets an identity layer behind each value that is recorded, and loses it afterwards; of a network
without a graph the outputs of its modules can be recorded.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import call
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode, value_shapes
from modelopt_cli.program.weighted import WEIGHTED_KINDS

_BATCH = 2


@dataclass(frozen=True)
class FeaturePoint:
    """Place in a network whose value can be recorded.

    Attributes:
        name: of the layer or the node of the graph, as the user writes it.
        shape: of the value of one sample.
        key: of a Program, the node whose value it is; of other networks, the module.
        before: record the input of that module, not its output.
    """

    name: str
    shape: tuple[int, ...]
    key: str
    before: bool = False


def feature_points(network: nn.Module, sample: InputSpec) -> list[FeaturePoint]:
    """All points with a value for each sample, in the order in which they are computed.

    Args:
        network: in any mode; it is not changed.
        sample: what its inputs are.
    """
    if isinstance(network, Program):
        shapes = value_shapes(network, _BATCH, sample)
        nodes = [n for n in network.graph.nodes if n.op.startswith("call_") and _is_batch(shapes[n.name])]
        return [FeaturePoint(_name_of(n), tuple(shapes[n.name][1:]), n.name) for n in nodes]
    points: list[FeaturePoint] = []

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and _is_batch(output.shape):
                points.append(FeaturePoint(name, tuple(output.shape[1:]), name))

        return hook

    _run_once(network, sample, {name: recorder(name) for name, _ in network.named_modules() if name})
    return points


def embedding_point(network: nn.Module, sample: InputSpec) -> FeaturePoint:
    """Input of the last layer with a weight: the features that the network classifies by.

    Raises:
        ModeloptError: the network has no such layer.
    """
    if isinstance(network, Program):
        shapes = value_shapes(network, _BATCH, sample)
        for node in reversed(network.graph.nodes):
            if _is_weighted(node, network):
                source = node.all_input_nodes[0]
                return FeaturePoint(_name_of(source), tuple(shapes[source.name][1:]), source.name)
    else:
        last: list[FeaturePoint] = []

        def recorder(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if args and isinstance(args[0], Tensor):
                    last.append(FeaturePoint(name, tuple(args[0].shape[1:]), name, before=True))

            return hook

        weighted = [name for name, m in network.named_modules() if isinstance(m, WEIGHTED_KINDS)]
        _run_once(network, sample, {name: recorder(name) for name in weighted})
        if last:
            return last[-1]
    raise ModeloptError("the network has no layer with a weight whose input could be recorded")


class FeatureValues:
    """Values at some points, as of the last forward pass.

    A copy of a network that has them gets empty ones of its own.
    """

    def __init__(self) -> None:
        self._values: dict[FeaturePoint, Tensor] = {}

    def take(self, point: FeaturePoint) -> Tensor:
        """The value ``(N, *point.shape)``, once for each forward pass."""
        return self._values.pop(point)

    def put(self, point: FeaturePoint, value: Tensor) -> None:
        """Keep a value until it is taken."""
        self._values[point] = value

    def __deepcopy__(self, memo: Any) -> "FeatureValues":
        memo[id(self)] = copied = FeatureValues()
        return copied


@contextlib.contextmanager
def recording(network: nn.Module, points: Sequence[FeaturePoint]) -> Iterator[FeatureValues]:
    """Inside the context the network keeps its values at some points; afterwards it is as it was."""
    values = FeatureValues()
    with contextlib.ExitStack() as undo:
        for number, point in enumerate(dict.fromkeys(points)):
            watched = _watched(network, point, number, undo)
            undo.callback(watched.register_forward_hook(_Keep(values, point)).remove)
        if isinstance(network, Program):
            network.recompile()
            undo.callback(network.recompile)
        yield values


def _watched(network: nn.Module, point: FeaturePoint, number: int, undo: contextlib.ExitStack) -> nn.Module:
    """Module whose calls tell the value."""
    if not isinstance(network, Program):
        return network.get_submodule(point.key)
    graph, path = network.graph, f"feature_point{number}"
    while hasattr(network, path):
        path += "_"
    node = next(node for node in graph.nodes if node.name == point.key)
    identity = nn.Identity()
    network.add_module(path, identity)
    with graph.inserting_after(node):
        recorded = graph.call_module(path, (node,))
    node.replace_all_uses_with(recorded, delete_user_cb=lambda user: user is not recorded)

    def remove() -> None:
        recorded.replace_all_uses_with(node)
        graph.erase_node(recorded)
        delattr(network, path)
        network.recompile()

    undo.callback(remove)
    return identity


@dataclass(frozen=True)
class _Keep:
    """A hook, which a copy of the network copies along with the values."""

    values: FeatureValues
    point: FeaturePoint

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.values.put(self.point, args[0] if self.point.before else output)


def _run_once(network: nn.Module, sample: InputSpec, hooks: dict[str, Any]) -> None:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(network.get_submodule(name).register_forward_hook(hook).remove)
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(torch.no_grad())
        call(network, zeros(sample, _BATCH, device))


def _name_of(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _is_batch(shape: Any) -> bool:
    return isinstance(shape, torch.Size) and len(shape) > 1 and shape[0] == _BATCH


def _is_weighted(node: fx.Node, program: Program) -> bool:
    if node.op != "call_module" or not node.all_input_nodes:
        return False
    return isinstance(program.get_submodule(str(node.target)), WEIGHTED_KINDS)
