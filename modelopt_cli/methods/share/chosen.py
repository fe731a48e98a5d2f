"""Which weights of a network are shared, what they are called, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from modelopt_cli.artifact.codecs.codebook import DTYPES
from modelopt_cli.artifact.sparsity import is_pruned, is_shared
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.select import layer_names, select_layers
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import Encoding


@dataclass(frozen=True)
class Chosen:
    """Weights to share.

    Attributes:
        layers: what each is called in reports, by parameter name.
        reasons: why others are left as they are, by what they are called.
    """

    layers: dict[str, str]
    reasons: dict[str, str]


def choose(
    weights: Mapping[str, Tensor],
    encodings: Mapping[str, Encoding],
    config: ShareConfig,
    others: Mapping[str, str] | None = None,
) -> Chosen:
    """The weights that can be shared and are wanted.

    Args:
        weights: by parameter name; those on the meta device will do.
        encodings: how they are stored so far.
        config: the globs, and vectors or not.
        others: tensors that are no weights for a reason, by parameter name.

    Raises:
        NothingCompressed: there are none.
        UsageError: a glob matches no layer.
    """
    names = layer_names(weights)
    obstacles = {
        label: (others or {}).get(name) or obstacle(weights[name], encodings.get(name), config)
        for name, label in names.items()
    }
    reasons = {label: why for label, why in obstacles.items() if why is not None}
    able = [label for label, why in obstacles.items() if why is None]
    selected, left_out = select_layers(able, config, obstacles) if able else ([], {})
    reasons |= left_out
    if not selected:
        raise nothing(reasons)
    return Chosen({name: label for name, label in names.items() if label in selected}, reasons)


def obstacle(weight: Tensor, encoding: Encoding | None, config: ShareConfig) -> str | None:
    """Why a weight cannot be shared so; None where it can."""
    if weight.dtype not in DTYPES:
        return f"its type is {str(weight.dtype).removeprefix('torch.')}"
    if config.vector > 1:
        row = weight[0].numel()
        if row % config.vector:
            return f"rows of {row} weights cannot be cut into vectors of {config.vector}"
        if is_pruned(encoding):
            return "it is pruned, and pruned weights are shared one by one"
    return None


def require_no_more(name: str, before: Tensor, after: Tensor, encoding: Encoding | None) -> None:
    """Make sure of what an earlier sharing promised: a weight gets no more different values than it has.

    Args:
        name: of the parameter.
        before: its values as they were given.
        after: as they are now.
        encoding: how it was stored.

    Raises:
        UsageError: it was shared, and has more now.
    """
    if not is_shared(encoding):
        return
    few, many = (len(values.detach().unique()) for values in (before, after))
    if many > few:
        raise UsageError(
            f"is shared already, and would get {many} different values instead of {few}",
            where=name,
            hint="ask for fewer, or start from the network before it was shared",
        )


def nothing(reasons: Mapping[str, str]) -> NothingCompressed:
    """The error that says why nothing could be shared."""
    name, why = next(iter(reasons.items()), ("", ""))
    what = f"no layer can be shared ({name}: {why})" if name else "no layer can be shared"
    return NothingCompressed(what, hint="nothing was written; see --include, --exclude and --vector")
