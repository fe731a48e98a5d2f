"""Quantized layers with weights: ordinary modules that hold int8 weights and pass uint8 activations on.

A layer computes through ``self.kernel``, which ``modelopt_cli.kernels.prepare`` sets. Then its sums are
those of the integers, whatever the layer and the device. Without one it computes the same values in
float32, up to rounding, and slowly: a Program is right before it is fast.

int8 layers take float32 and uint8 and return those. They have no form in another precision.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from modelopt_cli.program.fields import checked_config, parse_fields
from modelopt_cli.program.quantization import (
    ACTIVATIONS,
    BITS,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    QParams,
    keep_float32,
    quantize,
    width_label,
)

WEIGHT_BITS = f"weight_bits:bits={BITS}"
"""The field that every layer with a weight has."""


class Quantized(nn.Module):
    """Base of all quantized layers: hyperparameters as data, and a kernel that can be swapped.

    Attributes:
        fields: the hyperparameters, in constructor order, as ``program.fields`` declares them.
        arity: how many tensors ``forward`` takes.
        kernel: what computes ``forward`` from the layer and its arguments; set by ``kernels.prepare``.
            Copies keep it.
    """

    fields: ClassVar[str] = ""
    arity = 1
    kernel: Callable[..., Tensor] | None

    def __init__(self) -> None:
        super().__init__()
        self.kernel = None

    def config(self) -> dict[str, Any]:
        """Hyperparameters as JSON-able values; ``from_config`` turns them back."""

        def plain(value: Any) -> Any:
            if isinstance(value, QParams):
                return value.numbers
            return list(value) if isinstance(value, tuple) else value

        values = {field: getattr(self, field.name) for field in parse_fields(self.fields)}
        return {
            f.name: plain(value) for f, value in values.items() if f.default is None or value != f.default
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The layer with these hyperparameters and uninitialised weights.

        Raises:
            ValueError: a hyperparameter is missing, unknown, out of range or at odds with another.
        """
        fields = parse_fields(cls.fields)
        values = checked_config(fields, config)
        for field in fields:
            if field.type.startswith("q") and values[field.name] is not None:
                values[field.name] = QParams(*values[field.name])
        return cls(**values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        keep_float32(fn)
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.kernel = copy.copy(self.kernel)  # which builds again

    def extra_repr(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in parse_fields(self.fields))

    def forward(self, *args: Tensor) -> Tensor:
        if self.kernel is not None:
            if not torch.compiler.is_compiling():
                return self.kernel(self, *args)
            # torch.export takes operators only that it knows, so it gets the same numbers in float32.
            if not torch.compiler.is_exporting():
                return cast(Tensor, _run_kernel(self, *args))
        if len(args) != self.arity:
            raise TypeError(f"takes {self.arity} tensors, not {len(args)}")
        return self.emulate(*args)

    def emulate(self, *args: Tensor) -> Tensor:
        """The layer's values computed in float32 by torch's ordinary operators."""
        raise NotImplementedError

    def takes(self, shape: torch.Size) -> bool:
        """True if the layer can compute an input of this shape; asked where a kernel meets a new one."""
        return True

    @property
    def input_form(self) -> str:
        """Shapes of the inputs that the layer takes, for messages."""
        return "(...)"


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="int8 layers run their own kernels; compile without fullgraph"
)
def _run_kernel(layer: Quantized, *args: Tensor) -> Tensor:
    """The output of a layer's kernel, outside of torch.compile: Inductor fails on oneDNN's operators."""
    assert layer.kernel is not None
    return layer.kernel(layer, *args)


class Weighted(Quantized):
    """A layer with an int8 weight, a float32 scale per output channel and an optional float32 bias.

    Attributes:
        weight_bits: of the weight's integers, 2 to 8.
        scheme: name of the arithmetic, in reports.
        float_layer: class of the layers that :meth:`of_float` takes, for networks whose file holds no graph;
            None where it takes more than the tensors of one layer to make it.
        restored: keys of ``--scheme`` whose files without a graph stand for such layers.
        multiplies: its weight is multiplied as integers.
    """

    scheme: ClassVar[str] = "int8"
    float_layer: ClassVar[type[nn.Module] | None] = None
    restored: ClassVar[tuple[str, ...]] = ()
    multiplies: ClassVar[bool] = True
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    activation: str
    output: QParams | None
    weight_bits: int

    @property
    def activation_bits(self) -> int | None:
        """Bits of the integers that the weight is multiplied with; None where it meets floats."""
        source: QParams | None = getattr(self, "input", None)
        return None if source is None else source.bits

    @property
    def label(self) -> str:
        """Name of what was done to it, in reports: ``int8``, or ``W4A4 in int8`` of fewer bits."""
        return width_label(self.scheme, self.weight_bits, self.activation_bits)

    def _allocate(self, shape: tuple[int, ...], outputs: int, bias: bool) -> None:
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(outputs))
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)

    def share_tensors(self, first: "Weighted") -> None:
        """Compute with the tensors of another layer, of which this one is a further call."""
        self._buffers.update(first._buffers)

    def turned(self, weight: Tensor) -> Tensor:
        """A weight of this layer's form with its output channels first, and back from there.

        Args:
            weight: of any type, in the form of ``self.weight`` or turned.
        """
        return weight

    @classmethod
    def of_float(cls, layer: Any, scale: Tensor, weight_bits: int = BITS, input_bits: int = BITS) -> Self:
        """The form of a float layer of class ``float_layer`` whose weight was decoded from integers.

        Args:
            layer: each output's part of its weight consists of exact multiples of its scale.
            scale: ``(O,)``.
            weight_bits: of the integers.
            input_bits: of those that they are multiplied with.
        """
        raise NotImplementedError

    def _fill(self, layer: Any, scale: Tensor) -> Self:
        """Take over the tensors of a float layer whose weight consists of multiples of these scales."""
        scale = scale.float()
        self.weight.copy_((layer.weight.detach() / scale.view(-1, 1)).round())
        self.scale.copy_(scale)
        if self.bias is not None:
            self.bias.copy_(layer.bias.detach())
        return self

    def float_weight(self) -> Tensor:
        """The weight's real values, float32."""
        by_output = self.turned(self.weight)
        scale = self.scale.view(-1, *[1] * (by_output.dim() - 1))
        return self.turned(by_output.float() * scale)

    def check(self) -> None:
        """Make sure that the values of the layer's tensors are what its arithmetic is made for.

        Raises:
            ValueError: a scale that is not positive and finite, a bias that is not finite, or a weight of
                more bits than the layer is said to have.
        """
        if self.weight_bits < BITS and self.weight.numel():
            half = 1 << self.weight_bits - 1
            low, high = (int(extreme) for extreme in self.weight.aminmax())
            if not -half <= low <= high < half:
                raise ValueError(f"a weight is not an integer of {self.weight_bits} bits")
        if not bool(((self.scale >= SMALLEST_SCALE) & (self.scale <= LARGEST_SCALE)).all()):
            raise ValueError("a scale is not a positive float32")
        if self.bias is not None and not bool(self.bias.isfinite().all()):
            raise ValueError("a bias is not finite")

    def _finish(self, y: Tensor) -> Tensor:
        y = ACTIVATIONS[self.activation](y)
        return y if self.output is None else quantize(y, self.output, reuse=True)
