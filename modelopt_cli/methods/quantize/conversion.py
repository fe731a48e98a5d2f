"""Static int8: rewriting a float graph into its int8 form, following a plan and observed ranges."""

import itertools
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from modelopt_cli.methods.quantize.layer_forms import LAYER_FORMS, Precision
from modelopt_cli.methods.quantize.precision_plan import PrecisionPlan, Unit
from modelopt_cli.methods.quantize.roles import (
    Role,
    average_pool,
    avg_pool_options,
    is_mul,
    quantized_max_pool,
    zero_sides,
)
from modelopt_cli.methods.quantize.rounding import quantize_weight, require_nonzero
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import RoundedLayer
from modelopt_cli.program import Program
from modelopt_cli.program.calls import arguments, source
from modelopt_cli.program.patterns import is_relu
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.quantized_operations import Dequantize, Quantize, QuantizedAdd, QuantizedMul
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent
from modelopt_cli.program.rewrite import parts_of
from modelopt_cli.program.weighted import call_name


def values_to_observe(plan: PrecisionPlan, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Values whose QParams are needed, by representative: those to watch for each.

    Besides the uint8 values these are the real ones that some int8 operation reads.
    """
    needed = set(plan.int8)
    for unit in (*plan.layers.values(), *plan.adds.values()):
        needed.update(a for a in unit.head.all_input_nodes if a not in plan.inside)
        if unit.residual is not None:
            needed.add(unit.residual)
    needed.update(source(node) for node in plan.calibrated)
    watch: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in needed and not plan.derived(node):
            watch.setdefault(plan.representative(node), []).append(node)
    return watch


def convert(
    program: Program,
    plan: PrecisionPlan,
    qparams: Mapping[fx.Node, QParams],
    shared: Collection[str] = (),
    rounded: Mapping[str, RoundedLayer] | None = None,
) -> Program:
    """The int8 form of a Program.

    Args:
        program: the float Program the plan was made for.
        plan: what becomes uint8.
        qparams: by representative, from ``values_to_observe``.
        shared: parameters whose equal values stay equal.
        rounded: integers of layers that do not take the nearest, by name.
    """
    return _Converter(program, plan, qparams, shared, rounded or {}).run()


class _Converter:
    """Copies the graph node by node; every old value has a uint8 form, a float form, or both."""

    def __init__(
        self,
        program: Program,
        plan: PrecisionPlan,
        qparams: Mapping[fx.Node, QParams],
        shared: Collection[str],
        rounded: Mapping[str, RoundedLayer],
    ) -> None:
        self.program, self.plan, self.known, self.shared = program, plan, qparams, shared
        self.rounded = rounded
        self.modules: dict[str, nn.Module] = dict(program.named_modules())
        self.graph = fx.Graph()
        self.new_modules: dict[str, nn.Module] = {}
        self.calls: dict[str, list[Weighted]] = {}
        self.filled: dict[int, list[Weighted]] = {}
        self.tied = _layers_by_weight(program, plan)
        self.uint8: dict[fx.Node, fx.Node] = {}
        self.real: dict[fx.Node, Any] = {}

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node not in self.plan.inside:
                self._emit(node)
        parts = parts_of(
            self.program, self.graph, lambda path: self.new_modules.get(path) or self.modules[path]
        )
        converted = self.program.with_graph(parts, self.graph)
        converted.graph.eliminate_dead_code()
        converted.delete_all_unused_submodules()
        converted.recompile()
        return converted.eval()

    def _emit(self, node: fx.Node) -> None:
        role = self.plan.roles.get(node)
        if node in self.plan.layers:
            self._emit_layer(node, self.plan.layers[node])
        elif node in self.plan.adds:
            self._emit_add(node, self.plan.adds[node])
        elif node in self.plan.int8 and role is Role.POOL:
            self._emit_pool(node)
        elif node in self.plan.int8:
            self._emit_pass(node)
        elif not self._becomes_quantized_mul(node):
            self.real[node] = self.graph.node_copy(node, self._shape_or_real(role))
            if node in self.plan.stored and str(node.target) not in self.new_modules:
                self.new_modules[str(node.target)] = self._stored(node)

    def _shape_or_real(self, role: Role | None) -> Any:
        def either(node: fx.Node) -> Any:
            return self.uint8[node] if node in self.uint8 else self._real(node)

        return either if role is Role.SHAPE else self._real

    def _q(self, node: fx.Node) -> QParams:
        return self.known[self.plan.representative(node)]

    def _module(self, name: str, module: nn.Module, *args: fx.Node, like: fx.Node) -> fx.Node:
        self.new_modules[name] = module
        return self.graph.create_node("call_module", name, args, {}, name=like.name)

    def _helper(self, suffix: str, module: nn.Module, *args: fx.Node, like: fx.Node) -> fx.Node:
        """A call of a module without weights; it stands at the top, named after the node."""
        name = f"{like.name}_{suffix}"
        while name in self.modules or name in self.new_modules:
            name += "_"
        self.new_modules[name] = module
        return self.graph.create_node("call_module", name, args, {}, name=name)

    def _uint8(self, node: fx.Node) -> fx.Node:
        """The uint8 form of a value, quantized here if it has none yet."""
        if node not in self.uint8:
            if self._becomes_quantized_mul(node):
                factors = [self._real(a) for a in node.all_input_nodes]
                product = QuantizedMul(self._q(node))
                self.uint8[node] = self._helper("quantized", product, *factors, like=node)
            else:
                self.uint8[node] = self._helper(
                    "quantized", Quantize(self._q(node)), self._real(node), like=node
                )
        return self.uint8[node]

    def _real(self, node: fx.Node) -> Any:
        """The float form of a value, dequantized here if it has none yet."""
        if node not in self.real:
            self.real[node] = self._helper("real", Dequantize(self._q(node)), self.uint8[node], like=node)
        return self.real[node]

    def _becomes_quantized_mul(self, node: fx.Node) -> bool:
        """True if a product is read by int8 layers only, so that it can be rounded as it is made."""
        heads = {unit.head for unit in self.plan.layers.values()}
        distinct = len(node.all_input_nodes) == 2
        if not distinct or not node.users or not is_mul(node, self.plan.values):
            return False
        return all(user in heads for user in node.users)

    def _emit_layer(self, output: fx.Node, unit: Unit) -> None:
        name = str(unit.head.target)
        module, tensor = self.modules[name], source(unit.head)
        target = self._q(output) if output in self.plan.int8 else None
        residual = None if unit.residual is None else self._q(unit.residual)
        bits = self.plan.widths[name].weight
        precision = Precision(self._q(tensor), target, unit.activation, residual, bits)
        layer = LAYER_FORMS[type(module)].make(module, precision)
        assert isinstance(layer, Weighted)
        name = self._as_call(name, layer)
        args = [self._uint8(tensor)]
        if unit.residual is not None:
            args.append(self._uint8(unit.residual))
        call = self._module(name, layer, *args, like=unit.head)
        (self.real if target is None else self.uint8)[output] = call

    def _stored(self, node: fx.Node) -> Quantized:
        """The int8 form of a layer that reads float32, the same for all its calls."""
        name = str(node.target)
        module = self.modules[name]
        known = (self._q(source(node)),) if node in self.plan.calibrated else ()
        layer = LAYER_FORMS[type(module)].make(module, self.plan.widths[name], *known)
        if isinstance(layer, QuantizedRecurrent):
            fill_recurrent(layer, module, {own for own in self.shared if own.rpartition(".")[0] == name})
        else:
            assert isinstance(layer, Weighted)
            self._fill(name, layer)
        return layer

    def _fill(self, name: str, layer: Weighted) -> None:
        """Round the weight of a float layer into an int8 one; tied weights are rounded once."""
        module = self.modules[name]
        if name in self.rounded:
            self.rounded[name].fill(layer, module)
            return
        tied = self.filled.setdefault(id(module.weight), [])
        bounded = any(LAYER_FORMS[type(tied_layer)].multiplies for tied_layer in self.tied[id(module.weight)])
        fill(layer, module, shared=f"{name}.weight" in self.shared, bounded=bounded)
        require_nonzero(f"{name}.weight", module.get_parameter("weight"), layer.weight)
        alike = (tied_layer for tied_layer in tied if torch.equal(tied_layer.weight, layer.weight))
        first = next((tied_layer for tied_layer in alike if torch.equal(tied_layer.scale, layer.scale)), None)
        if first is not None:
            layer.weight, layer.scale = first.weight, first.scale
        tied.append(layer)

    def _as_call(self, name: str, layer: Weighted) -> str:
        """Give the int8 form of a call its tensors, the same for all calls of a layer. Returns its name."""
        calls = self.calls.setdefault(name, [])
        calls.append(layer)
        if len(calls) == 1:
            self._fill(name, layer)
            return name
        layer.share_tensors(calls[0])
        names = (call_name(name, number) for number in itertools.count(len(calls)))
        return next(free for free in names if free not in self.modules and free not in self.new_modules)

    def _emit_add(self, output: fx.Node, unit: Unit) -> None:
        a, b = arguments(unit.head).values()
        add = QuantizedAdd(self._q(a), self._q(b), self._q(output), unit.activation)
        self.uint8[output] = self._helper("sum", add, self._uint8(a), self._uint8(b), like=unit.head)

    def _emit_pool(self, node: fx.Node) -> None:
        options = avg_pool_options(node, self.modules, self.plan.values)
        assert options is not None
        pool = average_pool(options, self._q(source(node)), self._q(node))
        self.uint8[node] = self._helper("pool", pool, self._uint8(source(node)), like=node)

    def _emit_pass(self, node: fx.Node) -> None:
        first = source(node)
        pool, sides = quantized_max_pool(node, self.modules), zero_sides(node, self.modules)
        if pool is not None:
            self.uint8[node] = self._helper("pool", pool, self._uint8(first), like=node)
        elif is_relu(node, self.modules):
            # A real zero is the zero point.
            self.uint8[node] = self.graph.call_function(
                torch.clamp, (self._uint8(first),), {"min": self._q(node).zero_point}
            )
        elif sides is not None:
            filled: dict[str, Any] = {"mode": "constant", "value": self._q(node).zero_point}
            pad = fx.node.map_arg(sides, self._either)  # sizes may be values
            self.uint8[node] = self.graph.call_function(F.pad, (self._uint8(first), pad), filled)
        else:
            self.uint8[node] = self.graph.node_copy(node, self._either)

    def _either(self, node: fx.Node) -> Any:
        return self.uint8[node] if node in self.uint8 else self._real(node)


def _layers_by_weight(program: Program, plan: PrecisionPlan) -> dict[int, list[nn.Module]]:
    """The layers that become int8, by their weights: tied ones have the same."""
    heads = {str(unit.head.target) for unit in plan.layers.values()} | {str(n.target) for n in plan.stored}
    layers_of: dict[int, list[nn.Module]] = {}
    for name in heads:
        layer = program.get_submodule(name)
        layers_of.setdefault(id(getattr(layer, "weight", layer)), []).append(layer)
    return layers_of


def fill_recurrent(layer: QuantizedRecurrent, module: Any, shared: Collection[str] = ()) -> None:
    """Round the weights of a recurrent layer into those of an int8 one.

    Args:
        layer: gets them.
        module: has them.
        shared: names of those whose equal values stay equal.
    """
    leaves = {name.rpartition(".")[2] for name in shared}
    for name, linear in layer.named_children():
        assert isinstance(linear, Weighted)
        bias = getattr(module, f"bias_{name}") if module.bias else None
        part = SimpleNamespace(weight=getattr(module, f"weight_{name}"), bias=bias)
        fill(linear, part, shared=f"weight_{name}" in leaves)


def fill(layer: Weighted, module: Any, *, shared: bool = False, bounded: bool = True) -> None:
    """Round the weight of a float layer into an integer one, to the bits that this has.

    Args:
        layer: gets the tensors that ``module`` has.
        shared: equal values stay equal.
        bounded: the weight is multiplied as integers and keeps to the bound of ``kernels.saturation``.
    """
    weight = layer.turned(module.weight.detach())
    groups = getattr(module, "groups", 1)
    values, scale = quantize_weight(
        weight, groups, bits=layer.weight_bits, exact_everywhere=bounded, shared=shared
    )
    layer.weight.copy_(layer.turned(values))
    layer.scale.copy_(scale)
    if layer.bias is not None:
        layer.bias.copy_(module.bias.detach())
