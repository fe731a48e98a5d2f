"""``packed``: the integers of ``affine`` or ``codebook`` in just as many bits as they need.

Settings: ``codec`` and ``params``, the name and the settings of the codec whose integers these are. Stored
is how far each is above the smallest that there can be, in as few bits as the largest needs.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import Params, PartSpec, Shape, expect
from modelopt_cli.artifact.codecs.bits import pack, packed_size, unpack
from modelopt_cli.artifact.codecs.inner import Inner, inner_of
from modelopt_cli.program.program import Encoding

CODECS = ("affine", "codebook")
"""Those whose integers can be packed."""


class Packed:
    """A stream of bits, see ``bits``, beside the other parts of the inner codec."""

    payload = ("stream",)

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """``stream``, and what the inner codec has beside its integers."""
        inner = _inner(encoding.params, shape, dtype)
        return {"stream": PartSpec(torch.uint8, (_size(inner),)), **inner.layout(encoding.parts)}

    def encode(self, tensor: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """The inner codec's integers, packed."""
        inner = _inner(encoding.params, tuple(tensor.shape), tensor.dtype)
        integers, others = inner.encode(tensor, encoding.parts)
        # Without a wider type: differences of unsigned integers are right modulo their size.
        above = integers.reshape(-1).view(_unsigned(inner)) - _low(inner)
        return {"stream": pack(above, _width(inner)), **others}

    def decode(self, parts: Mapping[str, Tensor], params: Params, dtype: torch.dtype, shape: Shape) -> Tensor:
        """Unpack the integers and let the inner codec decode them."""
        inner = _inner(params, shape, dtype)
        others = {name: part for name, part in parts.items() if name != "stream"}
        stream = parts.get("stream")
        fits = stream is not None and stream.dtype == torch.uint8 and tuple(stream.shape) == (_size(inner),)
        expect(fits, "the stream does not fit the parameter")
        above = unpack(parts["stream"], inner.count, _width(inner), _unsigned(inner))
        return inner.decode((above + _low(inner)).view(inner.numpy_type), others)

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """What the inner codec takes, with its integers in fewer bits."""
        inner = _inner(params, shape, dtype)
        return _size(inner) + inner.bytes_beside(parts)


def packed_encoding(tensor: Tensor, encoding: Encoding) -> Encoding | None:
    """The encoding by ``packed`` of a tensor whose integers can be packed, else None."""
    if encoding.codec not in CODECS:
        return None
    return Encoding(
        "packed", {"codec": encoding.codec, "params": dict(encoding.params)}, dict(encoding.parts)
    )


def _inner(params: Params, shape: Shape, dtype: torch.dtype) -> Inner:
    expect(set(params) == {"codec", "params"}, "codec packed needs exactly codec and params")
    expect(params["codec"] in CODECS, f"codec packed stores integers of {' or '.join(CODECS)} only")
    return inner_of(params, shape, dtype)


def _width(inner: Inner) -> int:
    low, high = inner.limits
    return max((high - low).bit_length(), 1)


def _size(inner: Inner) -> int:
    return packed_size(inner.count, _width(inner))


def _unsigned(inner: Inner) -> npt.DTypeLike:
    return np.uint8 if inner.numpy_type.itemsize == 1 else np.uint16


def _low(inner: Inner) -> npt.NDArray[Any]:
    """The smallest integer, modulo what the type can hold."""
    return np.array(inner.limits[0]).astype(_unsigned(inner))
