"""``packed``: the integers of another codec in just as many bits as they need.

Settings: ``codec`` and ``params``, the name and the settings of the codec whose integers these are. Stored
is how far each is above the smallest that there can be, in as few bits as the largest needs.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import IntegerView, Params, PartSpec, Shape, expect
from modelopt_cli.artifact.codecs.bits import pack, packed_size, unpack
from modelopt_cli.artifact.codecs.wrapper import Wrapper
from modelopt_cli.program.program import Encoding


class Packed(Wrapper):
    """A stream of bits, see ``bits``, and the other parts of the inner codec."""

    name = "packed"
    help = "the integers of another codec in just as many bits as they need"
    payload = ("stream",)

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """``stream``, and the inner codec's other parts."""
        view = self._inner(encoding.params, shape, dtype)
        return {"stream": PartSpec(torch.uint8, (_size(view),)), **view.layout(encoding.parts)}

    def encode(self, tensor: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """The inner codec's integers, packed."""
        view = self._inner(encoding.params, tuple(tensor.shape), tensor.dtype)
        integers, inner_parts = view.encode(tensor, encoding)
        # Without a wider type: differences of unsigned integers are right modulo their size.
        above = integers.reshape(-1).view(_unsigned(view)) - _low(view)
        return {"stream": pack(above, _width(view)), **inner_parts}

    def decode(self, parts: Mapping[str, Tensor], params: Params, dtype: torch.dtype, shape: Shape) -> Tensor:
        """Unpack the integers and let the inner codec decode them."""
        view = self._inner(params, shape, dtype)
        inner_parts = {name: part for name, part in parts.items() if name != "stream"}
        stream = parts.get("stream")
        fits = stream is not None and stream.dtype == torch.uint8 and tuple(stream.shape) == (_size(view),)
        expect(fits, "the stream does not fit the parameter")
        above = unpack(parts["stream"], view.count, _width(view), _unsigned(view))
        return view.decode((above + _low(view)).view(view.numpy_type), inner_parts)

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """Bytes of the inner codec, with its integers in fewer bits."""
        view = self._inner(params, shape, dtype)
        return _size(view) + view.bytes_of_other_parts(parts)

    def offer(self, tensor: Tensor, encoding: Encoding) -> Encoding | None:
        """Any encoding by a codec whose integers can be packed."""
        if not self._wraps(encoding, tensor.dtype):
            return None
        return replace(encoding, codec=self.name, params=self._wrapped(encoding))

    def _inner(self, params: Params, shape: Shape, dtype: torch.dtype) -> IntegerView:
        expect(set(params) == {"codec", "params"}, "codec packed needs exactly codec and params")
        return self._view(params, shape, dtype)


def _width(view: IntegerView) -> int:
    low, high = view.limits
    return max((high - low).bit_length(), 1)


def _size(view: IntegerView) -> int:
    return packed_size(view.count, _width(view))


def _unsigned(view: IntegerView) -> npt.DTypeLike:
    return np.uint8 if view.numpy_type.itemsize == 1 else np.uint16


def _low(view: IntegerView) -> npt.NDArray[Any]:
    """The smallest integer, modulo what the type can hold."""
    return np.array(view.limits[0]).astype(_unsigned(view))
