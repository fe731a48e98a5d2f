"""What a codec is: one way to store a parameter as a few plain tensors."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.program import Encoding

Params = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class PartSpec:
    """Element type and shape of one stored part."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes the part takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """Lossless storage for tensors whose values a method has already put onto a coarser set.

    ``encode`` must be undone by ``decode`` exactly, on every machine. Parts come in two kinds:
    ``payload`` parts are made from the tensor, the others are given in ``Encoding.parts``.
    """

    @property
    def payload(self) -> tuple[str, ...]:
        """The parts that ``encode`` makes; the first is stored under the parameter's own name."""

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """Every part's type and shape, from shapes alone: parts on the meta device will do.

        Raises:
            ArtifactError: the settings or parts do not fit the tensor.
        """

    def encode(self, tensor: torch.Tensor, encoding: Encoding) -> dict[str, torch.Tensor]:
        """All parts, as ``layout`` describes them.

        Raises:
            ArtifactError: the settings or parts do not fit the tensor.
            ModeloptError: the tensor's values are not on the set the encoding describes.
        """

    def decode(
        self, parts: Mapping[str, torch.Tensor], params: Params, dtype: torch.dtype, shape: Shape
    ) -> torch.Tensor:
        """The tensor again, bit for bit (a negative zero may come back as zero).

        Raises:
            ArtifactError: the parts, which may come from a hostile file, do not fit.
        """

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """Exact bytes of all parts together, from the plan alone.

        Args:
            shape: of the parameter.
            dtype: of the parameter.
            params: the encoding's settings.
            parts: optional parts that will be given, e.g. ``("zero_point",)``.
        """


def expect(condition: bool, what: str) -> None:
    """Raise ArtifactError(what) unless ``condition`` holds."""
    if not condition:
        raise ArtifactError(what)
