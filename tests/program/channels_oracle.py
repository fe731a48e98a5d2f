"""Channel pruning by Torch-Pruning 1.6 and by us, of the same network by the same rule, to be compared."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from modelopt_cli.program import Program
from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.channels import Dependencies, analyse, remove
from modelopt_cli.program.channels.reductions import _origin, is_of_norm

CLASSES = 1000
Shapes = dict[str, tuple[int, ...]]
Keep = dict[str, list[int]]


def kept(units: int, ratio: float, multiple: int = 1) -> int:
    """How many of so many units stay: Torch-Pruning's rule, rounded down."""
    count = int(units * (1 - ratio))
    return count - count % multiple


def importance(units: int) -> Tensor:
    """Scores that scatter what is removed over a layer, the same in every run; the smallest are removed."""
    return torch.arange(units, dtype=torch.float64).mul(0.6180339887498949).frac()


def multiple_of(model: nn.Module) -> int:
    """What Torch-Pruning's documentation has channel counts rounded to: the heads of a ViT, otherwise 1."""
    return model.encoder.layers[0].num_heads if isinstance(model, VisionTransformer) else 1


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that give the logits, which are not pruned; auxiliary heads have their own."""
    found = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [m for m in found if m.weight.shape[0] == CLASSES]


def prune_theirs(model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """Prune in place with Torch-Pruning, with the options its examples give these networks.

    Raises:
        Exception: whatever it fails with.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # it follows autograd's graph
    with _quiet():
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=lambda group: importance(len(group[0].idxs)),
            pruning_ratio=ratio,
            global_pruning=False,
            ignored_layers=classifiers(model),
            round_to=multiple_of(model) if multiple_of(model) > 1 else None,
            in_channel_groups={},  # its defaults are shared between instances
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()
    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels  # as its example does; the forward pass reads it
    return model.eval()


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of all parameters, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Unwrapped parameters detected": the default is what is wanted
        yield


def prune_ours(program: Program, ratio: float, multiple: int = 1) -> tuple[Program, Dependencies, Keep]:
    """Prune by the same rule: of every group as many units, chosen by the same scores.

    Returns:
        The pruned Program, what ``analyse`` found, and the units kept of each group.
    """
    found = analyse(program)
    keep: Keep = {}
    for group in found.groups:
        makes = next(member for member in group.members if member.makes_channels)
        single = len(makes.positions) == group.units  # a head is more than a channel
        count = kept(group.units, ratio, math.lcm(group.step, multiple if single else 1))
        order = importance(group.units).argsort(descending=True)[: max(count, group.step)]
        keep[group.name] = sorted(order.tolist())
    return remove(program, keep, dependencies=found), found, keep


def masked(found: Dependencies, keep: Keep) -> Program:
    """The dense network with the channels that are to go zeroed in every layer that makes or reads them.

    A layer, group or RMS norm takes its statistics over the channels that stay, as a layer or as a function
    with a weight; batch norms need no such mask.
    """
    program = copy.deepcopy(found.program)
    calls = _norms_by_function(program)
    state = program.state_dict(keep_vars=True)
    norms: dict[str, Tensor] = {}
    with torch.no_grad():
        for group in found.groups:
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[keep[group.name]] = False
            for member in group.members:
                positions = member.positions[gone[member.units]]
                if member.role != "statistic":
                    state[member.parameter].index_fill_(member.dim, positions, 0.0)
                layer = member.parameter.rpartition(".")[0]
                named = calls.get(member.parameter, layer)
                if member.role == "norm" and isinstance(program.get_submodule(named), tuple(_MASKED)):
                    width = state[member.parameter].shape[0]
                    norms.setdefault(named, torch.ones(width, dtype=torch.bool))[positions] = False
    for layer, stays in norms.items():
        norm = program.get_submodule(layer)
        program.set_submodule(layer, _MASKED[type(norm)](norm, stays))
    _take_statistics_of_what_stays(program)
    return program


def _take_statistics_of_what_stays(program: Program) -> None:
    """Let the statistics of a norm that is written out count only channels that are not zero, in place."""
    for node in list(program.graph.nodes):
        if operation(node) in ("mean", "var", "std") and is_of_norm(node):
            bound = arguments(node)
            given = bound["input"], _origin(source(node)), operation(node), bound["dim"]
            options = {name: bound[name] for name in ("keepdim", "correction") if bound.get(name) is not None}
            with program.graph.inserting_after(node):
                node.replace_all_uses_with(program.graph.call_function(_statistic, given, options))
            program.graph.erase_node(node)
    program.recompile()


