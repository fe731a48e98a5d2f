"""Losses with targets, of every task: functions of the output that is learned and the batch's targets.

All return the mean over the batch, a scalar. What a target marks with ``IGNORED`` does not count.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.errors import DataError, InputError
from modelopt_cli.tasks.embedding import pooled
from modelopt_cli.tasks.restoration import middle
from modelopt_cli.tasks.segmentation import IGNORED, place_logits
from modelopt_cli.tasks.sequence import AUTO, by_frames, require_frames
from modelopt_cli.tasks.task_output import form_of


def binary_cross_entropy(
    logits: Tensor, rows: Tensor, inputs: Any, *, label_smoothing: float = 0.0, **settings: Any
) -> Tensor:
    """Cross-entropy of each class by itself, in nats; the mean over samples and classes."""
    return F.binary_cross_entropy_with_logits(logits, (1 - label_smoothing) * rows + label_smoothing / 2)


def squared_error(output: Tensor, targets: Tensor, inputs: Any, **settings: Any) -> Tensor:
    """Mean squared error of rows of numbers, or of images."""
    return F.mse_loss(*_aligned(output, targets))


def absolute_error(output: Tensor, targets: Tensor, inputs: Any, **settings: Any) -> Tensor:
    """Mean absolute error of rows of numbers, or of images."""
    return F.l1_loss(*_aligned(output, targets))


def huber(output: Tensor, targets: Tensor, inputs: Any, **settings: Any) -> Tensor:
    """Half the squared error where that is below 1, and the absolute error less a half beyond.

    P. Huber, Robust Estimation of a Location Parameter, The Annals of Mathematical Statistics 35:73, 1964.
    """
    return F.huber_loss(*_aligned(output, targets))


def _aligned(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one shape: of images ``(N, C, H, W)`` the middle, where the network loses the border."""
    if targets.dim() != 4:
        return output.reshape(targets.shape), targets
    wanted = middle(targets, output)
    if wanted is None:
        raise DataError(f"targets are {form_of(targets)}, the network returns {form_of(output)}")
    return output, wanted


def places(
    logits: Tensor, masks: Tensor, inputs: Any, *, label_smoothing: float = 0.0, **settings: Any
) -> Tensor:
    """Cross-entropy of each pixel, in nats; logits of another size than the masks are resized."""
    resized = place_logits(logits, masks)
    return _over_places(resized, masks, label_smoothing)


def next_tokens(
    logits: Tensor, tokens: Tensor, inputs: Any, *, label_smoothing: float = 0.0, **settings: Any
) -> Tensor:
    """Cross-entropy of each token after the first, in nats."""
    return _over_places(logits[:, :-1].transpose(1, 2), tokens[:, 1:], label_smoothing)


def _over_places(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy, 0 where nothing counts."""
    total = F.cross_entropy(
        logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
    )
    counted = (targets != IGNORED).sum().clamp(min=1)
    return total / counted


def ctc(
    logits: Tensor,
    targets: dict[str, Tensor],
    inputs: Any,
    *,
    blank: int = 0,
    batch_first: str = AUTO,
    **settings: Any,
) -> Tensor:
    """Connectionist temporal classification (A. Graves et al., ICML 2006), in nats for each symbol.

    Raises:
        Misfit: a target is too long for the frames, so that nothing could be learned of it.
    """
    frames = by_frames(logits, len(targets["lengths"]), batch_first)
    require_frames(targets, frames.shape[1])
    lengths = torch.full((len(frames),), frames.shape[1], dtype=torch.int64)
    return F.ctc_loss(
        frames.log_softmax(2).transpose(0, 1),
        targets["ids"],
        lengths,
        targets["lengths"].cpu(),
        blank=blank,
    )


def cosine(output: Tensor, targets: dict[str, Tensor], inputs: Any, **settings: Any) -> Tensor:
    """One minus the cosine with the vector that each sample should have.

    Of pairs, the squared difference of their cosine and their score, of those that are both in the batch.
    """
    vectors = F.normalize(pooled(output, inputs, len(output)))
    if "vector" in targets:
        return (1 - (vectors * F.normalize(targets["vector"])).sum(1)).mean()
    same = targets["pair"].unsqueeze(0) == targets["pair"].unsqueeze(1)
    earlier, later = same.triu(1).nonzero(as_tuple=True)
    error = (vectors[earlier] * vectors[later]).sum(1) - targets["score"][earlier]
    return error.square().sum() / max(1, len(earlier)) + 0.0 * vectors.sum()


def own(losses: Any, targets: Any, inputs: Any, **settings: Any) -> Tensor:
    """The sum of the losses that a network returns in training, as torchvision's detectors do."""
    parts = list(losses.values()) if isinstance(losses, dict) else [losses]
    if not parts or not all(isinstance(part, Tensor) and part.dim() == 0 for part in parts):
        raise InputError(
            f"returns {form_of(losses)} in training, not losses",
            where="the network",
            hint="have it take (images, targets) and return a dictionary of losses in training mode",
        )
    return torch.stack([part.float() for part in parts]).sum()
