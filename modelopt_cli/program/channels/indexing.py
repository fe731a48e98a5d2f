"""Reading places of a value: by slices, by numbers, by tensors."""

from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program.calls import arguments
from modelopt_cli.program.channels.trace import Fetched, Trace


def getitem(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """``x[...]`` of tensors, and of anything else as it is."""
    value, index = bound["input"], bound["index"]
    if not isinstance(value, Tensor | Fetched):
        return value[index]
    index = index if isinstance(index, tuple) else (index,)
    looked_up = [place for place, part in enumerate(index) if isinstance(part, Tensor | Fetched | list)]
    if not looked_up:
        labels = t.labels(value)
        _pick(t, labels, picked_dims(index, labels.dim()))
        if _steps_and_more(t, labels, index):
            return t.unsupported(node, bound, "is sliced with a step, along with other dimensions")
        return labels[index]
    plain = all(part == slice(None) for place, part in enumerate(index) if place not in looked_up)
    if len(looked_up) > 1 or not plain:
        return t.unsupported(node, bound)
    return _look_up(t, node, value, looked_up[0], index[looked_up[0]])


def indices_of(node: fx.Node) -> tuple[Any, ...]:
    """The parts of the index of ``x[...]``, one for each dimension."""
    index = arguments(node)["index"]
    return index if isinstance(index, tuple) else (index,)


def picked_dims(index: tuple[Any, ...], rank: int) -> dict[int, int]:
    """The dimensions of which an index picks one place, and which."""
    return {dim: part for dim, part in by_dimension(index, rank).items() if isinstance(part, int)}


def by_dimension(index: tuple[Any, ...], rank: int) -> dict[int, Any]:
    """The parts of an index, by the dimension of the indexed value."""
    parts, dim = {}, 0
    for place, part in enumerate(index):
        if part is ...:
            dim = rank - sum(p is not None for p in index[place + 1 :])
        elif part is not None:
            parts[dim] = part
            dim += 1
    return parts


def _steps_and_more(t: Trace, labels: Tensor, index: tuple[Any, ...]) -> bool:
    """True if an index steps over channels, which makes it an ``index_select``, and does more than that."""
    by_dim = by_dimension(index, labels.dim())
    stepped = [d for d, part in by_dim.items() if isinstance(part, slice) and part.step not in (None, 1)]
    busy = [part for part in index if part is not ... and part != slice(None)]
    return len(busy) > 1 and any(d in t.ties.varying(labels) for d in stepped)


def _pick(t: Trace, labels: Tensor, places: dict[int, Any]) -> None:
    """A channel that is picked by its place has to stay."""
    for dim in places.keys() & set(t.ties.varying(labels)):
        t.ties.freeze(labels.select(dim, places[dim]), "is picked by its place")


def select(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """One place along a dimension."""
    labels, dim, place = t.labels(bound["input"]), bound["dim"], bound["index"]
    _pick(t, labels, {dim % labels.dim(): place})
    return labels.select(dim, place)


def unbind(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """All places along a dimension, one by one."""
    labels = t.labels(bound["input"])
    dim = bound["dim"] % labels.dim()
    for place in range(labels.shape[dim]):
        _pick(t, labels, {dim: place})
    return labels.unbind(dim)


def index_select(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """The places along a dimension that a tensor names."""
    value = bound["input"]
    return _look_up(t, node, value, bound["dim"] % t.labels(value).dim(), bound["index"])


def _look_up(t: Trace, node: fx.Node, value: Any, dim: int, index: Any) -> Any:
    """Places that an index tensor picks along one dimension: known, or else any of them."""
    labels, shape = t.labels(value), t.shapes[node.name]
    known = index.tensor if isinstance(index, Fetched) else None
    if isinstance(index, list):
        known = torch.tensor(index)
    if known is not None and known.dim() == 1 and known.dtype == torch.int64 and not known.is_meta:
        return labels.index_select(dim, known.cpu() % labels.shape[dim])
    if isinstance(index, Tensor):
        t.ties.freeze(index, "is used as an index")
    labels = t.ties.mix(labels, [dim], "is looked up by an index").select(dim, 0)
    added = len(shape) - labels.dim()
    return labels[(slice(None),) * dim + (None,) * added].expand(shape)
