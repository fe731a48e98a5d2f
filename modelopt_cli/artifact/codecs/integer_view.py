"""Codecs seen as makers of integers, which ``packed`` and ``entropy`` store in fewer bits."""

import math
from abc import ABC
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import Codec, PartSpec, Shape
from modelopt_cli.program.program import Encoding

Integers = npt.NDArray[np.integer[Any]]


class IntegerView(ABC):
    """A codec that makes integers, for a tensor of one shape and type.

    Attributes:
        limits: the smallest and the largest integer there can be.
        spec: type and shape of the integers.
        part: name of the codec's part that holds them.
    """

    limits: tuple[int, int]
    spec: PartSpec
    part: str

    def __init__(self, codec: Codec, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        """With settings that may come from a hostile file.

        Raises:
            ArtifactError: they do not fit the tensor.
        """
        self._codec, self._params, self._shape, self._dtype = codec, params, shape, dtype
        codec.predicted_bytes(shape, dtype, params)

    @property
    def count(self) -> int:
        """Number of integers."""
        return math.prod(self.spec.shape)

    @property
    def numpy_type(self) -> np.dtype[Any]:
        """The type of the integers."""
        return np.dtype(str(self.spec.dtype).removeprefix("torch."))

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, PartSpec]:
        """The codec's other parts.

        Raises:
            ArtifactError: the parts do not fit the tensor.
        """
        encoding = Encoding(self._codec.name, self._params, dict(parts))
        layout = self._codec.layout(self._shape, self._dtype, encoding)
        del layout[self.part]
        return layout

    def bytes_of_other_parts(self, parts: Collection[str]) -> int:
        """Bytes that the codec's other parts take."""
        total = self._codec.predicted_bytes(self._shape, self._dtype, self._params, parts)
        return total - self.spec.nbytes

    def encode(self, tensor: Tensor, encoding: Encoding) -> tuple[Integers, dict[str, Tensor]]:
        """The integers, in their shape, and the other parts.

        Args:
            tensor: the parameter.
            encoding: its parts are those of the codec, whatever its settings are.

        Raises:
            ModeloptError: as the codec's ``encode``.
        """
        inner = Encoding(self._codec.name, self._params, dict(encoding.parts), encoding.integers)
        parts = self._codec.encode(tensor, inner)
        return parts.pop(self.part).numpy(), parts

    def decode(self, integers: Integers, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor again, of integers of the right type.

        Raises:
            ArtifactError: as the codec's ``decode``.
        """
        payload = torch.from_numpy(integers.reshape(self.spec.shape))
        return self._codec.decode({self.part: payload, **parts}, self._params, self._dtype, self._shape)

    def center(self, parts: Mapping[str, Tensor]) -> int:
        """The integer that small values are next to."""
        return 0
