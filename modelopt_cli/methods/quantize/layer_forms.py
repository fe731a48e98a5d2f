"""Float layers and the int8 layers that they become: one row for each kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from modelopt_cli.kernels.lowering import overpadded
from modelopt_cli.methods.quantize.widths import Widths
from modelopt_cli.program.quantization import BITS, QParams
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvolution,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedTransposed,
)
from modelopt_cli.program.quantized_embedding import QuantizedEmbedding
from modelopt_cli.program.quantized_linear import QuantizedLinear
from modelopt_cli.program.quantized_recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRecurrent,
)


@dataclass(frozen=True)
class Precision:
    """Precision of an int8 layer's inputs and output.

    Attributes:
        input: scale and zero point of its input.
        output: of its output; None where that stays float32.
        activation: a key of ``ACTIVATIONS``, applied to its sums.
        residual: scale and zero point of what is added to them before, if anything is.
        weight_bits: of the integers of its weight.
    """

    input: QParams
    output: QParams | None = None
    activation: str = "none"
    residual: QParams | None = None
    weight_bits: int = BITS


@dataclass(frozen=True)
class LayerForm:
    """The int8 form of a kind of layer.

    Attributes:
        make: the int8 layer of a float one and its ``Precision`` or, if it does not multiply, its ``Widths``
            and perhaps the ``QParams`` of its input; its tensors are still to be filled.
        obstacle: reason why a layer of the kind has none, or None where it has.
        multiplies: it multiplies integers, so that its input is uint8 and its weight within the bound of
            ``kernels.saturation``; else only the weight is int8, and its input what it is in float32.
        calibrated: it takes the ``QParams`` of its input, if those are known: one call, and data.
        further: arguments that it may be called with besides its input.
        activations: those that it can apply itself.
        after_adding: those that it can apply after it has added a second tensor to its sums; none where it
            cannot add one.
    """

    make: Callable[..., Quantized]
    obstacle: Callable[[Any], str | None] = lambda layer: None
    multiplies: bool = True
    calibrated: bool = False
    further: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset()
    after_adding: frozenset[str] = frozenset()


_AFTER_CONVOLUTIONS = frozenset({"relu", "relu6", "hardswish", "silu"})


def _convolution(kind: type[QuantizedConvolution]) -> LayerForm:
    def make(layer: Any, precision: Precision) -> QuantizedConvolution:
        return kind(**conv_options(layer), **vars(precision))

    return LayerForm(
        make,
        _conv_obstacle,
        activations=_AFTER_CONVOLUTIONS,
        after_adding=frozenset({"none", "relu"}),
    )


def _conv_obstacle(layer: Any) -> str | None:
    if layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode!r}"
    return None if numeric_padding(layer) is not None else "padding differs between the sides"


def conv_options(layer: Any) -> dict[str, Any]:
    """The geometry of a convolution as its int8 form takes it; padding in numbers."""
    sizes = {name: tuple(getattr(layer, name)) for name in ("kernel_size", "stride", "dilation")}
    channels = {name: getattr(layer, name) for name in ("in_channels", "out_channels", "groups")}
    return {**channels, **sizes, "padding": numeric_padding(layer), "has_bias": layer.bias is not None}


def numeric_padding(layer: Any) -> tuple[int, ...] | None:
    """Padding of a convolution in each dimension, or None where it is not the same on both sides."""
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return tuple(t // 2 for t in total) if all(t % 2 == 0 for t in total) else None


def _transposed(kind: type[QuantizedTransposed]) -> LayerForm:
    def make(layer: Any, precision: Precision) -> QuantizedTransposed:
        options = {**vars(precision), **conv_options(layer), "output_padding": tuple(layer.output_padding)}
        del options["residual"]
        return kind(**options)

    def obstacle(layer: Any) -> str | None:
        return "padding beyond its kernel" if overpadded(layer) else None

    return LayerForm(make, obstacle, activations=_AFTER_CONVOLUTIONS)


def _linear(layer: nn.Linear, precision: Precision) -> QuantizedLinear:
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    around = (precision.input, precision.output, precision.activation)
    return QuantizedLinear(*sizes, *around, weight_bits=precision.weight_bits)


def _embedding(layer: nn.Embedding, widths: Widths) -> QuantizedEmbedding:
    return QuantizedEmbedding(layer.num_embeddings, layer.embedding_dim, widths.weight)


def _embedding_obstacle(layer: nn.Embedding) -> str | None:
    return None if layer.max_norm is None else "changes its rows when they are read (max_norm)"


LEAST_HIDDEN = 768
"""Hidden size from which a step's integer products save more than their calls cost, measured on a CPU."""


def _recurrent(kind: Callable[..., QuantizedRecurrent], *options: str) -> LayerForm:
    def make(layer: Any, widths: Widths, source: QParams | None = None) -> QuantizedRecurrent:
        given = {name: getattr(layer, name) for name in ("input_size", "hidden_size", *options)}
        bits = {"weight_bits": widths.weight, "state_bits": widths.activation}
        return kind(**given, has_bias=layer.bias, input=source, **bits)

    return LayerForm(make, _recurrent_obstacle, multiplies=False, calibrated=True, further=frozenset({"hx"}))


def _recurrent_obstacle(layer: Any) -> str | None:
    if getattr(layer, "proj_size", 0):
        return "no int8 kernel for projected states"
    few = f"{layer.hidden_size} hidden units, fewer than {LEAST_HIDDEN}: its steps would take longer in int8"
    return few if layer.hidden_size < LEAST_HIDDEN else None


_OF_SEQUENCE = ("num_layers", "batch_first", "bidirectional")

LAYER_FORMS: dict[type[nn.Module], LayerForm] = {
    nn.Conv1d: _convolution(QuantizedConv1d),
    nn.Conv2d: _convolution(QuantizedConv2d),
    nn.Conv3d: _convolution(QuantizedConv3d),
    nn.ConvTranspose1d: _transposed(QuantizedConvTranspose1d),
    nn.ConvTranspose2d: _transposed(QuantizedConvTranspose2d),
    nn.Linear: LayerForm(_linear, activations=frozenset({"relu", "gelu"})),
    nn.Embedding: LayerForm(_embedding, _embedding_obstacle, multiplies=False),
    nn.GRU: _recurrent(QuantizedGRU, *_OF_SEQUENCE),
    nn.LSTM: _recurrent(QuantizedLSTM, *_OF_SEQUENCE),
    nn.GRUCell: _recurrent(QuantizedGRUCell),
    nn.LSTMCell: _recurrent(QuantizedLSTMCell),
}
"""Class of a float layer to its int8 form."""


def obstacle(layer: nn.Module) -> str | None:
    """Reason why a layer cannot become int8 with fixed scales, or None where it can."""
    form = LAYER_FORMS.get(type(layer))
    return f"no int8 kernel for {type(layer).__name__}" if form is None else form.obstacle(layer)
