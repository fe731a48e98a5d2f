"""What can be shared without a graph: tables of one size, tensor by tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from modelopt_cli.artifact import Stream
from modelopt_cli.artifact.encodings import is_pruned
from modelopt_cli.artifact.file_plan import PLAIN
from modelopt_cli.artifact.lazy import described
from modelopt_cli.artifact.stream import Item, tied_names
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Progress
from modelopt_cli.methods.layer_selection import (
    codec_of,
    has_weight_form,
    not_named_as_weights,
    weight_labels,
)
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.one_size import Weight, share
from modelopt_cli.methods.share.shared_layers import choose, require_no_more
from modelopt_cli.program import Encoding
from modelopt_cli.program.coverage import Coverage, LayerStatus


@dataclass(frozen=True)
class StateResult:
    """A state dict whose weights are shared tensor by tensor, while it is written.

    Attributes:
        stream: its tensors and how each is stored.
        coverage: what becomes of every weight.
        skipped: the reason for every weight that is left as it is.
    """

    stream: Stream
    coverage: Coverage
    skipped: dict[str, str]


def apply_to_state(
    state: Mapping[str, Tensor],
    config: ShareConfig,
    seed: int = 0,
    encodings: Mapping[str, Encoding] | None = None,
    progress: Progress | None = None,
    *,
    has_network: bool = False,
) -> StateResult:
    """Share the weights of a state dict that has no graph.

    Args:
        state: tensors by name; they are not changed. They may stay in their file until their turn.
        config: tables of one size for each tensor, by a weighting that needs no data.
        seed: of what is drawn.
        encodings: how the tensors were stored so far; what is pruned stays so.
        progress: called with tensors done and their total.
        has_network: whether the tensors are those of a network that cannot be traced.

    Raises:
        UsageError: the config needs a graph.
        NothingCompressed: no tensor can be shared.
    """
    _check(config, has_network)
    shapes, earlier = described(state), encodings or {}
    weights = {name: tensor for name, tensor in shapes.items() if has_weight_form(tensor)}
    chosen = choose(weights, earlier, config, not_named_as_weights(weights))
    tied = tied_names(shapes, earlier)
    names = [name for name in state if name not in tied]

    def item(name: str) -> Item:
        tensor, encoding = state[name], earlier.get(name, PLAIN)
        if name not in chosen.layers:
            return name, tensor, encoding
        shared = share(Weight(tensor.detach().cpu(), is_pruned(encoding)), config, seed)
        values = shared.decode(tensor.dtype)
        require_no_more(name, tensor, values, encoding)
        return name, values, shared.encoding(tensor.dtype)

    def items() -> Iterator[Item]:
        for done, name in enumerate(names, 1):
            yield item(name)  # in a call of its own, so that nothing else of a tensor stays in memory
            if progress is not None:
                progress(done, len(names))

    def status(label: str) -> LayerStatus:
        why = chosen.reasons.get(label, "")
        scheme = "" if why else f"shared {config.size}"
        size, before = sizes.get(label, 0), codec_of(earlier.get(parameters[label]))
        return LayerStatus(label, "weight", not why, scheme, why, bytes=size, before=before)

    parameters = {label: name for name, label in weight_labels(weights).items()}
    sizes = {label: weights[name].nbytes for label, name in parameters.items() if name not in tied}
    labels = [*chosen.layers.values(), *chosen.reasons]
    return StateResult(Stream(items, tied), Coverage(tuple(map(status, labels))), chosen.reasons)


def _check(config: ShareConfig, has_network: bool) -> None:
    name = "" if has_network else "name its network with --arch, or "
    for wanted, what, instead in (
        (config.automatic, "--bits auto", "give a number"),
        (config.weighting not in (None, "none"), f"--weighting {config.weighting}", "use --weighting none"),
        (config.scope == "network", "--scope network", "use --scope tensor or channels"),
    ):
        if wanted:
            raise UsageError(f"{what} needs a network that can be traced", hint=f"{name}{instead}")
    config.size  # noqa: B018 -- raises where nothing says how large the tables are
