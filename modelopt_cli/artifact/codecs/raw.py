"""``raw``: the tensor's own bytes."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from modelopt_cli.artifact.codecs.base import Codec, IntegerView, Params, PartSpec, Shape, expect
from modelopt_cli.program.program import Encoding


class Raw(Codec):
    """Any dtype, any shape, nothing changed."""

    name = "raw"
    help = "the tensor's own bytes"
    payload = ("values",)
    plain = True

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """One part, like the tensor."""
        expect(not encoding.params and not encoding.parts, "codec raw has neither settings nor extra parts")
        return {"values": PartSpec(dtype, shape)}

    def encode(self, tensor: torch.Tensor, encoding: Encoding) -> dict[str, torch.Tensor]:
        """The tensor itself, not copied."""
        self.layout(tuple(tensor.shape), tensor.dtype, encoding)
        return {"values": tensor}

    def decode(
        self, parts: Mapping[str, torch.Tensor], params: Params, dtype: torch.dtype, shape: Shape
    ) -> torch.Tensor:
        """The stored tensor itself."""
        expect(set(parts) == {"values"} and not params, "codec raw has exactly one part and no settings")
        values = parts["values"]
        expect(values.dtype == dtype and tuple(values.shape) == shape, "the values do not fit the parameter")
        return values

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """Elements times element size."""
        return PartSpec(dtype, shape).nbytes

    def makes_integers(self, dtype: torch.dtype) -> bool:
        """True if it is made of integers itself."""
        return dtype == torch.int8

    def integers(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> "RawIntegers":
        """The elements of an int8 parameter, which is made of integers itself."""
        return RawIntegers(self, params, shape, dtype)


class RawIntegers(IntegerView):
    """An int8 parameter."""

    part, limits = "values", (-128, 127)

    def __init__(self, codec: Codec, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        expect(dtype == torch.int8, f"{dtype} values are no integers")
        super().__init__(codec, params, shape, dtype)
        self.spec = PartSpec(torch.int8, shape)


PLAIN = Encoding(Raw.name)
"""The encoding of a parameter that no method has put onto a smaller set."""
