"""``narrow``: an int8 parameter whose integers have fewer bits, and may be stored in those.

Setting: ``bits`` (2 to 7). Every element is within ``-2**(bits-1) .. 2**(bits-1) - 1``.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import Codec, IntegerView, Params, PartSpec, Shape, expect
from modelopt_cli.artifact.codecs.raw import PLAIN
from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.program import Encoding


class Narrow(Codec):
    """The elements themselves, as bytes; ``packed`` and ``entropy`` store them in their bits."""

    name = "narrow"
    help = "int8 elements of 2 to 7 bits"
    payload = ("values",)
    dtypes = (torch.int8,)

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """One part, like the tensor."""
        self.require_dtype(dtype)
        expect(not encoding.parts, "codec narrow has no extra parts")
        _limits(encoding.params)
        return {"values": PartSpec(dtype, shape)}

    def encode(self, tensor: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """The tensor itself, not copied."""
        self.layout(tuple(tensor.shape), tensor.dtype, encoding)
        if not _within(tensor, encoding.params):
            raise ModeloptError(f"has integers of more than {encoding.params['bits']} bits")
        return {"values": tensor}

    def decode(self, parts: Mapping[str, Tensor], params: Params, dtype: torch.dtype, shape: Shape) -> Tensor:
        """The stored tensor itself."""
        self.require_dtype(dtype)
        expect(set(parts) == {"values"}, "codec narrow has exactly one part")
        values = parts["values"]
        expect(values.dtype == dtype and tuple(values.shape) == shape, "the values do not fit the parameter")
        expect(_within(values, params), "the values have more bits than the setting says")
        return values

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """A byte for each element."""
        _limits(params)
        return PartSpec(dtype, shape).nbytes

    def makes_integers(self, dtype: torch.dtype) -> bool:
        """True of its one type."""
        return dtype in self.dtypes

    def integers(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> "NarrowIntegers":
        """The elements."""
        return NarrowIntegers(self, params, shape, dtype)

    def without_zeros(self, encoding: Encoding) -> Encoding:
        """Plain storage: ``sparse`` takes the elements as they are."""
        return PLAIN


class NarrowIntegers(IntegerView):
    """The elements of a parameter."""

    part = "values"

    def __init__(self, codec: Codec, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        codec.require_dtype(dtype)
        super().__init__(codec, params, shape, dtype)
        self.limits, self.spec = _limits(params), PartSpec(torch.int8, shape)


def _limits(params: Params) -> tuple[int, int]:
    bits = params.get("bits")
    expect(set(params) == {"bits"} and type(bits) is int and 2 <= bits <= 7, "bits must be 2 to 7")
    half = 1 << int(params["bits"]) - 1
    return -half, half - 1


def _within(tensor: Tensor, params: Params) -> bool:
    low, high = _limits(params)
    smallest, largest = tensor.aminmax() if tensor.numel() else (low, high)
    return low <= int(smallest) and int(largest) <= high


NARROW = Narrow()
