"""In which order whole blocks go.

With calibration data, by what the output loses: again and again every block that is left is bypassed, and
the one goes without which the output stays closest to the dense network's. Removing the layers that
contribute least is from Chen and Zhao, Shallowing Deep Networks, TPAMI 2019; the greedy search with scores
taken anew after each removal is that of Zhong et al., BlockPruner, Findings of ACL 2025; Men et al.,
ShortGPT, 2024, and Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, ICLR 2025, show how
far it goes.
Without data, by the scores of a block's weights (Elkerdawy et al., To Filter Prune, or to Layer Prune, That
Is the Question, ACCV 2020).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.errors import DataError
from modelopt_cli.program import Program
from modelopt_cli.program.removable import Block, without

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Removal:
    """One step of the order.

    Attributes:
        block: what goes.
        score: what that costs, in the unit of the criterion; of the output's change, in nats per
            sample, between the dense network and what is left with this and all earlier blocks gone.
    """

    block: Block
    score: float


def by_output(
    program: Program,
    blocks: Sequence[Block],
    batches: Callable[[], Iterable[Tensor]],
    progress: Progress | None = None,
) -> Iterator[Removal]:
    """All blocks in greedy order of how little the output changes; each step is computed when asked for.

    The change is the Kullback-Leibler divergence of the softmax from the dense network's, mean over the
    samples; of networks that do not give ``(N, classes)`` the squared error relative to the dense output.
    Of blocks that cost the same the first in the network goes.

    Args:
        program: the dense network, on any device; it is not changed.
        blocks: some of what ``find_blocks`` gave for it.
        batches: opens the calibration samples, float tensors ``(N, *program.input.shape)``, always the
            same; read once for each step.
        progress: called with samples done in this step and None.

    Raises:
        DataError: no samples, or the dense network is not finite on them.
    """
    gone: list[Block] = []
    while left := [block for block in blocks if not _is_gone(block, gone)]:
        scores = _changes(program, [[*gone, block] for block in left], batches, progress)
        best = min(range(len(left)), key=scores.__getitem__)
        gone.append(left[best])
        yield Removal(left[best], scores[best])


def by_weights(
    blocks: Sequence[Block], scores: Mapping[str, Tensor], *, total: bool = False
) -> Iterator[Removal]:
    """All blocks in rising order of the mean score of their weights; of equals the first in the network.

    Args:
        blocks: what ``find_blocks`` gave.
        scores: of single weights, of their shape, by parameter; others do not count.
        total: take the sum, for scores that say what removing a weight costs (Taylor).
    """
    found: list[Removal] = []
    for block in blocks:
        own = [scores[name].double() for name in block.parameters if name in scores]
        count = 1 if total else sum(tensor.numel() for tensor in own)
        found.append(Removal(block, sum(float(tensor.sum()) for tensor in own) / max(count, 1)))
    gone: list[Block] = []
    for removal in sorted(found, key=lambda removal: removal.score):
        if not _is_gone(removal.block, gone):
            gone.append(removal.block)
            yield removal


def _is_gone(block: Block, gone: Iterable[Block]) -> bool:
    """Whether a block has been removed, by itself or inside of another."""
    return any(set(block.layers) <= set(other.layers) for other in gone)


def _changes(
    program: Program,
    removed: Sequence[Sequence[Block]],
    batches: Callable[[], Iterable[Tensor]],
    progress: Progress | None,
) -> list[float]:
    """What each set of blocks costs when it is bypassed."""
    dense, *candidates = [without(program, blocks).eval() for blocks in ([], *removed)]
    device = next(program.parameters()).device
    sums, seen = [0.0] * len(candidates), 0
    with torch.inference_mode():
        for batch in batches():
            images = batch.to(device)
            expected = dense(images).double()
            if not torch.isfinite(expected).all():
                raise DataError(
                    "the network gives NaN or infinity on the calibration data",
                    hint="check the checkpoint and the preprocessing",
                )
            for i, candidate in enumerate(candidates):
                sums[i] += float(_change(candidate(images).double(), expected))
            seen += len(batch)
            if progress is not None:
                progress(seen, None)
    if seen == 0:
        raise DataError("no samples to measure blocks on", hint="give data with at least one sample")
    return [total / seen if total == total else float("inf") for total in sums]


def _change(actual: Tensor, expected: Tensor) -> Tensor:
    """Summed over a batch: the divergence of the softmax, or the relative squared error."""
    if expected.dim() == 2 and expected.shape[1] > 1:
        actual, expected = actual.log_softmax(1), expected.log_softmax(1)
        return (expected.exp() * (expected - actual)).sum()
    flat, wanted = actual.flatten(1), expected.flatten(1)
    return ((flat - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)).sum()
