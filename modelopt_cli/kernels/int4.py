"""Linear layers of 4-bit integers through torch's int4 operators, which read a weight in half a byte.

The operators compute ``x @ ((q - 8) * scale + zero)`` with q from 0 to 15, and a scale and a zero for every
32, 64, 128 or 256 input features, on CPUs and CUDA. They are used in bfloat16 alone: the CPU's took 10 to 170
times as long as a float32 product in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelopt_cli.artifact.codecs.base import Steps
from modelopt_cli.program.program import Encoding

BITS = 4
GROUPS = (256, 128, 64, 32)
OUTPUTS = {"cpu": 16, "cuda": 8}
"""Multiple that the outputs must be of."""
INNER_TILES = 8
"""Tiles of 16 input features that CUDA's operator takes at once."""


def int4_obstacle(layer: nn.Linear, encoding: Encoding, dtype: torch.dtype) -> str | None:
    """Reason why a linear layer cannot run through the int4 operators; None where it can.

    Args:
        layer: on its device.
        encoding: how its weight is stored.
        dtype: that it computes in.
    """
    device, (outputs, inputs) = layer.weight.device.type, layer.weight.shape
    if encoding.params.get("bits") != BITS:
        return f"its weight has no {BITS}-bit integers"
    if dtype is not torch.bfloat16:
        return "int4 operators compute in bfloat16"
    if device not in OUTPUTS:
        return f"no int4 operators on {device}"
    if outputs % OUTPUTS[device]:
        return f"{outputs} outputs are no multiple of {OUTPUTS[device]}"
    if device == "cuda" and inputs % (16 * INNER_TILES):
        return f"{inputs} inputs are no multiple of {16 * INNER_TILES}"
    if group_of(inputs, encoding.params.get("group")) is None:
        return f"its groups are not of {', '.join(map(str, reversed(GROUPS)))} features that divide {inputs}"
    return None


def group_of(inputs: int, group: int | None) -> int | None:
    """Features of a group as the operators take them; None where they cannot."""
    fitting = [size for size in GROUPS if inputs % size == 0 and group in (None, size)]
    return fitting[0] if fitting else None


@dataclass(frozen=True)
class Int4Product:
    """``rows @ weight.T`` in bfloat16, for a fixed weight of 4-bit integers.

    Attributes:
        packed: the integers, as the operator wants them.
        group: input features with one scale.
        scales: bfloat16 ``(in / group, out, 2)``: scales, and what is added.
    """

    packed: Tensor
    group: int
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor, steps: Steps, group: int | None) -> "Int4Product":
        """Pack a weight.

        Args:
            weight: float32 ``(out, in)``, on the steps.
            steps: its scales and zero points.
            group: input features with one scale; None: all.
        """
        outputs, inputs = weight.shape
        size = group_of(inputs, group)
        assert size is not None
        scale = steps.scale.to(weight.device)
        zero = torch.zeros_like(scale) if steps.zero_point is None else steps.zero_point.to(weight.device)
        integers = ((weight / scale).round_() + zero).to(torch.int32) + (1 << BITS - 1)
        by_group = [part.expand(outputs, inputs)[:, ::size] for part in (scale, -zero * scale)]
        scales = torch.stack(by_group, 2).transpose(0, 1).to(torch.bfloat16).contiguous()
        return cls(_packed(integers), size, scales)

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply float32 ``(M, in)`` into float32 ``(M, out)``."""
        multiply = (
            torch.ops.aten._weight_int4pack_mm if rows.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        )
        y: Tensor = multiply(rows.to(torch.bfloat16), self.packed, self.group, self.scales)
        return y.float()


def _packed(integers: Tensor) -> Tensor:
    """Integers from 0 to 15 ``(out, in)`` as the operator of their device wants them."""
    if not integers.is_cuda:
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        return packed
    pairs = (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)
    on_device: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
    return on_device
