"""Sizes as values: what they count has to stay where no one number could take their place.

A number that scales values keeps what it was before channels went: it is put in as it was (``Replay``). That
cannot be done with one that depends on the batch size, too, nor with a shape.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.channels.trace import Fetched, Trace

_OWN_SHAPE = ("layer_norm", "rms_norm")
"""Operations that are called with the shape of their own input, whatever that is."""


def freeze_sizes(t: Trace, node: fx.Node) -> None:
    """Freeze the channels that a node's arguments count, if those are no plain numbers."""
    if operation(node) in _OWN_SHAPE:
        return
    for argument in node.all_input_nodes:
        value = t.values[argument.name]
        number = isinstance(value, int | float) and value != t.batched[argument.name]
        if number or isinstance(value, torch.Size):
            _freeze(t, argument, None)


def _freeze(t: Trace, number: fx.Node, dims: Iterable[int] | None) -> None:
    """Freeze what a number is made from; ``dims`` are the places of a shape that are read."""
    for read in number.all_input_nodes:
        value = t.values[read.name]
        if isinstance(value, Tensor | Fetched):
            labels = t.labels(value)
            varying = t.ties.varying(labels)
            own = _dims_read(number, labels.dim()) if dims is None else dims
            if any(d % labels.dim() in varying for d in own):
                t.ties.freeze(labels, "has its size used as a value")
        else:
            _freeze(t, read, _dims_read(number, len(value)) if isinstance(value, torch.Size) else None)


def _dims_read(node: fx.Node, count: int) -> Iterable[int]:
    """The dimensions whose size a node reads, of a tensor or of a shape with so many."""
    bound = arguments(node) if operation(node) in ("size", "getitem") else {}
    index = bound.get("dim", bound.get("index"))
    if isinstance(index, int):
        return [index]
    return range(count)[index] if isinstance(index, slice) else range(count)
