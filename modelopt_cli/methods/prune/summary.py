"""Summary of each layer before and after pruning."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from modelopt_cli.artifact.dtypes import count_nonzero
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.context import Reached
from modelopt_cli.methods.prune.target_figures import TARGETS
from modelopt_cli.settings import option

# Endings of the names of a layer's weights; attention has several, also once it is taken apart.
_WEIGHTS = (".weight", ".in_proj_weight", ".q_proj_weight", ".k_proj_weight", ".v_proj_weight", "_weight", "")

_THIN = 0.1  # fraction of what the network keeps, below which a layer has lost far more than others
_SHOWN = 3


@dataclass(frozen=True)
class PrunedLayer:
    """One layer before and after.

    Attributes:
        name: its path in the network.
        kind: its class.
        total: number of weights before, zeros included.
        kept: number of weights after that are not zero.
        shape: of its weight before, of several the first.
        shape_left: of its weight after; None where the layer is removed.
        reason: why it was not pruned, or an empty string.
    """

    name: str
    kind: str
    total: int
    kept: int
    shape: tuple[int, ...]
    shape_left: tuple[int, ...] | None
    reason: str

    @property
    def sparsity(self) -> float:
        """The fraction of its weights that is removed or zero."""
        return 1 - self.kept / self.total if self.total else 0.0


def summary(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], coverage: Coverage
) -> tuple[PrunedLayer, ...]:
    """Summary of every weight-carrying layer, in the order of ``coverage``.

    Args:
        before: state dict of the network before pruning.
        after: state dict of the pruned network.
        coverage: status of each layer.
    """
    layers = []
    for layer in coverage.layers:
        old, new = _weights(before, layer.name), _weights(after, layer.name)
        if old:
            total, kept = sum(t.numel() for t in old), sum(map(count_nonzero, new))
            shape = tuple(new[0].shape) if new else None
            layers.append(
                PrunedLayer(layer.name, layer.kind, total, kept, tuple(old[0].shape), shape, layer.reason)
            )
    return tuple(layers)


def thin_notes(layers: Sequence[PrunedLayer], target: Reached | None) -> tuple[str, ...]:
    """A warning that names layers which keep far less than the network does, or than a sparsity keeps.

    Args:
        layers: all weight-carrying layers.
        target: of the pruning, where it is known.
    """
    kept, total = sum(layer.kept for layer in layers), sum(layer.total for layer in layers)
    share = kept / max(total, 1)
    if target is not None and TARGETS[target.metric].removed:
        share = max(share, 1 - target.wanted)
    least = _THIN * share
    thin = [text for layer in layers if (text := _thin(layer, least))]
    if not thin:
        return ()
    more = f" and {len(thin) - _SHOWN} more layers" if len(thin) > _SHOWN else ""
    line = f"{', '.join(thin[:_SHOWN])}{more}, where the network keeps {100 * share:.0f} %"
    remedy = f"{option('exclude')} keeps a layer unpruned, {option('allocation', 'uniform')} treats all alike"
    return (f"warning: only {line}; {remedy}",)


def _thin(layer: PrunedLayer, least: float) -> str | None:
    """The part of a layer that is left, if it is below a fraction; channels are named before weights."""
    if layer.shape_left is None:
        return None
    names = ("inputs", "outputs") if layer.kind.startswith("ConvTranspose") else ("outputs", "inputs")
    sides = list(zip(names, layer.shape_left, layer.shape, strict=False))
    for name, kept, before in (*sides, ("weights", layer.kept, layer.total)):
        if kept < least * before:
            return f"{kept:,} of {before:,} {name} of {layer.name}"
    return None


def _weights(state: Mapping[str, Tensor], name: str) -> list[Tensor]:
    tensors: Iterable[Tensor | None] = (state.get(name + ending) for ending in _WEIGHTS)
    return [tensor for tensor in tensors if tensor is not None]
