"""Masks of weights: from scores to the weights that stay, and zeros that hold through training."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import pruned_names
from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.prune.structures import SparsityPattern
from modelopt_cli.program import Encoding, Program


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest of ``scores``; among equals those that come first.

    Args:
        scores: any shape, without NaN.
        count: at most the number of scores.

    Returns:
        Booleans of the same shape, exactly ``count`` of them True.
    """
    flat = scores.flatten()
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(flat, count)
    marked = flat < threshold
    spare = count - int(marked.sum())
    marked[(flat == threshold).nonzero()[:spare, 0]] = True
    return marked.view(scores.shape)


def _kth_smallest(flat: Tensor, count: int) -> float:
    """The ``count``-th smallest score; NumPy finds it in a third of the memory that torch takes."""
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        return float(np.partition(flat.detach().numpy(), count - 1)[count - 1])
    return float(flat.kthvalue(count).values)


def mask_of(scores: Tensor, pattern: SparsityPattern, sparsity: float) -> Tensor:
    """The mask of one weight: the units of the lowest scores go.

    Args:
        scores: of the weight's shape, larger means more important, ``-inf`` means gone already.
        pattern: the zeros that may be put.
        sparsity: fraction of the units to remove; not used for N:M.

    Returns:
        Booleans of the same shape, False where the weight becomes zero: exactly the number of units
        nearest to ``sparsity``, and every weight that was gone before.
    """
    if pattern.fixed:
        gone = lowest_in_groups(pattern.grouped(pattern.rows(scores)), pattern.group - pattern.keep)
        keep = _spread(~gone.flatten(-2), scores, pattern)
    else:
        units = pattern.units(scores)
        gone = lowest(units, round(sparsity * units.numel()))
        keep = ~gone.view(scores.shape) if pattern.unit == 1 else _unblocked(~gone, scores, pattern)
    return keep & ~torch.isneginf(scores)


def lowest_in_groups(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest along the last dimension; among equals those that come first."""
    order = scores.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _unblocked(keep: Tensor, scores: Tensor, pattern: SparsityPattern) -> Tensor:
    blocks = pattern.rows(scores).shape[-1] // pattern.unit
    return _spread(keep.view(-1, blocks).repeat_interleave(pattern.unit, -1), scores, pattern)


def _spread(kept: Tensor, scores: Tensor, pattern: SparsityPattern) -> Tensor:
    """A mask of a weight's shape from that of its rows; a remainder at the end of a row stays."""
    keep = torch.ones_like(pattern.rows(scores), dtype=torch.bool)
    keep[..., : kept.shape[-1]] = kept
    return pattern.unrows(keep, scores.shape)


def weight_masks(
    scores: Mapping[str, Tensor], pattern: SparsityPattern, sparsities: Mapping[str, float]
) -> dict[str, Tensor]:
    """Masks for several weights, by parameter name; see ``mask_of``.

    Raises:
        ModeloptError: a score is NaN.
    """
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ModeloptError("scores are not numbers", where=name)
    return {name: mask_of(score, pattern, sparsities.get(name, 0.0)) for name, score in scores.items()}


class Masks:
    """Zeros that hold through training: a callback of the training loop.

    Attributes:
        masks: parameter name -> booleans of its shape, False where it stays zero.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    @classmethod
    def of(cls, program: Program) -> "Masks":
        """The zeros that earlier pruning promised."""
        return cls.of_state(program.state_dict(), program.encodings)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], encodings: Mapping[str, Encoding]) -> "Masks":
        """The zeros that earlier pruning promised of tensors without a graph."""
        pruned = sorted(pruned_names(encodings))
        return cls({name: state[name] != 0 for name in pruned if state[name].is_floating_point()})

    def apply_(self, network: nn.Module) -> None:
        """Put the zeros into a network that has these parameters."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameter = network.get_parameter(name)
                if mask.device != parameter.device:
                    mask = self.masks[name] = mask.to(parameter.device)
                parameter.masked_fill_(~mask, 0)

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Do nothing: the zeros are put back after each step."""

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Undo the optimizer's changes of pruned weights."""
        self.apply_(network)

    def state(self) -> dict[str, Tensor]:
        """The masks, for a training state."""
        return dict(self.masks)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the masks of a training state."""
        self.masks = {name: mask.to(torch.bool) for name, mask in state.items()}
