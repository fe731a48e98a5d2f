"""What may be trained, and what must hold meanwhile."""

from collections.abc import Mapping

from torch import Tensor

from modelopt_cli.artifact.encodings import pruned_names, without_zeros
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.program import Encoding


def require_trainable(encodings: Mapping[str, Encoding]) -> None:
    """Refuse values that training would change against a promise.

    Raises:
        UsageError: a tensor has been put onto int8 steps or the like.
    """
    for name, encoding in encodings.items():
        if (codec := without_zeros(encoding).codec) != "raw":
            what = f"is stored as {codec} values, which training would change"
            raise UsageError(what, where=name, hint="train first, then quantize or share")


def masks_of(state: Mapping[str, Tensor], encodings: Mapping[str, Encoding]) -> Masks:
    """What keeps pruned weights zero while a network is trained."""
    return Masks({name: state[name] != 0 for name in pruned_names(encodings)})
