"""Quantized recurrent layers: their products are int8 linear layers, everything between those is float32.

The products with the inputs are computed for all steps at once. The state of GRUs and LSTMs lies within -1
and 1 whatever the weights, if it starts there, so its scale needs no calibration; a state beyond is clipped.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelopt_cli.program.quantization import (
    BITS,
    QParams,
    levels_of,
    quantize,
    real_input,
    weight_limits,
    width_label,
)
from modelopt_cli.program.quantized import WEIGHT_BITS, Quantized
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear

State = tuple[Tensor, ...]


def state_qparams(bits: int = BITS) -> QParams:
    """Scale and zero point of states of so many bits."""
    return QParams(1 / weight_limits(bits)[1], levels_of(bits) // 2, bits)


def _gru(inputs: Tensor, states: Tensor, state: State) -> State:
    """A step of Cho et al. (EMNLP 2014), of its products with input and state, gates (reset, update, new)."""
    reset, update, new = inputs.chunk(3, -1)
    state_reset, state_update, state_new = states.chunk(3, -1)
    kept = (update + state_update).sigmoid_()
    candidate = torch.addcmul(new, (reset + state_reset).sigmoid_(), state_new).tanh_()
    return (torch.lerp(candidate, state[0], kept),)


def _lstm(inputs: Tensor, states: Tensor, state: State) -> State:
    """A step of Hochreiter and Schmidhuber (1997), gates (input, forget, cell, output)."""
    entering, kept, candidate, leaving = (inputs + states).chunk(4, -1)
    cell = torch.addcmul(kept.sigmoid() * state[1], entering.sigmoid(), candidate.tanh())
    return leaving.sigmoid() * cell.tanh(), cell


def renamed_weights(before: Iterable[str], after: Iterable[str]) -> dict[str, str]:
    """Weights of recurrent layers that are those of linear layers now: the name before to the name after."""
    there = set(after)
    renames: dict[str, str] = {}
    for name in before:
        path, _, leaf = name.rpartition(".")
        if leaf.startswith(("weight_ih", "weight_hh")) and name not in there:
            renamed = f"{path}.{leaf.removeprefix('weight_')}.weight"
            renames |= {name: renamed} if renamed in there else {}
    return renames


class QuantizedRecurrent(Quantized):
    """A recurrent layer, float32 in and out, whose weights are int8.

    It consists of an int8 linear layer for the inputs, ``ih_l0``, and one for the states, ``hh_l0``, and of
    more for further layers and the other direction, called as torch calls their weights.

    Attributes:
        gates: that one product computes.
        step: the next state, of the products with input and state and the state.
        states: tensors that a state consists of.
        rounding: of inputs and states to what the linear layers take.
        scheme: name of the arithmetic, in reports.
        weight_bits: of the integers of all weights.
        state_bits: of states, and of inputs that are scaled at every call.
    """

    gates: ClassVar[int]
    states: ClassVar[int] = 1
    scheme: ClassVar[str] = "int8"
    step: Callable[[Tensor, Tensor, State], State]
    rounding: Callable[[Tensor, QParams], Tensor] = staticmethod(quantize)
    hidden_size: int
    input: QParams | None

    def __init__(self, hidden_size: int, source: QParams | None, weight_bits: int, state_bits: int) -> None:
        super().__init__()
        self.hidden_size, self.input = hidden_size, source
        self.weight_bits, self.state_bits = weight_bits, state_bits
        self.state = state_qparams(state_bits)
        self._sources: dict[str, QParams | None] = {}

    def _add(self, suffix: str, features: int, has_bias: bool, source: QParams | None) -> None:
        outputs = self.gates * self.hidden_size
        inputs: nn.Module
        if source is None:
            inputs = DynamicLinear(features, outputs, has_bias, self.weight_bits, self.state_bits)
        else:
            inputs = self._linear(features, outputs, has_bias, source)
        self.add_module(f"ih{suffix}", inputs)
        states = self._linear(self.hidden_size, outputs, has_bias, self.state)
        self.add_module(f"hh{suffix}", states)
        self._sources[suffix] = source

    def _linear(self, features: int, outputs: int, has_bias: bool, source: QParams) -> QuantizedLinear:
        return QuantizedLinear(features, outputs, has_bias, source, None, weight_bits=self.weight_bits)

    @property
    def label(self) -> str:
        """Name of what was done to it, in reports."""
        return width_label(self.scheme, self.weight_bits, self.state_bits)

    def _products(self, x: Tensor, suffix: str) -> Tensor:
        """Products of the weights with inputs ``(..., features)``."""
        source = self._sources[suffix]
        y: Tensor = self.get_submodule(f"ih{suffix}")(x if source is None else self.rounding(x, source))
        return y

    def _next(self, inputs: Tensor, state: State, suffix: str) -> State:
        products = self.get_submodule(f"hh{suffix}")(self.rounding(state[0], self.state))
        following: State = type(self).step(inputs, products, state)
        return following

    def _zeros(self, x: Tensor, *shape: int) -> State:
        return tuple(x.new_zeros(*shape, self.hidden_size) for _ in range(self.states))

    def _as_given(self, state: State) -> Any:
        return state[0] if self.states == 1 else state


class _Sequence(QuantizedRecurrent):
    """A recurrent layer over sequences, as ``nn.GRU`` and ``nn.LSTM``."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        has_bias: bool,
        batch_first: bool,
        bidirectional: bool,
        input: QParams | None,
        weight_bits: int = BITS,
        state_bits: int = BITS,
    ) -> None:
        super().__init__(hidden_size, input, weight_bits, state_bits)
        self.input_size, self.num_layers, self.has_bias = input_size, num_layers, has_bias
        self.batch_first, self.bidirectional = batch_first, bidirectional
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                wide = hidden_size * (2 if bidirectional else 1)
                features, source = (input_size, input) if layer == 0 else (wide, self.state)
                self._add(suffix, features, has_bias, source)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: 2 if self.bidirectional else 1]

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """Outputs of the last layer, and the last states of all; takes what torch's layer takes."""
        x = real_input(input)
        if x.dim() != 3:
            raise TypeError(f"takes batches of sequences, not {x.dim()} dimensions")
        x = x.transpose(0, 1) if self.batch_first else x
        count = self.num_layers * (2 if self.bidirectional else 1)
        start = self._zeros(x, count, x.shape[1]) if hx is None else hx
        start = (start,) if isinstance(start, Tensor) else tuple(start)
        last: list[State] = []
        for layer in range(self.num_layers):
            made = []
            for suffix in self._suffixes(layer):
                state = tuple(part[len(last)] for part in start)
                y, state = self._run(self._products(x, suffix), state, suffix)
                made.append(y)
                last.append(state)
            x = torch.cat(made, -1) if self.bidirectional else made[0]
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return x.transpose(0, 1) if self.batch_first else x, self._as_given(ends)

    def _run(self, products: Tensor, state: State, suffix: str) -> tuple[Tensor, State]:
        """States after every step of one direction, and the last."""
        if products.is_meta:  # only shapes are asked for, and how much work it is
            length, batch, _ = products.shape
            rows = products.new_empty(length * batch, self.hidden_size)
            self._next(products.flatten(0, 1), (rows,) * self.states, suffix)
            return rows.unflatten(0, (length, batch)), state
        order = range(len(products))
        made: dict[int, Tensor] = {}
        for place in reversed(order) if suffix.endswith("_reverse") else order:
            state = self._next(products[place], state, suffix)
            made[place] = state[0]
        return torch.stack([made[place] for place in order]), state