def _statistic(
    x: Tensor, origin: Tensor, name: str, dim: list[int], keepdim: bool = False, correction: float = 1
) -> Tensor:
    dims = [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]
    stays = (origin != 0).sum([d for d in range(x.dim()) if d not in dims], keepdim=True) > 0
    count = stays.expand_as(x).sum(dims, keepdim=True)
    mean = (x * stays).sum(dims, keepdim=True) / count
    variance = ((x - mean) * stays).square().sum(dims, keepdim=True) / (count - correction)
    result = {"mean": mean, "var": variance, "std": variance.sqrt()}[name]
    return result if keepdim else result.squeeze(dims)


def _norms_by_function(program: Program) -> dict[str, str]:
    """Make layers of the norms that are functions with a weight, in place; their names by the weight's."""
    made = {}
    for node in list(program.graph.nodes):
        kind = {F.layer_norm: nn.LayerNorm, F.rms_norm: nn.RMSNorm}.get(node.target)
        if kind is None or node.kwargs.get("weight") is None:
            continue
        weight, bias = node.kwargs["weight"], node.kwargs.get("bias")
        norm = kind(
            node.kwargs["normalized_shape"], node.kwargs.get("eps", None if kind is nn.RMSNorm else 1e-5)
        )
        norm.weight = program.get_parameter(weight.target)
        if kind is nn.LayerNorm:
            norm.bias = program.get_parameter(bias.target) if bias is not None else None
        made[weight.target] = f"{node.name}_as_layer"
        program.add_submodule(made[weight.target], norm)
        with program.graph.inserting_before(node):
            node.replace_all_uses_with(
                program.graph.call_module(made[weight.target], (node.kwargs["input"],))
            )
        program.graph.erase_node(node)
    program.recompile()
    return made


class _MaskedGroupNorm(nn.Module):
    """Wu and He 2018 over some of the channels of each group, written out; the others come out as zero."""

    def __init__(self, norm: nn.GroupNorm, stays: Tensor) -> None:
        super().__init__()
        self.norm, self.stays = norm, stays

    def forward(self, input: Tensor) -> Tensor:
        x = input.unflatten(1, (self.norm.num_groups, -1)).flatten(3)
        stays = self.stays.view(1, self.norm.num_groups, -1, 1)
        count = stays.sum((2, 3), keepdim=True).clamp(min=1) * x.shape[-1]
        apart = (x - (x * stays).sum((2, 3), keepdim=True) / count) * stays
        variance = apart.square().sum((2, 3), keepdim=True) / count
        scaled = (apart / (variance + self.norm.eps).sqrt()).reshape(input.shape)
        shape = (1, -1, *[1] * (input.dim() - 2))
        scaled = scaled * self.norm.weight.view(shape)
        return scaled if self.norm.bias is None else scaled + (self.norm.bias * self.stays).view(shape)


class _MaskedLayerNorm(nn.Module):
    """Ba et al. 2016 over some of the channels, written out; the others come out as zero."""

    def __init__(self, norm: nn.LayerNorm, stays: Tensor) -> None:
        super().__init__()
        self.norm, self.stays = norm, stays

    def forward(self, x: Tensor) -> Tensor:
        count = self.stays.sum()
        mean = (x * self.stays).sum(-1, keepdim=True) / count
        apart = (x - mean) * self.stays
        variance = apart.square().sum(-1, keepdim=True) / count
        scaled = apart / (variance + self.norm.eps).sqrt() * self.norm.weight
        return scaled if self.norm.bias is None else scaled + self.norm.bias * self.stays


class _MaskedRmsNorm(nn.Module):
    """Zhang and Sennrich 2019 over some of the channels, written out; the others come out as zero."""

    def __init__(self, norm: nn.RMSNorm, stays: Tensor) -> None:
        super().__init__()
        self.norm, self.stays = norm, stays

    def forward(self, x: Tensor) -> Tensor:
        square = (x * self.stays).square().sum(-1, keepdim=True) / self.stays.sum()
        eps = torch.finfo(x.dtype).eps if self.norm.eps is None else self.norm.eps
        return x * self.stays / (square + eps).sqrt() * self.norm.weight


_MASKED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.LayerNorm: _MaskedLayerNorm,
    nn.GroupNorm: _MaskedGroupNorm,
    nn.RMSNorm: _MaskedRmsNorm,
}


@dataclass(frozen=True)
class Comparison:
    """Ours next to theirs, over the parameters that both have.

    Attributes:
        same: parameters of equal shape.
        smaller: parameters of which ours is smaller in some dimension and larger in none.
        larger: names of the others, with both shapes; there should be none.
    """

    same: int
    smaller: int
    larger: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def compare(ours: Shapes, theirs: Shapes) -> Comparison:
    """Compare shapes by name."""
    theirs = {name.replace("in_proj_", "in_proj."): shape for name, shape in theirs.items()}
    common = {name: (ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}
    larger = {name: pair for name, pair in common.items() if any(a > b for a, b in zip(*pair, strict=True))}
    same = sum(a == b for a, b in common.values())
    return Comparison(same, len(common) - same - len(larger), larger)
