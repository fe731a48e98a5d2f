"""The problem that a rounding solves, a float network whose integers are to be chosen, and its solution."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from modelopt_cli.data import Data
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.matrices import unseen_inputs
from modelopt_cli.methods.quantize.layer_forms import LAYER_FORMS, Precision
from modelopt_cli.methods.quantize.precision_plan import PrecisionPlan
from modelopt_cli.methods.quantize.weight_rounding.weight_grid import WeightGrid
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized import Weighted


@dataclass(frozen=True)
class RoundedLayer:
    """The integers of a layer.

    Attributes:
        values: int8, the output channels first.
        scale: of each output channel, float32 ``(O,)``.
        bias: float32 ``(O,)``; None where it stays.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def fill(self, layer: Weighted, module: Any) -> None:
        """Give the integers to a layer, and the bias: this one's, or else that of the float layer."""
        layer.weight.copy_(layer.turned(self.values))
        layer.scale.copy_(self.scale)
        if layer.bias is not None:
            layer.bias.copy_(module.bias.detach() if self.bias is None else self.bias)


@dataclass(frozen=True)
class Rounded:
    """The outcome of a rounding.

    Attributes:
        layers: by name; those left out take the nearest integers.
        qparams: scale and zero point of the activations, by representative.
    """

    layers: Mapping[str, RoundedLayer]
    qparams: Mapping[fx.Node, QParams]


@dataclass(frozen=True)
class RoundingProblem:
    """A network of which scales are known, and the integers of its weights not yet.

    Attributes:
        program: the float network that the plan was made for.
        plan: what becomes integer.
        qparams: scale and zero point of the activations, by representative.
        shared: parameters whose equal values stay equal, which take the nearest integers.
        data: samples to look at.
        context: seed, batch size, progress.
        steps: of learning for each layer or block.
    """

    program: Program
    plan: PrecisionPlan
    qparams: Mapping[fx.Node, QParams]
    shared: Collection[str]
    data: Data
    context: Context
    steps: int = 300

    @cached_property
    def heads(self) -> set[fx.Node]:
        """Nodes whose inputs are rounded: of integer layers and additions."""
        return {unit.head for unit in (*self.plan.layers.values(), *self.plan.adds.values())}

    @cached_property
    def layers(self) -> dict[str, "IntegerLayer"]:
        """The layers that are multiplied as integers, by name, in graph order."""
        heads = (node for node in self.program.graph.nodes if node in self.heads and node.op == "call_module")
        return {str(node.target): self._layer(node) for node in reversed(list(heads))}

    def _layer(self, head: fx.Node) -> "IntegerLayer":
        name = str(head.target)
        module: Any = self.program.get_submodule(name)
        precision = Precision(self.qparams[self.plan.representative(source(head))])
        form = LAYER_FORMS[type(module)].make(module, precision)
        assert isinstance(form, Weighted)
        turned, bits = form.turned(module.weight.detach()), self.plan.widths[name].weight
        grid = WeightGrid.of(turned, getattr(module, "groups", 1), bits)
        weight = f"{name}.weight"
        free = weight not in self.shared and unseen_inputs(self.program, weight) is None
        return IntegerLayer(name, form, grid, free)


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer whose weight becomes integer.

    Attributes:
        name: its path.
        form: its integer form, without tensors, which knows where the output channels are.
        grid: the integers that its weight may become.
        free: another rounding than the nearest may be chosen: the weight is its own, and not shared.
    """

    name: str
    form: Weighted
    grid: WeightGrid
    free: bool

    def real(self, steps: Tensor) -> Tensor:
        """The weight of the float layer that steps, output channels first, stand for."""
        return self.form.turned(self.grid.real(steps))
