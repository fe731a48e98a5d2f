"""``raw``: the tensor's own bytes."""

from collections.abc import Collection, Mapping

import torch

from modelopt_cli.artifact.codecs.base import Params, PartSpec, Shape, expect
from modelopt_cli.program.program import Encoding


class Raw:
    """Any dtype, any shape, nothing changed."""

    payload = ("values",)

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
