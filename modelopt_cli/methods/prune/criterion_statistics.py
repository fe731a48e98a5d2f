"""Scores of weights, and the statistics of inputs and gradients that criteria need for them.

The memory does not grow with the samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.data import Data
from modelopt_cli.data.targets import target_count, targets_to
from modelopt_cli.errors import UsageError
from modelopt_cli.measure.accuracy import naming_samples
from modelopt_cli.methods.batches import input_batches, judged_outputs, require_finite
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import (
    Columns,
    LayerPass,
    damped,
    evaluation_copy,
    hessians,
    layers_in_call_order,
    no_samples,
)
from modelopt_cli.methods.matrices import from_matrices, to_matrices, unfold
from modelopt_cli.methods.prune.criteria import CRITERIA, ScoredParameter, alternative, require_data
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.program import Program
from modelopt_cli.program.calls import shown_name
from modelopt_cli.program.input_batch import batch_size, call, to
from modelopt_cli.program.parted import interpret
from modelopt_cli.settings import option
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.training import Objective, StepInputs
from modelopt_cli.training.objectives import label_loss, returns_losses


def collect(
    program: Program, criterion: str, parameters: Sequence[str], context: Context, *, samples: int = 512
) -> dict[str, Tensor]:
    """Run a network on data and collect the statistics that a criterion needs.

    Args:
        program: the network; it is not changed.
        criterion: a key of ``CRITERIA``.
        parameters: the weights to be scored, at least.
        context: data, seed, batch size, device, progress.
        samples: largest number of samples.

    Returns:
        By parameter name a float tensor of the parameter's shape; empty for a criterion that needs nothing.

    Raises:
        UsageError: no data, no labels, or the inputs of a weight cannot be watched.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    row = CRITERIA[criterion]
    require_data(criterion, context.data)
    if row.collect is None or context.data is None:
        return {}
    return row.collect(program, parameters, context.data.sample(samples, context.seed), context)


