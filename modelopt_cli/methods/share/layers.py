"""Going through a network's layers to share them, each on inputs that went through those shared before."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.matrices import from_matrices, to_matrices, unseen_inputs
from modelopt_cli.methods.share.compensate import Curvature, Levels, compensated
from modelopt_cli.methods.walk import Columns, Walk, calibration, hessians, layers_of
from modelopt_cli.program import Program


@dataclass(frozen=True)
class Layer:
    """A layer whose inputs are known.

    Attributes:
        parameter: the name of its weight.
        module: the layer itself; its weight may be changed.
        hessians: second moments of its inputs, summed over samples, for each span of its columns, on the
            CPU like all that is computed from them.
        columns: where they are cut, and whether the last one is the bias'.
        samples: how many were looked at.
    """

    parameter: str
    module: Any
    hessians: list[Tensor]
    columns: Columns
    samples: int

    @property
    def weight(self) -> Tensor:
        """``(groups, rows, columns)``, float64."""
        return to_matrices(self.module, self.module.weight.detach()).double().cpu()

    @property
    def bias(self) -> Tensor | None:
        """``(groups, rows)``, float64, if the curvature knows it."""
        if not self.columns.constant:
            return None
        bias: Tensor = self.module.bias.detach().double().cpu()
        return bias.view(getattr(self.module, "groups", 1), -1)

    def curvature(self) -> Curvature:
        """What errors of its weights do to its outputs."""
        columns = self.columns
        return Curvature.of(self.hessians, columns.spans, self.samples, constant=columns.constant)

    def importance(self, curvature: Curvature) -> Tensor:
        """What the error of each weight costs, float32 of the weight's shape."""
        groups, rows, count = self.weight.shape
        spread = curvature.importance(count).unsqueeze(1).expand(groups, rows, count)
        return from_matrices(self.module, spread).float()

    def choose(
        self, curvature: Curvature, levels: Levels, free: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The level of each weight, int64 of the weight's shape, and the bias that goes with it."""
        mask = None if free is None else to_matrices(self.module, free)
        index, bias = compensated(self.weight, self.bias, curvature, levels, mask)
        return from_matrices(self.module, index), bias

    def error(self, change: Tensor) -> float:
        """The squared error of the outputs, summed over samples, with the bias that makes it least.

        Args:
            change: of the weight, of its shape.
        """
        moved = to_matrices(self.module, change).double()
        total, count = 0.0, moved.shape[-1]
        for (start, stop), hessian in zip(self.columns.spans, self.hessians, strict=True):
            part, moments = moved[..., start : min(stop, count)], hessian
            if stop > count:
                mean = hessian[..., -1:, :-1]
                moments = hessian[..., :-1, :-1] - mean.mT @ mean / hessian[..., -1:, -1:]
            total += float(((part @ moments) * part).sum())
        return total

    def shift(self, change: Tensor) -> Tensor | None:
        """What the bias must change by to keep the mean of the outputs, flat; None if it is not known."""
        if not self.columns.constant or len(self.columns.spans) > 1:
            return None
        hessian = self.hessians[0]
        mean = hessian[..., :-1, -1:] / hessian[..., -1:, -1:]
        return -(to_matrices(self.module, change).double() @ mean).flatten()


def watchable(program: Program, names: Iterable[str]) -> list[str]:
    """Those weights whose inputs can be watched."""
    return [name for name in names if unseen_inputs(program, name) is None]


def layers(network: Program, names: Iterable[str], context: Context, samples: int) -> Iterator[Layer]:
    """Layers in the order in which they are called, their inputs as the layers before have become by then.

    Args:
        network: on the context's device, in evaluation mode; its weights may be changed on the way.
        names: of weights whose inputs can be watched.
        context: data, seed, batch size, progress.
        samples: how many to look at, at most.

    Raises:
        UsageError: no data.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    data = calibration(context, "weighting hessian", samples, "--weighting none")
    by_layer = layers_of(network, names)
    columns = {layer: _columns(network.get_submodule(layer)) for layer in by_layer}
    for layer, moments in hessians(Walk(network, data, context), by_layer, columns):
        module = network.get_submodule(layer)
        on_cpu = [moment.cpu() for moment in moments]
        yield Layer(by_layer[layer], module, on_cpu, columns[layer], data.size or samples)


def _columns(module: nn.Module) -> Columns:
    count = to_matrices(module, module.get_parameter("weight")).shape[-1]
    return Columns(count, constant=getattr(module, "bias", None) is not None)


def put(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer other values."""
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight)
        if bias is not None:
            module.get_parameter("bias").copy_(bias.flatten())
