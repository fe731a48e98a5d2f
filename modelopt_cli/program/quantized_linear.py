"""Linear layers that hold int8 weights: with a fixed scale for their input, or with one for every call."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.quantization import (
    ACTIVATIONS,
    BITS,
    NotFiniteError,
    QParams,
    dequantize,
    dynamic_qparams,
    quantize,
    real_input,
)
from modelopt_cli.program.quantized import WEIGHT_BITS, Weighted


class _OfFeatures(Weighted):
    """A layer whose input has features in its last dimension."""

    in_features: int

    def takes(self, shape: torch.Size) -> bool:
        return len(shape) > 0 and shape[-1] == self.in_features

    @property
    def input_form(self) -> str:
        return f"(..., {self.in_features})"


class QuantizedLinear(_OfFeatures):
    """Linear layer, uint8 ``(..., in_features)`` in; uint8 or, where ``output`` is None, float32 out."""

    fields = (
        "in_features:count out_features:count has_bias:bool input:q output:q? "
        f"activation:{'|'.join(ACTIVATIONS)} {WEIGHT_BITS}"
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        input: QParams,
        output: QParams | None,
        activation: str = "none",
        weight_bits: int = BITS,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.has_bias = has_bias
        self.input, self.output = input, output
        self.activation, self.weight_bits = activation, weight_bits
        self._allocate((out_features, in_features), out_features, has_bias)

    def emulate(self, *args: Tensor) -> Tensor:
        return self._finish(F.linear(dequantize(args[0], self.input), self.float_weight(), self.bias))


class DynamicLinear(_OfFeatures):
    """Linear layer, float in and out, whose input is rounded at every call, to ``input_bits``."""

    fields = f"in_features:count out_features:count has_bias:bool {WEIGHT_BITS} input_bits:bits=8"
    scheme = "int8-dynamic"
    float_layer = nn.Linear
    restored = ("int8-dynamic",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        weight_bits: int = BITS,
        input_bits: int = BITS,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.has_bias = has_bias
        self.activation, self.output = "none", None
        self.weight_bits, self.input_bits = weight_bits, input_bits
        self._allocate((out_features, in_features), out_features, has_bias)

    @property
    def activation_bits(self) -> int:
        return self.input_bits

    @classmethod
    def of_float(
        cls, layer: nn.Linear, scale: Tensor, weight_bits: int = BITS, input_bits: int = BITS
    ) -> Self:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        return cls(*sizes, weight_bits, input_bits)._fill(layer, scale)

    def forward(self, *args: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            message = "dynamic int8 scales each input by its values, which torch.export cannot follow"
            raise CaptureError(message, hint="export a network of scheme int8 or int8-weight")
        x = real_input(args[0])
        try:
            return super().forward(x)
        except NotFiniteError:
            # As the float layer would: what went wrong before must stay visible behind.
            return F.linear(x, self.float_weight(), self.bias)

    def emulate(self, *args: Tensor) -> Tensor:
        q = dynamic_qparams(args[0], self.input_bits)
        return F.linear(dequantize(quantize(args[0], q), q), self.float_weight(), self.bias)