def weight_scores(
    weights: Mapping[str, Tensor],
    criterion: str,
    promised: Mapping[str, Tensor] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The importance of every weight.

    Args:
        weights: by parameter name.
        criterion: a key of ``CRITERIA`` that has a score of weights.
        promised: masks by parameter name, False for zeros that earlier pruning promised to keep.
        statistics: what ``collect`` gave for this criterion and these weights.
        seed: of random scores.

    Returns:
        By parameter name a float tensor of the weight's shape: larger means more important, and
        ``-inf`` marks zeros that are promised.
    """
    score, promised, statistics = CRITERIA[criterion].score, promised or {}, statistics or {}
    assert score is not None
    scores = {
        name: score(ScoredParameter(name, values, statistics.get(name), seed))
        for name, values in weights.items()
    }
    return {
        name: values.masked_fill(~promised[name], float("-inf")) if name in promised else values
        for name, values in scores.items()
    }


def score_weights(
    program: Program, criterion: str, parameters: Sequence[str], context: Context, *, samples: int = 512
) -> dict[str, Tensor]:
    """``weight_scores`` of some parameters of a network; arguments and errors are those of ``collect``."""
    statistics = collect(program, criterion, parameters, context, samples=samples)
    weights = {name: program.get_parameter(name).detach() for name in parameters}
    return weight_scores(weights, criterion, Masks.of(program).masks, statistics, seed=context.seed)


class _Squares(fx.Interpreter):
    """Interpreter of a graph that adds up squared inputs of layers, over samples but not over positions."""

    def __init__(self, program: Program, layers: Iterable[str]) -> None:
        super().__init__(program)
        self.layers = set(layers)
        self.sums: dict[tuple[fx.Node, torch.Size], Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and str(n.target) in self.layers:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = args[0] if args else kwargs["input"]
            require_finite(value, f"layer {shown_name(n)}")
            total = value.double().square().sum(0, keepdim=True)
            key = (n, total.shape)  # inputs may come in several sizes
            self.sums[key] = self.sums[key] + total if key in self.sums else total
        return super().run_node(n)


def input_norms(
    program: Program, parameters: Sequence[str], data: Data, context: Context
) -> dict[str, Tensor]:
    """Euclidean norm of the values that each weight is multiplied with, over all samples and positions.

    It takes one pass. Squares are added up over samples before they are unfolded: a patch is cut from the
    same place of every sample.
    """
    network = evaluation_copy(program, context.device)
    layers = layers_in_call_order(program, parameters, alternative())
    squares = _Squares(network, layers)
    seen = 0
    for inputs in input_batches(data, context):
        with torch.no_grad():
            interpret(squares, network, to(inputs, context.device))
        seen += batch_size(inputs)
        if context.progress is not None:
            context.progress(seen, data.size)
    if not seen:
        raise no_samples()
    norms: dict[str, Tensor] = {}
    for layer, parameter in layers.items():
        module = network.get_submodule(layer)
        totals = [total for (node, _), total in squares.sums.items() if node.target == layer]
        columns = torch.stack([part.sum(1) for total in totals for part in unfold(module, total)]).sum(0)
        norms[parameter] = _of_weight_shape(module, columns.sqrt())
    return norms


def _of_weight_shape(module: Any, columns: Tensor) -> Tensor:
    """A number for each column, ``(groups, columns)``, for every weight of the column."""
    rows = to_matrices(module, module.weight).shape[1]
    return from_matrices(module, columns.unsqueeze(1).expand(-1, rows, -1)).float().cpu()


def curvatures(
    program: Program, parameters: Sequence[str], data: Data, context: Context
) -> dict[str, Tensor]:
    """1 / [H^-1]_jj with H = X^T X, over the energy of the layer's outputs; one layer's Hessian at a time.

    Times the squared weight it is the part of the layer's output that the removal of the weight costs.
    """
    network = evaluation_copy(program, context.device)
    layers = layers_in_call_order(program, parameters, alternative())
    weights = {layer: _matrices(network, layer) for layer in layers}
    columns = {layer: Columns(weight.shape[-1]) for layer, weight in weights.items()}
    statistics: dict[str, Tensor] = {}
    for layer, parts in hessians(LayerPass(network, data, context), layers, columns):
        energy, inverses = 0.0, []
        for (start, stop), hessian in zip(columns[layer].spans, parts, strict=True):
            weight = weights[layer][..., start:stop]
            energy += float(((weight @ hessian) * weight).sum())
            factor = torch.linalg.cholesky(damped(hessian))
            inverses.append(torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1))
        relative = 1 / torch.cat(inverses, -1) / (energy or 1.0)
        statistics[layers[layer]] = _of_weight_shape(network.get_submodule(layer), relative)
    return statistics


def _matrices(network: Program, layer: str) -> Tensor:
    module: Any = network.get_submodule(layer)
    return to_matrices(module, module.weight.detach()).double()


def squared_gradients(program: Program, data: Data, context: Context) -> dict[str, Tensor]:
    """(parameter * gradient of the task's loss)^2, averaged over batches, by parameter name.

    Of every parameter of the network, biases included; one that the output does not depend on gets zeros.

    Raises:
        UsageError: the task has no loss of outputs and targets.
        DataError: no samples, a target that does not go with the network, or the network gives no finite
            numbers.
        InputError: the network is not one for the task.
    """
    objective = _loss_of(context.task)
    data = context.task.read_targets(data, program.labels)
    network = evaluation_copy(program, context.device).requires_grad_(True)
    parameters = dict(network.named_parameters())
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    batches = seen = 0
    for inputs, targets in data.batches(context.batch_size, workers=context.workers):
        moved, wanted = to(inputs, context.device), targets_to(targets, context.device)
        outputs = call(network, moved)
        for output in judged_outputs(outputs, context.task):
            require_finite(output, data.name)
        with naming_samples(data.name, seen, data.where):
            context.task.judged(outputs, wanted, moved)
        loss = objective(context.task.find(outputs), wanted, StepInputs(moved))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                sums[name] += (parameter.detach().double() * gradient).square()
        batches, seen = batches + 1, seen + target_count(targets)
        if context.progress is not None:
            context.progress(seen, data.size)
    if not batches:
        raise no_samples()
    return {name: (total / batches).float().cpu() for name, total in sums.items()}


def _loss_of(task: TaskSpec) -> Objective:
    """The loss of a task's outputs and targets; raises UsageError where it has none."""
    if returns_losses(task):
        raise UsageError(
            f"needs a loss of outputs and targets, and a network to {task.text} computes its own in training",
            where=option("criterion"),
            hint=f"use {alternative()}, which needs no loss",
        )
    return label_loss(task)
