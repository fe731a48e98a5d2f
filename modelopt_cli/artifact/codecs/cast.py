"""``cast``: a float32 parameter whose values are those of a half-precision type, stored in that.

Setting: ``dtype`` (``float16`` or ``bfloat16``).
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import Codec, Params, PartSpec, Shape, expect
from modelopt_cli.artifact.codecs.raw import PLAIN
from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.program import Encoding

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Cast(Codec):
    """The values in two bytes each."""

    name = "cast"
    help = "float32 values of a half-precision type, stored in that"
    payload = ("values",)
    dtypes = (torch.float32,)

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """One part, of the shorter type."""
        self.require_dtype(dtype)
        expect(not encoding.parts, "codec cast has no extra parts")
        return {"values": PartSpec(_type(encoding.params), shape)}

    def encode(self, tensor: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """The values in the shorter type, if they are all in it."""
        self.layout(tuple(tensor.shape), tensor.dtype, encoding)
        values = tensor.to(_type(encoding.params))
        if not torch.equal(values.float(), tensor):
            raise ModeloptError(f"has values that are not {encoding.params['dtype']}")
        return {"values": values}

    def decode(self, parts: Mapping[str, Tensor], params: Params, dtype: torch.dtype, shape: Shape) -> Tensor:
        """The values in float32, which holds them all."""
        self.require_dtype(dtype)
        expect(set(parts) == {"values"}, "codec cast has exactly one part")
        values = parts["values"]
        fits = values.dtype == _type(params) and tuple(values.shape) == shape
        expect(fits, "the values do not fit the parameter")
        return values.float()

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """Two bytes for each element."""
        return PartSpec(_type(params), shape).nbytes

    def values_label(self, params: Params) -> str:
        """The type."""
        return str(params["dtype"])

    def compute_type(self, encoding: Encoding) -> torch.dtype:
        """The type."""
        return _type(encoding.params)

    def as_changed(self, tensor: Tensor, encoding: Encoding) -> Encoding:
        """Plain storage, once training has given the parameter values between those of the type."""
        if tensor.is_meta or torch.equal(tensor.to(_type(encoding.params)).to(tensor.dtype), tensor):
            return encoding
        return PLAIN

    def without_zeros(self, encoding: Encoding) -> Encoding:
        """Plain storage: any zeros may be left out."""
        return PLAIN


def _type(params: Params) -> torch.dtype:
    name = params.get("dtype")
    expect(set(params) == {"dtype"} and isinstance(name, str) and name in HALVES, "dtype must be a half")
    return HALVES[str(name)]
