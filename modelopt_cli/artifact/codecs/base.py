"""Codecs: how a parameter is stored as a few plain tensors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.program import Encoding

Params = Mapping[str, Any]
Shape = tuple[int, ...]
Integers = npt.NDArray[np.integer[Any]]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class PartSpec:
    """Element type and shape of one stored part."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes the part takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """Lossless storage for tensors whose values a method has already put onto a smaller set.

    ``encode`` must be undone by ``decode`` exactly, on every machine. Parts come in two kinds: ``payload``
    parts are made from the tensor, the others are given in ``Encoding.parts``.

    Attributes:
        name: in ``Encoding.codec`` and in files.
        help: one line.
        version: of the format, from which readers know the codec.
        payload: the parts that ``encode`` makes; the first is stored under the parameter's own name.
        dtypes: element types of the parameters that it stores; empty: any.
        plain: it stores any values as they are.
        few_values: its parameters have few values on purpose, and equal ones are to stay equal.
        wraps: it stores the integers of another codec, which its settings name.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    version: ClassVar[int] = 1
    payload: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    plain: ClassVar[bool] = False
    few_values: ClassVar[bool] = False
    wraps: ClassVar[bool] = False

    @abstractmethod
    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """Every part's type and shape, from shapes alone: parts on the meta device will do.

        Raises:
            ArtifactError: the settings or parts do not fit the tensor.
        """

    @abstractmethod
    def encode(self, tensor: torch.Tensor, encoding: Encoding) -> dict[str, torch.Tensor]:
        """All parts, as ``layout`` describes them.

        Raises:
            ArtifactError: the settings or parts do not fit the tensor.
            ModeloptError: the tensor's values are not on the set the encoding describes.
        """

    @abstractmethod
    def decode(
        self, parts: Mapping[str, torch.Tensor], params: Params, dtype: torch.dtype, shape: Shape
    ) -> torch.Tensor:
        """The tensor again, bit for bit (a negative zero may come back as zero).

        Raises:
            ArtifactError: the parts, which may come from a hostile file, do not fit.
        """

    @abstractmethod
    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """Exact bytes of all parts together, from the plan alone.

        Args:
            shape: of the parameter.
            dtype: of the parameter.
            params: the encoding's settings.
            parts: optional parts that will be given, e.g. ``("zero_point",)``.

        Raises:
            ArtifactError: the settings do not fit the tensor.
        """

    def makes_integers(self, dtype: torch.dtype) -> bool:
        """True if a parameter of this type is stored as integers, or as values and a mask of them."""
        return False

    def integers(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> "IntegerView":
        """The codec as one that makes integers, for codecs that store those in fewer bits.

        Raises:
            ArtifactError: it makes none, or the settings do not fit the tensor.
        """
        raise ArtifactError(f"{self.name!r} is no codec of integers")

    def is_pruned(self, params: Params) -> bool:
        """True if zeros of a parameter stored so were pruned and are to stay."""
        return False

    def pattern(self, params: Params) -> str | None:
        """The pattern of a pruned parameter's zeros, ``"N:M"`` or ``"block:B"``, where there is one."""
        return None

    def values_label(self, params: Params) -> str:
        """The set that the values are on, in reports (``affine8``); an empty string for any values."""
        return ""

    def form(self, params: Params) -> str | None:
        """The way in which a codec that has several writes a parameter, for reports."""
        return None

    def codebook_shape(self, params: Params) -> tuple[int, int, int]:
        """Codebooks, centroids in each and numbers in a centroid, for values as many as a byte can tell."""
        return 1, 256, 1

    def channel_steps(self, encoding: Encoding) -> tuple[torch.Tensor, int] | None:
        """Scale of every index along the first dimension and bits, where the values are steps of it alone."""
        return None

    def spread_steps(self, encoding: Encoding, shape: Shape) -> "Steps | None":
        """The steps that the values of a parameter of this shape are on, where they are evenly spaced."""
        return None

    def compute_type(self, encoding: Encoding) -> torch.dtype | None:
        """The half-precision type that products of such a weight are to be computed in; None for its own."""
        return None

    def as_changed(self, tensor: torch.Tensor, encoding: Encoding) -> Encoding:
        """The encoding itself, or another one where a method has since given the parameter other values."""
        return encoding

    def with_zeros(self, encoding: Encoding) -> Encoding | None:
        """The encoding that also keeps zeros; None where the codec cannot and ``sparse`` does it."""
        return None

    def without_zeros(self, encoding: Encoding) -> Encoding:
        """The encoding of the same values where zeros count like any other."""
        return encoding

    def require_dtype(self, dtype: torch.dtype) -> None:
        """Raise ArtifactError if parameters of this type are not stored."""
        expect(not self.dtypes or dtype in self.dtypes, f"codec {self.name} stores no {dtype}")


@dataclass(frozen=True)
class Steps:
    """Evenly spaced values: ``scale * (integer - zero_point)``.

    Attributes:
        scale: float32, in a shape that broadcasts against the values.
        zero_point: float32 likewise, or None.
        bits: of the integers.
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int


def expect(condition: bool, problem: str) -> None:
    """Raise ArtifactError(what) unless ``condition`` holds."""
    if not condition:
        raise ArtifactError(problem)


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
        """Read settings that may come from a hostile file.

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