class _Cell(QuantizedRecurrent):
    """A single step, as ``nn.GRUCell`` and ``nn.LSTMCell``."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        has_bias: bool,
        input: QParams | None,
        weight_bits: int = BITS,
        state_bits: int = BITS,
    ) -> None:
        super().__init__(hidden_size, input, weight_bits, state_bits)
        self.input_size, self.has_bias = input_size, has_bias
        self._add("", input_size, has_bias, input)

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """The next state; takes what torch's layer takes."""
        x = real_input(input)
        state = self._zeros(x, *x.shape[:-1]) if hx is None else hx
        state = (state,) if isinstance(state, Tensor) else tuple(state)
        return self._as_given(self._next(self._products(x, ""), state, ""))


_WIDTHS = f"{WEIGHT_BITS} state_bits:bits={BITS}"
_OF_SEQUENCE = (
    "input_size:count hidden_size:count num_layers:few has_bias:bool batch_first:bool bidirectional:bool "
    f"input:q? {_WIDTHS}"
)
_OF_CELL = f"input_size:count hidden_size:count has_bias:bool input:q? {_WIDTHS}"


class QuantizedGRU(_Sequence):
    """int8 ``nn.GRU``."""

    fields, gates, step = _OF_SEQUENCE, 3, staticmethod(_gru)


class QuantizedLSTM(_Sequence):
    """int8 ``nn.LSTM``."""

    fields, gates, states, step = _OF_SEQUENCE, 4, 2, staticmethod(_lstm)


class QuantizedGRUCell(_Cell):
    """int8 ``nn.GRUCell``."""

    fields, gates, step = _OF_CELL, 3, staticmethod(_gru)


class QuantizedLSTMCell(_Cell):
    """int8 ``nn.LSTMCell``."""

    fields, gates, states, step = _OF_CELL, 4, 2, staticmethod(_lstm)
