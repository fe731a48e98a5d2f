"""The codec under ``packed`` and ``entropy``: the one whose integers they store in fewer bits."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs import positions
from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.artifact.codecs.base import Codec, Params, PartSpec, Shape, expect
from modelopt_cli.artifact.codecs.codebook import Codebook, index_shape, index_type
from modelopt_cli.artifact.codecs.raw import Raw
from modelopt_cli.artifact.codecs.sparse import DTYPES
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program.program import Encoding

Integers = npt.NDArray[np.integer[Any]]


class Inner:
    """A codec that makes integers, for a tensor of one shape and type.

    Attributes:
        limits: the smallest and the largest integer there can be.
        spec: type and shape of the integers.
    """

    limits: tuple[int, int]
    spec: PartSpec
    _codec: Codec
    _part: str

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        """With settings from a file.

        Raises:
            ArtifactError: they do not fit the tensor.
        """
        self._params, self._shape, self._dtype = params, shape, dtype
        self._codec.predicted_bytes(shape, dtype, params)

    @property
    def count(self) -> int:
        """How many integers there are."""
        return math.prod(self.spec.shape)

    @property
    def numpy_type(self) -> np.dtype[Any]:
        """The type of the integers."""
        return np.dtype(str(self.spec.dtype).removeprefix("torch."))

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, PartSpec]:
        """The codec's parts beside the integers.

        Raises:
            ArtifactError: the parts do not fit the tensor.
        """
        layout = self._codec.layout(self._shape, self._dtype, self._encoding(parts))
        del layout[self._part]
        return layout

    def bytes_beside(self, parts: Collection[str]) -> int:
        """What the codec's parts beside the integers take."""
        whole = self._codec.predicted_bytes(self._shape, self._dtype, self._params, parts)
        return whole - self.spec.nbytes

    def encode(self, tensor: Tensor, parts: Mapping[str, Tensor]) -> tuple[Integers, dict[str, Tensor]]:
        """The integers, in their shape, and the other parts.

        Raises:
            ModeloptError: as the codec's ``encode``.
        """
        found = self._codec.encode(tensor, self._encoding(parts))
        return found.pop(self._part).numpy(), found

    def decode(self, integers: Integers, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor again, of integers of the right type.

        Raises:
            ArtifactError: as the codec's ``decode``.
        """
        payload = torch.from_numpy(integers.reshape(self.spec.shape))
        return self._codec.decode({self._part: payload, **parts}, self._params, self._dtype, self._shape)

    def center(self, parts: Mapping[str, Tensor]) -> int:
        """The integer that small values are next to."""
        raise NotImplementedError

    def _encoding(self, parts: Mapping[str, Tensor]) -> Encoding:
        return Encoding("", self._params, dict(parts))


class _Affine(Inner):
    _codec, _part = Affine(), "values"

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(params, shape, dtype)
        half = 1 << (params["bits"] - 1)
        self.limits, self.spec = (-half, half - 1), PartSpec(torch.int8, shape)

    def center(self, parts: Mapping[str, Tensor]) -> int:
        """The mean zero point."""
        zero_point = parts.get("zero_point")
        return 0 if zero_point is None else int(zero_point.sum()) // zero_point.numel()


class _Codebook(Inner):
    _codec, _part = Codebook(), "indices"

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(params, shape, dtype)
        self.limits = (0, params["entries"] - 1)
        self.spec = PartSpec(index_type(params), index_shape(params, shape))

    def center(self, parts: Mapping[str, Tensor]) -> int:
        """The entry next to zero; vectors have no order."""
        if self._params["vector"] > 1:
            return int(self._params["entries"]) // 2
        table = parts["table"].float().reshape(-1, self._params["entries"])
        return int(table.abs().sum(0).argmin())


class _Raw(Inner):
    """An int8 parameter, which is made of integers itself."""

    _codec, _part = Raw(), "values"

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        expect(dtype == torch.int8, f"{dtype} values are no integers")
        super().__init__(params, shape, dtype)
        self.limits, self.spec = (-128, 127), PartSpec(torch.int8, shape)

    def center(self, parts: Mapping[str, Tensor]) -> int:
        """Zero."""
        return 0


class _Pruned:
    """Which elements of a tensor a sparse parameter stores."""

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        expect(dtype in DTYPES, f"codec sparse stores no {dtype}")
        positions.check(params, shape)
        self.count: int = params["count"]
        self._params, self._grid = params, positions.grid_of(params, shape)

    def kept(self, tensor: Tensor) -> Tensor:
        """A mask, of the tensor's shape."""
        rows = positions.kept(self._grid.read(tensor), self._params, self._grid)
        return self._grid.restore(rows)

    def check(self, tensor: Tensor) -> None:
        """Refuse a tensor that has other zeros than the settings say."""
        expect(int(self.kept(tensor).sum()) == self.count, "the zeros are not as many as the settings say")


class _PrunedAffine(_Affine):
    """A sparse parameter of integers, its zeros among them."""

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        self._pruned = _Pruned(params, shape, dtype)
        expect(isinstance(params["values"], dict), "values must be null or the settings of affine")
        super().__init__(params["values"], shape, dtype)

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, PartSpec]:
        """The scale."""
        expect("zero_point" not in parts, "sparse values have no zero point")
        return super().layout(parts)

    def decode(self, integers: Integers, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor, if its zeros are those of the settings."""
        self._pruned.check(torch.from_numpy(integers.reshape(self.spec.shape)))
        return super().decode(integers, parts)


class _PrunedRaw(_Raw):
    """A sparse int8 parameter, its zeros among its integers."""

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        self._pruned = _Pruned(params, shape, dtype)
        super().__init__({}, shape, dtype)

    def decode(self, integers: Integers, parts: Mapping[str, Tensor]) -> Tensor:
        """The integers, if their zeros are those of the settings."""
        tensor = super().decode(integers, parts)
        self._pruned.check(tensor)
        return tensor


class _Mask(Inner):
    """A sparse parameter whose values are no integers: 1 where one is stored, 0 elsewhere."""

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        self._pruned = _Pruned(params, shape, dtype)
        self._shape, self._dtype = shape, dtype
        self.limits, self.spec = (0, 1), PartSpec(torch.int8, shape)

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, PartSpec]:
        """The values, as they are."""
        return {"values": PartSpec(self._dtype, (self._pruned.count,))}

    def bytes_beside(self, parts: Collection[str]) -> int:
        """Those of the values."""
        return self._pruned.count * self._dtype.itemsize

    def encode(self, tensor: Tensor, parts: Mapping[str, Tensor]) -> tuple[Integers, dict[str, Tensor]]:
        """The mask, and the values it marks."""
        keep = self._pruned.kept(tensor)
        if int(keep.sum()) != self._pruned.count:
            raise ModeloptError("has other zeros than its encoding describes")
        return keep.to(torch.int8).numpy(), {"values": tensor[keep]}

    def decode(self, integers: Integers, parts: Mapping[str, Tensor]) -> Tensor:
        """Zeros, with the values in their places."""
        keep = torch.from_numpy(integers.reshape(self._shape)).bool()
        expect(int(keep.sum()) == self._pruned.count, "the mask is not that of as many values")
        tensor = torch.zeros(self._shape, dtype=self._dtype)
        tensor[keep] = parts["values"]
        self._pruned.check(tensor)
        return tensor

    def center(self, parts: Mapping[str, Tensor]) -> int:
        """Zeros."""
        return 0


def inner_of(params: Params, shape: Shape, dtype: torch.dtype) -> Inner:
    """The codec that the settings ``codec`` and ``params``, perhaps from a file, name.

    Raises:
        ArtifactError: there is no such codec of integers, or its settings do not fit the tensor.
    """
    name, settings = params.get("codec"), params.get("params")
    if not isinstance(settings, dict):
        raise ArtifactError("the settings of the inner codec are missing")
    match name:
        case "affine":
            return _Affine(settings, shape, dtype)
        case "codebook":
            return _Codebook(settings, shape, dtype)
        case "raw":
            return _Raw(settings, shape, dtype)
        case "sparse" if settings.get("values") is None:
            kind = _PrunedRaw if dtype == torch.int8 else _Mask
            return kind(settings, shape, dtype)
        case "sparse":
            return _PrunedAffine(settings, shape, dtype)
    raise ArtifactError(f"{str(name)[:40]!r} is no codec of integers")
