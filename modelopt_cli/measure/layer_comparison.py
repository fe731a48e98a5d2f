"""Layer-wise passes: where a network fails, and where its values depart from those of another."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import DataError
from modelopt_cli.measure.output_comparison import is_finite, snr_db
from modelopt_cli.program.input_batch import Inputs, call, clone, tensors_of
from modelopt_cli.program.layer_kinds import row_of
from modelopt_cli.program.quantization import QParams, dequantize
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent

_USUAL_DB = 30.0
"""Signal-to-noise that rounding to 8 bits leaves in any layer: only what falls below that is a loss."""
_FACTORED = (1, -1)
"""Dimensions of the channels of maps, and of the features of linear layers, which may have factors."""
_FITTED = 4
"""Numbers of a channel from which its size can be told."""
_FUSED = 3
"""Most operations that a quantized layer takes in behind it: batch norm, addition, activation."""
_BEYOND = 255 * torch.finfo(torch.float32).max / 2**31
"""Largest value in 8 bits whose scale, times any int32 sum, stays in float32."""


@dataclass(frozen=True, eq=False)
class ComparedValue:
    """Value computed on the way through a network.

    Attributes:
        key: of a graph, the node; of another network, the path of the module.
        layer: the name that a user knows it by.
        sources: keys of the values it is made from, as far as known.
        value: of any type; of a quantized layer, the real values.
        helper: True if a quantized graph has it for the sake of a node, ``NODE_sum`` say.
        of_layer: True if a layer computes it; else a function, whose name nobody can leave out.
    """

    key: str
    layer: str
    sources: tuple[str, ...]
    value: Any
    helper: bool = False
    of_layer: bool = True

    @property
    def counterpart(self) -> str:
        """The key of the same value in the float network."""
        return self.key.rstrip("_").rpartition("_")[0] if self.helper else self.key


See = Callable[[ComparedValue], None]


@dataclass(frozen=True)
class Fall:
    """Layer after which the signal-to-noise is lower: its name, and the dB before and after it."""

    layer: str
    before: float
    after: float

    @property
    def depth(self) -> float:
        """The dB that are lost."""
        return self.before - self.after


def first_fault(network: nn.Module, x: Inputs, healthy: nn.Module | None = None) -> str | None:
    """The first layer that raises, or gives values that are not finite.

    Args:
        network: in evaluation mode, on the device of ``x``.
        x: a batch.
        healthy: another network, whose layers of the same name may do the same: masks hold minus infinity.
    """
    expected = set() if healthy is None else set(_faults(healthy, x))
    return next((layer for layer in _faults(network, x) if layer not in expected), None)


def require_in_range(network: nn.Module, batches: Iterable[Inputs], where: str | None) -> None:
    """Refuse values so large that an integer layer's sums leave float32, though the network's do not.

    Raises:
        DataError: they are, of the inputs or of any layer.
    """
    largest = 0.0

    def see(step: ComparedValue) -> None:
        nonlocal largest
        if is_real(step.value) and step.value.numel():
            largest = max(largest, float(step.value.nan_to_num(0, 0, 0).abs().max()))

    for x in batches:
        run_through(network, x, see)
    if largest > _BEYOND:
        problem = f"the values reach {largest:.0e}, and their products are beyond float32"
        raise DataError(problem, where=where, hint="scale the data")


def failing_layer(network: nn.Module, x: Inputs) -> str | None:
    """The layer that raises on a batch; None where none does."""
    return run_through(network, x, lambda step: None)


def steepest_fall(original: nn.Module, compressed: nn.Module, x: Inputs) -> Fall | None:
    """Find the layer of ``compressed`` that loses the most signal-to-noise against ``original``.

    Values are compared by the names of nodes or modules. A quantized layer may stand for several nodes, a
    convolution and its activation say: the value it is most like counts.

    Returns:
        The layer, called as in ``original``: of a value that a function computes, the one before it; of a
        rounded input, the one that reads it. None where nothing can be compared.
    """
    known: dict[str, ComparedValue] = {}
    run_through(original, x, lambda step: known.update({step.key: step}))
    comparison = Comparison(known, _followers(original), readers(compressed))
    run_through(compressed, x, comparison.see)
    return max(comparison.falls, key=lambda fall: fall.depth, default=None)


class Comparison:
    """Follows the signal-to-noise through a network; ``known`` holds the values it should have."""

    def __init__(
        self, known: dict[str, ComparedValue], followers: dict[str, list[str]], readers: dict[str, str]
    ) -> None:
        self.known, self.followers, self.readers = known, followers, readers
        self.quality: dict[str, float] = {}
        self.layers: dict[str, str] = {}
        self.falls: list[Fall] = []

    def see(self, step: ComparedValue) -> None:
        before = min((self.quality.get(key, _USUAL_DB) for key in step.sources), default=_USUAL_DB)
        candidates = self._candidates(step)
        ratios = (
            snr_db(candidate, _at_sizes_of(candidate, step.value, dim))
            for candidate in candidates
            for dim in _FACTORED
        )
        after = max((each for each in ratios if each is not None), default=before)
        self.quality[step.key] = after = min(after, _USUAL_DB)
        self.layers[step.key] = layer = self._layer(step)
        if after < before:
            self.falls.append(Fall(layer, before, after))

    def _layer(self, step: ComparedValue) -> str:
        """The layer by which a user can leave a value in float."""
        original = self.known.get(step.counterpart, step)
        if step.helper and step.key in self.readers:
            return self.readers[step.key]
        before = (self.layers[key] for key in step.sources if key in self.layers)
        return original.layer if original.of_layer else next(before, original.layer)

    def _candidates(self, step: ComparedValue) -> Iterator[Tensor]:
        """Candidates for the value that a step must compute."""
        if step.counterpart not in self.known or not is_real(step.value):
            return
        for key in (step.counterpart, *self.followers.get(step.counterpart, ())):
            value = self.known[key].value
            if is_real(value) and value.shape == step.value.shape:
                yield value


def _at_sizes_of(expected: Tensor, value: Tensor, dim: int) -> Tensor:
    """The value with each channel multiplied by the number that brings it closest to the expected one.

    ``quantize`` divides channels by factors that the weights of the next layers take in. Where a channel has
    few numbers, the value as it is: a fit would find no noise.

    Args:
        expected: float, any shape.
        value: float, of that shape.
        dim: of the channels.
    """
    if value.dim() < 2 or value.numel() < _FITTED * value.shape[dim]:
        return value
    others = [other for other in range(value.dim()) if other != dim % value.dim()]
    finite = expected.isfinite() & value.isfinite()
    a, b = (torch.where(finite, each, 0).double() for each in (expected, value))
    squares = b.square().sum(others, keepdim=True)
    fit = (a * b).sum(others, keepdim=True) / squares.clamp(min=torch.finfo(torch.float64).tiny)
    return value * torch.where(fit > 0, fit, 1)


def is_real(value: Any) -> TypeGuard[Tensor]:
    """True of a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _followers(network: nn.Module) -> dict[str, list[str]]:
    """Nodes that may be fused into each node of a graph: those that alone read it, one after the other.

    Layers that return their input, such as ``Identity``, are passed over.
    """
    followers: dict[str, list[str]] = {}
    for node in reversed(network.graph.nodes) if isinstance(network, fx.GraphModule) else ():
        user = next(iter(node.users)) if len(node.users) == 1 else None
        followers[node.name] = [] if user is None else followers[user.name]
        if user is not None and not _is_idle(user, network):
            followers[node.name] = [user.name, *followers[user.name]][:_FUSED]
    return followers


