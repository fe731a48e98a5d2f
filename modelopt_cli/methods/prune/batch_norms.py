"""Batch-norm recalibration: statistics for the activations that a pruned network has.

Adaptive batch normalisation (Li et al., EagleEye, ECCV 2020, section 3.3) as "precise" statistics of the
whole sample (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3). No weight changes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import DataError
from modelopt_cli.methods.batches import require_finite
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, to
from modelopt_cli.program.parted import interpret
from modelopt_cli.program.rewrite import copy_graph, rebuild
from modelopt_cli.settings import option

Progress = Callable[[int, int | None], None]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def recalibrate(
    program: Program,
    batches: Iterable[Inputs],
    progress: Progress | None = None,
    total: int | None = None,
) -> Program:
    """Compute the running means and variances of a network's batch norms again.

    Every batch goes through as in training: each norm uses the batch's own statistics, and the layers
    after it see the result. The running mean becomes the mean over all values, the running variance
    their unbiased variance, whatever the sizes of the batches. Dropout stays off, the momentum and the
    mode of the Program are as before. A last batch of a single sample is left out. A norm that no sample
    reaches, in a network that is captured in parts, keeps its statistics.

    Args:
        program: on any device; it is not changed.
        batches: of the network's inputs; only one is held at a time.
        progress: called with the number of samples done and the total.
        total: the number of samples, where known.

    Returns:
        A Program with new statistics that shares all else with the given one. A network without batch
        norms is returned as it is, and no batch is read.

    Raises:
        DataError: no samples, or one value only per channel, or statistics that are not finite.
    """
    paths = dict.fromkeys(str(node.target) for node in program.graph.nodes if node.op == "call_module")
    pools = {path: Pool() for path in paths if _keeps_statistics(program.get_submodule(path))}
    if not pools:
        return program
    result = rebuild(program, copy_graph(program.graph))
    if _run(result.eval(), pools, batches, progress, total) == 0:
        raise DataError(
            "no samples to compute batch-norm statistics from",
            hint=f"give data, or turn off {option('bn_recalibration')}",
        )
    for path, pool in pools.items():
        if pool.count:  # a part of a network may be one that no sample reaches
            _store(result, path, pool)
    return result.train(program.training)


class Pool:
    """Mean and sum of squared differences from it for each channel (Chan et al. 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, values: Tensor) -> None:
        """Add ``(N, C, ...)``."""
        reduced = [dim for dim in range(values.dim()) if dim != 1]
        variance, mean = torch.var_mean(values, reduced, correction=0)
        count = values.numel() // values.shape[1]
        total, change = self.count + count, mean.double() - self.mean
        self.squares = self.squares + variance.double() * count + change**2 * (self.count * count / total)
        self.mean = self.mean + change * (count / total)
        self.count = total


class _Collector(fx.Interpreter):
    """Interpreter of a graph with its batch norms as in training, whose inputs are added to the pools."""

    def __init__(self, program: Program, pools: dict[str, Pool]) -> None:
        super().__init__(program)
        self.pools = pools

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Normalise by the batch's own statistics where the layer is watched."""
        if target not in self.pools:
            return super().call_module(target, args, kwargs)
        norm: Any = self.module.get_submodule(target)
        (values,) = [*args, *kwargs.values()]
        self.pools[target].add(values)
        return nn.functional.batch_norm(
            values, None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )


def has_statistics(program: Program) -> bool:
    """True if a network has batch norms with running statistics."""
    return any(map(_keeps_statistics, program.modules()))


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, NORMS) and module.running_mean is not None


def _run(
    program: Program,
    pools: dict[str, Pool],
    batches: Iterable[Inputs],
    progress: Progress | None,
    total: int | None,
) -> int:
    device = next(program.buffers()).device
    collector, done = _Collector(program, pools), 0
    with torch.inference_mode():
        for batch in batches:
            size = batch_size(batch)
            if size > 1 or done == 0:
                _run_one(collector, to(batch, device))
            done += size
            if progress is not None:
                progress(done, total)
    return done


def _run_one(collector: _Collector, batch: Inputs) -> None:
    try:
        interpret(collector, collector.module, batch)
    except ValueError as error:  # how torch refuses a single value
        raise DataError(
            f"in a batch of {batch_size(batch)} a batch norm sees one value per channel, without variance",
            hint=f"use more samples and larger batches, or turn off {option('bn_recalibration')}",
        ) from error


def _store(program: Program, path: str, pool: Pool) -> None:
    """Give a layer its new statistics, in tensors of its own."""
    norm: Any = program.get_submodule(path)
    variance = pool.squares / max(pool.count - 1, 1)
    for statistic in (pool.mean, variance):
        require_finite(statistic, f"layer {path}", "prune less")
    norm.running_mean = pool.mean.to(norm.running_mean.dtype)
    norm.running_var = variance.to(norm.running_var.dtype)
