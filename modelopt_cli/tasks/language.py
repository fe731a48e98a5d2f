"""The next token of a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets
from modelopt_cli.errors import DataError
from modelopt_cli.tasks.draws import Counts, Values, share
from modelopt_cli.tasks.regression import stacked
from modelopt_cli.tasks.segmentation import IGNORED, check_places
from modelopt_cli.tasks.task_output import finite, require

TOKENS, MASK = ("input_ids", "tokens", "x"), "attention_mask"


class TokenTargets(TargetFormat):
    """The tokens of a text, int64 ``(N, T)``, ``IGNORED`` where there are none: Hugging Face's ``labels``.

    The token at each place is what the network should say at the place before. Without a target they are the
    tokens of the input itself.
    """

    of_inputs = True

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Tensor:
        """The tokens of one sample; see :class:`TargetFormat`."""
        tokens = _tokens_of(inputs) if raw is None else raw
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dim() != 1:
            raise DataError("target is not a row of token ids")
        wrong = (tokens < 0) & (tokens != IGNORED) if classes is None else _outside(tokens, classes)
        if bool(wrong.any()):
            known = "0 and up" if classes is None else f"0..{classes - 1}"
            raise DataError(f"target holds token {int(tokens[wrong][0])}, outside {known}")
        return tokens.long()

    def collate(self, targets: Sequence[Tensor]) -> Tensor:
        """Tokens ``(N, T)``."""
        return stacked(targets)


def _outside(tokens: Tensor, classes: int) -> Tensor:
    return (tokens != IGNORED) & ((tokens < 0) | (tokens >= classes))


def _tokens_of(inputs: Any) -> Any:
    if not isinstance(inputs, Mapping):
        return inputs
    tokens = next((inputs[name] for name in TOKENS if name in inputs), None)
    if tokens is None or MASK not in inputs:
        return tokens
    return tokens.masked_fill(inputs[MASK] == 0, IGNORED)


def targets(names: tuple[str, ...] | None = None) -> TokenTargets:
    """The format of the targets."""
    return TokenTargets()


def judged(logits: Any, tokens: Targets, inputs: Any) -> Tensor:
    """Logits ``(N, T, vocabulary)``, float32.

    Raises:
        InputError: the network returns another form, or NaN.
        Misfit: a target holds a token that the network does not know.
    """
    assert isinstance(tokens, Tensor)
    fits = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == tokens.shape
    form = f"{tokens.shape[1]}, vocabulary"
    require(fits, logits, len(tokens), "a language model", form, "give one, and texts of its length")
    check_places(tokens, logits.shape[2], "target")
    return finite(logits)


def row_labels(tokens: Tensor, logits: Tensor) -> Tensor:
    """The token after each place, which the logits there are of; none after the last."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED).flatten()


def attended(targets: Any, inputs: Any) -> Tensor | None:
    """Tokens that the attention mask leaves, bool ``(N, T)``; None where there is no such input."""
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def counted(targets: Any, inputs: Any) -> Tensor | None:
    """Tokens that targets do not leave out, bool ``(N, T)``; without targets, those of :func:`attended`."""
    if isinstance(targets, Tensor) and targets.dim() == 2:
        return targets != IGNORED
    return attended(targets, inputs)


def surprise(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the cross-entropies of each text in nats, and number of its tokens that count, ``(N, 2)``."""
    ahead = tokens[:, 1:]
    nats = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), ahead, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([nats.double().sum(1), (ahead != IGNORED).sum(1).double()], 1)


def perplexity(kept: NDArray[np.float64], counts: Counts) -> Values:
    """Exponential of the mean cross-entropy of all tokens of a draw."""
    return np.exp(share(kept, counts))
