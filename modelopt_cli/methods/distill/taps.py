"""Looking at values inside a network while it runs.

A Program gets an identity layer behind each value that is looked at, and loses it afterwards; of a network
without a graph the outputs of its modules can be seen.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program import Program
from modelopt_cli.program.input_spec import InputSpec, InputType
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode, value_shapes
from modelopt_cli.program.weighted import WEIGHTED_KINDS

_BATCH = 2


@dataclass(frozen=True)
class Place:
    """Where a value can be looked at.

    Attributes:
        name: what the user calls it: a layer, or a node of the graph.
        shape: of the value of one sample.
        key: of a Program, the node whose value it is; of other networks, the module.
        before: whether it is what that module is given, not what it returns.
    """

    name: str
    shape: tuple[int, ...]
    key: str
    before: bool = False


def places(network: nn.Module, shape: tuple[int, ...], dtype: InputType = "float32") -> list[Place]:
    """All values for each sample that can be looked at, in the order in which they are computed.

    Args:
        network: in any mode; it is not changed.
        shape: of one input sample.
        dtype: of its elements; a Program knows it itself.
    """
    if isinstance(network, Program):
        shapes = value_shapes(network, _BATCH, shape)
        nodes = [n for n in network.graph.nodes if n.op.startswith("call_") and _is_batch(shapes[n.name])]
        return [Place(_name_of(n), tuple(shapes[n.name][1:]), n.name) for n in nodes]
    found: list[Place] = []

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and _is_batch(output.shape):
                found.append(Place(name, tuple(output.shape[1:]), name))

        return hook

    _run_once(network, shape, {name: see(name) for name, _ in network.named_modules() if name}, dtype)
    return found


def embedding(network: nn.Module, shape: tuple[int, ...]) -> Place:
    """What the last layer with a weight is given: the features that the network classifies by.

    Raises:
        ModeloptError: the network has no such layer.
    """
    if isinstance(network, Program):
        shapes = value_shapes(network, _BATCH, shape)
        for node in reversed(network.graph.nodes):
            if _is_weighted(node, network):
                source = node.all_input_nodes[0]
                return Place(_name_of(source), tuple(shapes[source.name][1:]), source.name)
    else:
        last: list[Place] = []

        def see(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if args and isinstance(args[0], Tensor):
                    last.append(Place(name, tuple(args[0].shape[1:]), name, before=True))

            return hook

        weighted = [name for name, m in network.named_modules() if isinstance(m, WEIGHTED_KINDS)]
        _run_once(network, shape, {name: see(name) for name in weighted})
        if last:
            return last[-1]
    raise ModeloptError("the network has no layer with a weight whose input could be looked at")


class Taps:
    """The values at some places, as of the last forward pass.

    A copy of a network that has them gets empty ones of its own.
    """

    def __init__(self) -> None:
        self._values: dict[Place, Tensor] = {}

    def take(self, place: Place) -> Tensor:
        """The value ``(N, *place.shape)``, once for each forward pass."""
        return self._values.pop(place)

    def put(self, place: Place, value: Tensor) -> None:
        """Keep a value until it is taken."""
        self._values[place] = value

    def __deepcopy__(self, memo: Any) -> "Taps":
        memo[id(self)] = copied = Taps()
        return copied


@contextlib.contextmanager
def tapped(network: nn.Module, looked_at: Sequence[Place]) -> Iterator[Taps]:
    """In here the network keeps its values at some places; afterwards it is as it was."""
    taps = Taps()
    with contextlib.ExitStack() as undo:
        for number, place in enumerate(dict.fromkeys(looked_at)):
            watched = _watched(network, place, number, undo)
            undo.callback(watched.register_forward_hook(_Keep(taps, place)).remove)
        if isinstance(network, Program):
            network.recompile()
            undo.callback(network.recompile)
        yield taps


def _watched(network: nn.Module, place: Place, number: int, undo: contextlib.ExitStack) -> nn.Module:
    """The module whose calls tell the value."""
    if not isinstance(network, Program):
        return network.get_submodule(place.key)
    graph, path = network.graph, f"tap{number}"
    while hasattr(network, path):
        path += "_"
    node = next(node for node in graph.nodes if node.name == place.key)
    tap = nn.Identity()
    network.add_module(path, tap)
    with graph.inserting_after(node):
        seen = graph.call_module(path, (node,))
    node.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not seen)

    def remove() -> None:
        seen.replace_all_uses_with(node)
        graph.erase_node(seen)
        delattr(network, path)
        network.recompile()

    undo.callback(remove)
    return tap


@dataclass(frozen=True)
class _Keep:
    """A hook, which a copy of the network copies along with the taps."""

    taps: Taps
    place: Place

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.taps.put(self.place, args[0] if self.place.before else output)


def _run_once(
    network: nn.Module, shape: tuple[int, ...], hooks: dict[str, Any], dtype: InputType = "float32"
) -> None:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(network.get_submodule(name).register_forward_hook(hook).remove)
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(torch.no_grad())
        network(zeros(InputSpec(shape, dtype=dtype), _BATCH, device))


def _name_of(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _is_batch(shape: Any) -> bool:
    return isinstance(shape, torch.Size) and len(shape) > 1 and shape[0] == _BATCH


def _is_weighted(node: fx.Node, program: Program) -> bool:
    if node.op != "call_module" or not node.all_input_nodes:
        return False
    return isinstance(program.get_submodule(str(node.target)), WEIGHTED_KINDS)
