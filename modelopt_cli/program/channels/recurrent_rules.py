"""Hidden units of recurrent layers, as channels."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.program.channels.ties import spread
from modelopt_cli.program.channels.trace import Trace

GIVEN = "has a first state that no layer makes"
GATES: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.RNN, nn.RNNCell), 1),
    **dict.fromkeys((nn.GRU, nn.GRUCell), 3),
    **dict.fromkeys((nn.LSTM, nn.LSTMCell), 4),
}
"""Rows that a hidden unit has in a layer's weights."""


def recurrent(t: Trace, path: str, layer: Any, x: Tensor, shape: Any, hx: Any = None) -> Any:
    """``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``.

    A hidden unit is the same one in every layer and direction, which all have equally many, and has a row in
    the weights of each gate. Where an LSTM projects its output (Sak et al., 2014), each hidden unit goes with
    a cell, of which torch wants more.

    Args:
        t: the trace.
        path: of the layer.
        layer: the layer.
        x: input labels, features last.
        shape: of the outputs and of the last state, which is a pair for an LSTM.
        hx: labels of the first state, or a pair of them; None for zeros.
    """
    cells = t.ties.fresh(path, layer.hidden_size)
    hidden = t.ties.fresh(f"{path} projected", layer.proj_size) if layer.proj_size else cells
    inputs = t.ties.line(x, -1)
    t.fields[path] = {"input_size": inputs, "hidden_size": cells}
    if layer.proj_size:
        t.fields[path]["proj_size"] = hidden
        t.ties.same(hidden, cells[: len(hidden)])
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    for number in range(layer.num_layers):
        for direction in directions:
            _weights(t, path, f"_l{number}{direction}", GATES[type(layer)], (inputs, hidden, cells))
        inputs = hidden.repeat(len(directions))
    _begin(t, hx, (hidden, cells))
    outputs, last = shape
    return spread(inputs, -1, outputs), _state(last, (hidden, cells))


def cell(t: Trace, path: str, layer: Any, x: Tensor, shape: Any, hx: Any = None) -> Any:
    """``nn.RNNCell``, ``nn.GRUCell`` and ``nn.LSTMCell``; arguments as for ``recurrent``."""
    hidden, inputs = t.ties.fresh(path, layer.hidden_size), t.ties.line(x, -1)
    t.fields[path] = {"input_size": inputs, "hidden_size": hidden}
    _weights(t, path, "", GATES[type(layer)], (inputs, hidden, hidden))
    _begin(t, hx, (hidden, hidden))
    return _state(shape, (hidden, hidden))


def _weights(t: Trace, path: str, suffix: str, gates: int, lines: tuple[Tensor, Tensor, Tensor]) -> None:
    """Slots of the weights that read ``lines``: inputs and hidden units, and make the last of them, cells."""
    inputs, hidden, cells = lines
    for name, read in (("ih", inputs), ("hh", hidden)):
        t.slot(f"{path}.weight_{name}{suffix}", 0, cells.repeat(gates), "out", gates)
        t.slot(f"{path}.weight_{name}{suffix}", 1, read, "in")
        t.slot(f"{path}.bias_{name}{suffix}", 0, cells.repeat(gates), "bias", gates)
    t.slot(f"{path}.weight_hr{suffix}", 0, hidden, "out")
    t.slot(f"{path}.weight_hr{suffix}", 1, cells, "in")


def _begin(t: Trace, state: Any, lines: tuple[Tensor, Tensor]) -> None:
    """Tie the first state to the channels that it becomes."""
    for value, line in _by_part(state, lines):
        labels = t.ties.line(t.labels(value), -1)
        if bool((labels < 0).all()):
            t.ties.freeze(line, GIVEN)
        else:
            t.ties.same(labels, line)


def _state(shape: Any, lines: tuple[Tensor, Tensor]) -> Any:
    """Labels of a state of this shape, or of a pair of shapes."""
    parts = tuple(spread(line, -1, part) for part, line in _by_part(shape, lines))
    return parts if len(parts) == 2 else parts[0]


def _by_part(state: Any, lines: tuple[Tensor, Tensor]) -> Iterator[tuple[Any, Tensor]]:
    """The parts of a state: the hidden units, and for an LSTM the cells; each with its line of labels."""
    one_state = state is not None and (isinstance(state, torch.Size) or not isinstance(state, tuple | list))
    yield from zip((state,) if one_state else state or (), lines, strict=False)