def _is_idle(node: fx.Node, network: nn.Module) -> bool:
    return node.op == "call_module" and row_of(network.get_submodule(str(node.target))).idle


def readers(network: nn.Module) -> dict[str, str]:
    """The integer layer that reads each node of a graph, the first of several."""
    graph = network.graph.nodes if isinstance(network, fx.GraphModule) else ()
    layers = {node: str(node.target) for node in graph if node.op == "call_module"}
    integer = {node for node, path in layers.items() if isinstance(network.get_submodule(path), Weighted)}
    readers = {node.name: [layers[user] for user in node.users if user in integer] for node in graph}
    return {name: paths[0] for name, paths in readers.items() if paths}


def _faults(network: nn.Module, x: Inputs) -> list[str]:
    """Layers that give values that are not finite, in order, and at the end the one that raises."""
    faulty: list[str] = []
    last = run_through(network, x, lambda step: None if is_finite(step.value) else faulty.append(step.layer))
    return faulty if last is None else [*faulty, last]


def run_through(network: nn.Module, x: Inputs, see: See) -> str | None:
    """Show every value to ``see``; returns the layer that raises, if one does."""
    run = _pass_graph if isinstance(network, fx.GraphModule) else _pass_modules
    with torch.inference_mode():
        return run(network, x, see)


def _pass_graph(network: Any, x: Inputs, see: See) -> str | None:
    interpreter = _ValueInterpreter(network, see)
    try:
        interpreter.run(*tensors_of(clone(x)))
    except Exception:
        if interpreter.failed is None:
            raise
    return interpreter.failed


class _ValueInterpreter(fx.Interpreter):
    """Runs a graph node by node and shows each value."""

    def __init__(self, network: fx.GraphModule, see: See) -> None:
        super().__init__(network)
        self.extra_traceback = False
        self.see = see
        self.failed: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        calls = n.op == "call_module"
        layer = str(n.target) if calls else n.name
        try:
            value = super().run_node(n)
        except Exception:  # whatever a layer raises: its name is wanted
            self.failed = layer
            raise
        module = self.fetch_attr(layer) if calls else None
        helper = isinstance(module, Quantized) and not isinstance(module, Weighted | QuantizedRecurrent)
        output = getattr(module, "output", None) if isinstance(module, Quantized) else None
        real = dequantize(value, output) if isinstance(output, QParams) else value
        sources = tuple(node.name for node in n.all_input_nodes)
        self.see(ComparedValue(n.name, layer, sources, real, helper, of_layer=calls))
        return value


def _pass_modules(network: nn.Module, x: Inputs, see: See) -> str | None:
    """Visit the outputs of the modules of a network without a graph, each taken to be made from the last."""
    entered: list[str] = []
    before: tuple[str, ...] = ()

    def leave(name: str, value: Any) -> None:
        nonlocal before
        entered.pop()
        see(ComparedValue(name, name, before, value))
        before = (name,)

    with contextlib.ExitStack() as undo:
        for name, module in network.named_modules():
            enter = module.register_forward_pre_hook(lambda m, args, name=name: entered.append(name))
            undo.callback(enter.remove)
            hook = module.register_forward_hook(lambda m, args, value, name=name: leave(name, value))
            undo.callback(hook.remove)
        try:
            call(network, clone(x))
        except Exception:  # as above
            return entered[-1] if entered else None
    return None
