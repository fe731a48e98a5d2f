"""Arithmetic that one sample costs.

Convention: ``macs`` counts multiply-accumulates of convolutions, linear layers and matrix products,
the two products of attention included, at batch size 1. FLOPs are twice that. Not counted, as in most
papers: element-wise work, norms, pooling, softmax, biases; an embedding is a look-up and costs nothing.
Multiplications with padding zeros count. An int8 layer counts as the layer it replaces.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from modelopt_cli.errors import ArchitectureError, ModeloptError
from modelopt_cli.measure.formulas import (
    FUNCTIONS,
    METHODS,
    MODULES,
    NAMED,
    Args,
    Formula,
    Kwargs,
    ModuleFormula,
    einsum,
)
from modelopt_cli.program.input_batch import Inputs, call, sample_shapes
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.parted import PartedProgram, has_same_parts, interpret
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one sample.

    Attributes:
        total: all of them.
        per_layer: by layer path (or graph node, for a function), in order of execution; only those
            above zero. A layer that is called twice counts twice. Without a graph, work that is not in
            a leaf layer (attention written out in a ``forward``) is in ``total`` alone. So is work outside
            of the parts of a network that was captured in parts.
    """

    total: int
    per_layer: dict[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Twice ``total``."""
        return 2 * self.total


def count_macs(model: nn.Module, sample: InputSpec, calls_of: nn.Module | None = None) -> Macs:
    """Count the multiply-accumulates of one sample, by running the model once on zeros.

    A graph (a Program, or any ``fx.GraphModule``) is counted node by node with the tables of
    ``formulas.py``. What they do not know, and any model without a graph, is counted by torch's
    ``FlopCounterMode``.

    Args:
        model: is left as it was.
        sample: what its inputs are.
        calls_of: another model to compare it with. Where both are one network in the same parts, the calls
            of parts that are counted are those of this one: how often, and with how many boxes, a detector's
            code calls them depends on the weights.

    Raises:
        ArchitectureError: the model does not run on such a sample.
    """
    x = zeros(sample, 1, _device(model))
    try:
        with evaluation_mode(model), torch.no_grad():
            if calls_of is not None and calls_of is not model and has_same_parts(model, calls_of):
                return _count_along(cast(PartedProgram, model), cast(PartedProgram, calls_of), x)
            return _count_graph(model, x) if isinstance(model, fx.GraphModule) else _count_module(model, x)
    except ModeloptError:
        raise
    except Exception as error:  # a layer may raise anything on inputs that it does not take
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArchitectureError(f"does not run on samples of {sample_shapes(x)}: {reason}") from error


def _count_graph(model: fx.GraphModule, inputs: Inputs) -> Macs:
    with _torch_counter() if isinstance(model, PartedProgram) else nullcontext() as whole:
        counter = _GraphCounter(model, whole)
        interpret(counter, model, inputs)
        outside = 0 if whole is None else whole.get_total_flops() // 2 - counter.seen
    return Macs(outside + sum(counter.per_layer.values()), counter.per_layer)


def _count_along(model: PartedProgram, other: PartedProgram, inputs: Inputs) -> Macs:
    """The parts of a network in the calls of another one, and what that computes outside of them."""
    counter = _GraphCounter(model, None)
    with evaluation_mode(other):
        theirs = _count_graph(other, inputs)
        interpret(counter, model, inputs, calls_of=other)
    outside = theirs.total - sum(theirs.per_layer.values())
    return Macs(outside + sum(counter.per_layer.values()), counter.per_layer)


class _GraphCounter(fx.Interpreter):
    """Runs the graph and books every node's multiply-accumulates.

    Args:
        model: whose graph it is.
        whole: torch's counter of a network of which the graph is only parts.

    Attributes:
        per_layer: multiply-accumulates by layer.
        seen: those that ``whole`` counted in the graph.
    """

    def __init__(self, model: fx.GraphModule, whole: FlopCounterMode | None) -> None:
        super().__init__(model)
        self.per_layer: dict[str, int] = {}
        self.whole, self.seen = whole, 0

    def run_node(self, n: fx.Node) -> Any:
        name = str(n.target) if n.op in ("call_module", "get_attr") else n.name
        before = 0 if self.whole is None else self.whole.get_total_flops()
        with _torch_counter() if self._unknown(n) else nullcontext() as fallback:
            out = super().run_node(n)
        self.seen += 0 if self.whole is None else (self.whole.get_total_flops() - before) // 2
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        macs = self._formula(n, args, kwargs, out)
        if macs is None and fallback is not None:
            macs = fallback.get_total_flops() // 2
        if macs:
            self.per_layer[name] = self.per_layer.get(name, 0) + macs
        return out

    def _formula(self, node: fx.Node, args: Args, kwargs: Kwargs, out: Any) -> int | None:
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            of_module = _module_formula(module)
            return of_module(module, args, kwargs, out) if of_module else None
        formula = _function_formula(node)
        return formula(args, kwargs, out) if formula else None

    def _unknown(self, node: fx.Node) -> bool:
        """True if torch has to count a node: it has no formula, or einsum's, which may decline."""
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            return _module_formula(module) is None and not isinstance(module, Quantized)
        if node.op not in ("call_function", "call_method"):
            return False
        return _function_formula(node) in (None, einsum)


def _module_formula(module: nn.Module) -> ModuleFormula | None:
    return next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)


def _function_formula(node: fx.Node) -> Formula | None:
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    target: Any = node.target
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    return FUNCTIONS.get(target) or NAMED.get(name)


def _count_module(model: nn.Module, inputs: Inputs) -> Macs:
    """Torch's own counter, corrected for our layers, whose operators it does not know."""
    per_layer: dict[str, int] = {}
    handles = []
    with _torch_counter() as counter:
        before: dict[str, int] = {}

        def enter(name: str) -> Callable[..., None]:
            return lambda module, args: before.__setitem__(name, counter.get_total_flops())

        def leave(name: str, formula: ModuleFormula | None) -> Callable[..., None]:
            def book(module: nn.Module, args: Args, out: Any) -> None:
                seen = (counter.get_total_flops() - before[name]) // 2
                macs = formula(module, args, {}, out) if formula else 0
                per_layer[name] = per_layer.get(name, 0) + macs - seen

            return book

        for name, module in model.named_modules():
            if isinstance(module, Quantized):
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave(name, _module_formula(module))))
        try:
            call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    correction = sum(per_layer.values())
    return Macs(counter.get_total_flops() // 2 + correction, _leaf_counts(model, counter, per_layer))


def _leaf_counts(model: nn.Module, counter: FlopCounterMode, corrections: dict[str, int]) -> dict[str, int]:
    leaves = {name for name, module in model.named_modules() if name and not any(module.children())}
    counts: dict[str, int] = {}
    for path, flops in counter.get_flop_counts().items():
        name = path.partition(".")[2]  # the first part is the network's class
        if name in leaves:
            counts[name] = sum(flops.values()) // 2
    for name, correction in corrections.items():
        counts[name] = counts.get(name, 0) + correction
    return {name: macs for name, macs in counts.items() if macs}


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def _torch_counter() -> Iterator[FlopCounterMode]:
    """Torch's counter, taught the two ways of computing attention that it misses on a CPU.

    The fused kernel of ``scaled_dot_product_attention`` gets a formula; the fused kernel of whole
    ``MultiheadAttention`` and ``TransformerEncoderLayer`` modules is switched off while counting.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops}) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """FLOPs of attention from the three shapes ``(..., length, features)``."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
