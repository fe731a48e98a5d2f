"""From scores to masks: which weights stay, for every structure that leaves zeros behind."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.artifact.sparsity import pruned_names
from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.program import Program


@dataclass(frozen=True)
class Structure:
    """Which zeros may be put into a weight.

    Attributes:
        kind: "unstructured" for single weights, "block" for runs of neighbouring weights of a row,
            "N:M" for at most ``keep`` nonzeros in every ``group`` neighbouring input channels.
        group: M, or the length of a block.
        keep: N.
    """

    kind: str = "unstructured"
    group: int = 1
    keep: int = 0

    @classmethod
    def of(cls, config: PruneConfig) -> "Structure":
        """The structure a config asks for.

        Raises:
            UsageError: one that leaves no zeros behind: channels or layers.
        """
        if config.pattern is not None:
            return cls("N:M", config.pattern[1], config.pattern[0])
        if config.structure == "block":
            return cls("block", config.block)
        if config.structure == "unstructured":
            return cls()
        raise UsageError(f"structure {config.structure} has no masks")

    def rows(self, weight: Tensor) -> Tensor:
        """A weight, or anything of its shape, with the direction in which neighbours are counted last.

        For N:M these are the input channels (dimension 1), separately for each kernel position, as
        sparse matrix kernels read them. For blocks it is the whole row of one output, in memory order.
        """
        return weight.movedim(1, -1) if self.kind == "N:M" else weight.flatten(1)

    def unrows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of ``rows``."""
        return rows.movedim(-1, 1) if self.kind == "N:M" else rows.reshape(shape)

    def obstacle(self, shape: Iterable[int]) -> str | None:
        """Why a weight of this shape can have no such zeros; None where it can."""
        length = self.rows(torch.empty(tuple(shape), device="meta")).shape[-1]
        if length >= self.group:
            return None
        what = "input channels" if self.kind == "N:M" else "weights in a row"
        return f"{length} {what}, fewer than {self.group}"

    def units(self, scores: Tensor) -> Tensor:
        """The scores of what can be removed by itself, in a row; a block's is the sum of its weights'.

        Weights that are gone already score ``-inf``; a block of such weights only does so too.
        What is left over at the end of a row, too short for a block, is no unit.
        """
        if self.kind != "block":
            return scores.flatten()
        blocks = _grouped(self.rows(scores), self.group)
        gone = torch.isneginf(blocks)
        sums = torch.where(gone, 0, blocks).sum(-1)
        return sums.masked_fill(gone.all(-1), -torch.inf).flatten()


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` smallest of ``scores``; among equals those that come first.

    Args:
        scores: any shape, without NaN.
        count: how many, at most the number of scores.

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


def mask_of(scores: Tensor, structure: Structure, sparsity: float) -> Tensor:
    """The mask of one weight: the units of the lowest scores go.

    Args:
        scores: of the weight's shape, larger means more important, ``-inf`` means gone already.
        structure: what goes together.
        sparsity: fraction of the units to remove; not used for N:M.

    Returns:
        Booleans of the same shape, False where the weight is zero. Exactly the number of units
        nearest to ``sparsity`` is False, and every weight that was gone before.
    """
    if structure.kind == "N:M":
        keep = _pattern(scores, structure)
    else:
        units = structure.units(scores)
        gone = lowest(units, round(sparsity * units.numel()))
        keep = (
            ~gone.view(scores.shape)
            if structure.kind == "unstructured"
            else _unblocked(gone, scores, structure)
        )
    return keep & ~torch.isneginf(scores)


def _pattern(scores: Tensor, structure: Structure) -> Tensor:
    rows = structure.rows(scores)
    groups = _grouped(rows, structure.group)
    keep = torch.ones(rows.shape, dtype=torch.bool, device=rows.device)
    kept = ~lowest_in_groups(groups, structure.group - structure.keep)
    keep[..., : groups.shape[-2] * structure.group] = kept.flatten(-2)
    return structure.unrows(keep, scores.shape)


def lowest_in_groups(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` smallest along the last dimension; among equals those that come first."""
    order = scores.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _unblocked(gone: Tensor, scores: Tensor, structure: Structure) -> Tensor:
    keep = torch.ones_like(structure.rows(scores), dtype=torch.bool)
    whole = keep.shape[-1] // structure.group
    keep[..., : whole * structure.group] = ~gone.view(-1, whole).repeat_interleave(structure.group, -1)
    return structure.unrows(keep, scores.shape)


def _grouped(rows: Tensor, size: int) -> Tensor:
    """Whole groups of ``size`` along the last dimension; the rest of a row is left out."""
    whole = rows.shape[-1] // size
    groups: Tensor = rows[..., : whole * size].unflatten(-1, (whole, size))
    return groups


def weight_masks(
    scores: Mapping[str, Tensor], structure: Structure, sparsities: Mapping[str, float]
) -> dict[str, Tensor]:
    """Masks for several weights, by parameter name; see ``mask_of``.

    Raises:
        ModeloptError: a score is NaN.
    """
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ModeloptError("scores are not numbers", where=name)
    return {name: mask_of(score, structure, sparsities.get(name, 0.0)) for name, score in scores.items()}


class Masks:
    """Zeros that hold through training: a companion of the training loop.

    Attributes:
        masks: parameter name -> booleans of its shape, False where it stays zero.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    @classmethod
    def of(cls, program: Program) -> "Masks":
        """The zeros that earlier pruning promised."""
        state = program.state_dict()
        pruned = sorted(pruned_names(program.encodings))
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
        """Nothing: the zeros are put back after each step."""

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Undo what the optimizer did to pruned weights."""
        self.apply_(network)

    def state(self) -> dict[str, Tensor]:
        """The masks, for a training state."""
        return dict(self.masks)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the masks of a training state."""
        self.masks = {name: mask.to(torch.bool) for name, mask in state.items()}
