"""Features of very different sizes that a linear layer reads: brought to one size before they are rounded.

A linear layer's input has one scale, that of its largest feature: next to sums in the hundreds, counts below
ten would be lost. So each feature is divided by a factor, and the weights that it is multiplied with are
multiplied by that (Xiao et al., "SmoothQuant", ICML 2023). Factors are powers of two, so that the float
network computes the same. A norm that makes the features for these layers alone takes the factors in, as in
the paper; elsewhere they are divided by a multiplication of their own.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.methods.quantize.precision_plan import PrecisionPlan
from modelopt_cli.methods.quantize.roles import Role
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source
from modelopt_cli.program.layer_kinds import build, config_of, kind_of
from modelopt_cli.program.quantization import BITS, levels_of, weight_limits
from modelopt_cli.program.rewrite import copy_graph, parts_of

LEAST_GAIN = 4.0
"""Times that the squared error must become smaller: as much as one more bit would give."""
LEAST_GAIN_OF_NORM = 1.05
"""The same where a norm takes the factors in, which costs no time."""
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_POWERS = (0.25, 0.5, 0.75, 1.0)
"""Powers of the features' sizes that are tried: at 1 all become one size, which weights may lose by."""


class FeatureRange:
    """Range and squares of each feature, which the last dimension is; float64 ``(features,)``."""

    def __init__(self) -> None:
        self.low = self.high = self.squares = torch.zeros((), dtype=torch.float64)
        self.rows = 0

    def update(self, x: Tensor) -> None:
        """Take in one batch, a float tensor ``(..., features)``."""
        if x.numel():
            rows = x.detach().reshape(-1, x.shape[-1]).double()
            self.low, self.high = self.low.minimum(rows.amin(0)), self.high.maximum(rows.amax(0))
            self.squares = self.squares + rows.square().sum(0)
            self.rows += len(rows)


def values_of_features(
    program: Program, plan: PrecisionPlan, shared: Collection[str]
) -> dict[fx.Node, list[str]]:
    """Values whose features may get factors, and the linear layers that read them as integers.

    They are rounded for those layers alone: real values, and tensors that are joined for them.

    Args:
        program: the float Program that the plan was made for.
        plan: what becomes uint8.
        shared: parameters whose equal values stay equal.
    """
    heads = {unit.head for unit in (*plan.layers.values(), *plan.adds.values())}
    called = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
    tensors = [id(tensor) for tensor in program.state_dict(keep_vars=True).values()]

    def free(name: str) -> bool:
        layer = program.get_submodule(name) if name else None
        alone = type(layer) is nn.Linear and called.count(name) == tensors.count(id(layer.weight)) == 1
        return alone and f"{name}.weight" not in shared

    found: dict[fx.Node, list[str]] = {}
    for node in program.graph.nodes:
        readers = [user for user in node.users if user in heads]
        joined = plan.roles.get(node) is Role.CAT and len(readers) == len(node.users)
        if readers and node not in plan.inside and (joined or node not in plan.int8):
            names = [str(user.target) if user.op == "call_module" else "" for user in readers]
            if all(free(name) for name in names):
                found[node] = names
    return found


def norm_of(program: Program, value: fx.Node, layers: Sequence[str]) -> str | None:
    """The norm that makes the features for these layers alone, so that it can take factors in, or None."""
    name = str(value.target)
    if value.op != "call_module" or not isinstance(norm := program.get_submodule(name), _NORMS):
        return None
    tensors = [id(tensor) for tensor in program.state_dict(keep_vars=True).values()]
    own = list(norm.parameters())
    alone = all(tensors.count(id(tensor)) == 1 and tensor.dim() == 1 for tensor in own)
    calls = [node for node in program.graph.nodes if str(node.target) == name]
    return name if own and alone and len(calls) == 1 and len(value.users) == len(layers) else None


def feature_factors(
    seen: FeatureRange,
    layers: Sequence[Any],
    bits: int = BITS,
    weight_bits: int = BITS,
    least_gain: float = LEAST_GAIN,
) -> Tensor | None:
    """Factors that the features are divided by, or None where they would gain less than ``least_gain``.

    The squared error of a layer's outputs is predicted: a step of s rounds by s^2 / 12.

    Args:
        seen: of the features.
        layers: the linear layers that read them.
        bits: of the features as integers.
        weight_bits: of those layers' weights.
        least_gain: times that the squared error must become smaller.

    Returns:
        float32 ``(features,)``, powers of two of at most 1.
    """
    size = seen.high.maximum(-seen.low)
    if not seen.rows or not bool(size.any()):
        return None
    # What was always zero may be of any size later.
    relative = torch.where(size > 0, size, size.max()) / size.max()
    weight = torch.cat([layer.weight.detach().double() for layer in layers])

    def error(factors: Tensor) -> float:
        step = ((seen.high / factors).max() - (seen.low / factors).min()) / (levels_of(bits) - 1)
        steps = (weight * factors).abs().amax(1) / weight_limits(weight_bits)[1]
        of_inputs = step.square() * (weight * factors).square().sum()
        of_weights = steps.square().sum() * (seen.squares / seen.rows / factors.square()).sum()
        return float(of_inputs + of_weights)

    tried = [2 ** (power * relative.log2()).round() for power in _POWERS]
    best = min(tried, key=error)
    gains = error(best) * least_gain <= error(torch.ones_like(best))
    return best.float() if gains else None


def with_factors(
    program: Program, layers: Mapping[fx.Node, list[str]], factors: Mapping[fx.Node, Tensor]
) -> Program:
    """The Program that divides values by factors and multiplies the weights of the layers that read them.

    A norm that makes a value for these layers alone has weights that are divided; see :func:`norm_of`.

    Args:
        program: in inference form; it is not changed.
        layers: by value, from ``values_of_features``.
        factors: by value; the others stay as they are.
    """
    graph = copy_graph(program.graph)
    copies = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    scaled: dict[str, nn.Module] = {}
    tensors: dict[str, Tensor] = {}
    for value, factor in factors.items():
        scaled.update({path: _scaled(program.get_submodule(path), factor) for path in layers[value]})
        if (norm := norm_of(program, value, layers[value])) is not None:
            scaled[norm] = _divided(program.get_submodule(norm), factor)
            continue
        name = f"{value.name}_factors"
        while hasattr(program, name):
            name += "_"
        tensors[name] = 1 / factor
        readers = [node for node in graph.nodes if node.target in layers[value]]
        with graph.inserting_before(readers[0]):
            divided = graph.call_function(operator.mul, (copies[value], graph.get_attr(name)))
        for reader in readers:
            reader.replace_input_with(source(reader), divided)
    parts = parts_of(program, program.graph, lambda path: scaled.get(path) or program.get_submodule(path))
    return program.with_graph({**parts, **tensors}, graph)


def _scaled(layer: Any, factor: Tensor) -> nn.Module:
    copied = build(kind_of(layer) or "", config_of(layer))
    copied.weight = nn.Parameter(layer.weight.detach() * factor, requires_grad=False)
    copied.bias = layer.bias
    return copied.eval()


def _divided(norm: Any, factor: Tensor) -> nn.Module:
    copied: Any = build(kind_of(norm) or "", config_of(norm))
    for name, tensor in norm.named_parameters():
        setattr(copied, name, nn.Parameter(tensor.detach() / factor, requires_grad=False))
    divided: nn.Module = copied.eval()
    return divided
