"""``sparse``: the values that are not zero, and where they stand.

Settings: ``form`` (how the positions are written, see ``positions``), its own settings, ``count`` (how
many values are stored) and ``values`` (null for values in the parameter's own type, or the settings of
``affine``, whose integers are then stored instead and whose scale is a part of its own). Form ``dense``
stores every element: it marks a tensor as pruned whose zeros are too few to be worth leaving out.

Everything needed to know the size stands in the settings. A parameter with this codec is a pruned one:
its zeros are to stay zeros.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs import positions
from modelopt_cli.artifact.codecs.affine import Affine, AffineIntegers
from modelopt_cli.artifact.codecs.base import (
    FLOATS,
    Codec,
    Integers,
    IntegerView,
    Params,
    PartSpec,
    Shape,
    expect,
)
from modelopt_cli.artifact.codecs.grid import grid_of
from modelopt_cli.artifact.codecs.raw import PLAIN, Raw, RawIntegers
from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.program import Encoding

FREE, EXPANSION = 4096, 256
"""A tensor has at most ``FREE + EXPANSION * (bytes of its values and positions)`` elements."""

_AFFINE, _RAW = Affine(), Raw()
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sparse(Codec):
    """Values in row order of the form's grid; positions as a stream of bits."""

    name = "sparse"
    help = "the values that are not zero, plain or as integers of affine, and where they stand"
    payload = ("values", "positions")
    dtypes = (*FLOATS, torch.int8)

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """``values``, ``positions`` unless all is stored, and the parts of ``affine`` if it is used."""
        params = encoding.params
        self.require_dtype(dtype)
        positions.check(params, shape)
        outer = _outer_layout(shape, dtype, encoding)
        stored = torch.int8 if params["values"] is not None else dtype
        layout = {"values": PartSpec(stored, (params["count"],))}
        size = positions.form_of(params).stream_bytes(params, grid_of(params, shape))
        if size is not None:
            layout["positions"] = PartSpec(torch.uint8, (size,))
        room = FREE + EXPANSION * sum(spec.nbytes for spec in layout.values())
        expect(math.prod(shape) <= room, "so few bytes cannot stand for so large a tensor")
        return {**layout, **outer}

    def encode(self, tensor: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """The nonzero values, in order, and their positions."""
        params, shape = encoding.params, tuple(tensor.shape)
        self.layout(shape, tensor.dtype, encoding)
        dense: Tensor = tensor.detach()
        outer: dict[str, Tensor] = {}
        if params["values"] is not None:
            affine = Encoding(Affine.name, dict(params["values"]), encoding.parts, encoding.integers)
            outer = _AFFINE.encode(tensor, affine)
            dense = outer.pop("values")
        grid, form = grid_of(params, shape), positions.form_of(params)
        rows = grid.read(dense)
        keep = form.kept(rows != 0, params, grid)
        parts = {"values": _take(rows, keep)}
        if (stream := form.write(keep, params, grid)) is not None:
            parts["positions"] = stream
        self._check(parts, shape, tensor.dtype, encoding)
        return {**parts, **outer}

    def _check(self, parts: dict[str, Tensor], shape: Shape, dtype: torch.dtype, encoding: Encoding) -> None:
        layout = self.layout(shape, dtype, encoding)
        for name, part in parts.items():
            if tuple(part.shape) != layout[name].shape:
                raise ModeloptError(
                    f"has other zeros than its encoding describes: {len(part)} {name}, "
                    f"not {layout[name].shape[0]}"
                )

    def decode(self, parts: Mapping[str, Tensor], params: Params, dtype: torch.dtype, shape: Shape) -> Tensor:
        """Zeros, with the stored values in their places."""
        outer = {name: part for name, part in parts.items() if name not in self.payload}
        layout = self.layout(shape, dtype, Encoding(self.name, dict(params), outer))
        expect(layout.keys() == parts.keys(), f"codec sparse needs the parts {', '.join(layout)}")
        for name, spec in layout.items():
            part = parts[name]
            fits = part.dtype == spec.dtype and tuple(part.shape) == spec.shape
            expect(fits, f"the {name} do not fit the parameter")
        dense = _place(parts, params, shape)
        if params["values"] is None:
            return dense
        return _AFFINE.decode({**outer, "values": dense}, params["values"], dtype, shape)

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """Bytes that follow from the counts and widths in the settings."""
        affine = params.get("values")
        bare = dict(params) | {"values": None}
        stored = torch.int8 if affine is not None else dtype
        layout = self.layout(shape, stored, Encoding(self.name, bare))
        size = sum(spec.nbytes for spec in layout.values())
        if affine is None:
            return size
        return size + _AFFINE.predicted_bytes(shape, dtype, affine, parts) - math.prod(shape)

    def makes_integers(self, dtype: torch.dtype) -> bool:
        """Always: the zeros themselves are a mask."""
        return True

    def integers(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> IntegerView:
        """The tensor written densely: its integers, or a mask where its values are none."""
        self.require_dtype(dtype)
        if params.get("values") is not None:
            return _PrunedAffine(params, shape, dtype)
        return (_PrunedRaw if dtype == torch.int8 else _Mask)(params, shape, dtype)

    def is_pruned(self, params: Params) -> bool:
        """Always: that is what the codec says of a parameter."""
        return True

    def pattern(self, params: Params) -> str | None:
        """``n:m`` or blocks, where the positions are written so."""
        return positions.form_of(params).pattern(params)

    def values_label(self, params: Params) -> str:
        """Name of ``affine``, or none."""
        return "" if params["values"] is None else _AFFINE.values_label(params["values"])

    def form(self, params: Params) -> str:
        """The form of the positions, and the set of the values."""
        return ", ".join(filter(None, (positions.form_of(params).label(params), self.values_label(params))))

    def without_zeros(self, encoding: Encoding) -> Encoding:
        """The encoding by ``affine``, or the plain one."""
        affine = encoding.params["values"]
        return PLAIN if affine is None else Encoding(Affine.name, dict(affine), dict(encoding.parts))

    def takes(self, dtype: torch.dtype, base: Encoding) -> bool:
        """True if a tensor of this type whose values are stored so can be stored sparsely."""
        inner = base.codec in (Affine.name, Raw.name) and "zero_point" not in base.parts
        return dtype in self.dtypes and inner


SPARSE = Sparse()


def settings_of(base: Encoding) -> dict[str, Any] | None:
    """The setting ``values`` of a sparse encoding whose values ``base`` would store without zeros."""
    return dict(base.params) if base.codec == Affine.name else None


def _outer_layout(shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
    """The parts of the codec whose integers are stored: none, or the scale of ``affine``."""
    affine: Any = encoding.params["values"]
    if affine is None:
        expect(not encoding.parts, "plain values have no extra parts")
        return {}
    expect(isinstance(affine, dict), "values must be null or the settings of affine")
    expect("zero_point" not in encoding.parts, "sparse values have no zero point")
    layout = _AFFINE.layout(shape, dtype, Encoding(Affine.name, affine, dict(encoding.parts)))
    del layout["values"]
    return layout


def _bits(tensor: Tensor) -> npt.NDArray[Any]:
    """The elements as integers of their size, in the same memory: numpy knows no bfloat16."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize]).numpy()


def _take(rows: Tensor, keep: Tensor) -> Tensor:
    return torch.from_numpy(_bits(rows)[keep.numpy()]).view(rows.dtype)


def _place(parts: Mapping[str, Tensor], params: Params, shape: Shape) -> Tensor:
    values, grid, form = parts["values"], grid_of(params, shape), positions.form_of(params)
    if "positions" not in parts:
        return values.reshape(shape)
    keep = form.read(parts["positions"], params, grid)
    expect(int(keep.sum()) == len(values), "the positions are not as many as the values")
    rows = torch.zeros(grid.rows, grid.length, dtype=values.dtype)
    _bits(rows)[keep.numpy()] = _bits(values)
    expect(torch.equal(form.kept(rows != 0, params, grid), keep), "a stored block holds nothing but zeros")
    return grid.restore(rows)


class _Pruned:
    """The elements of a tensor that a sparse parameter stores."""

    def __init__(self, params: dict[str, Any], shape: Shape) -> None:
        positions.check(params, shape)
        self.count: int = params["count"]
        self._params, self._grid = params, grid_of(params, shape)

    def kept(self, tensor: Tensor) -> Tensor:
        """A mask, of the tensor's shape."""
        nonzero = self._grid.read(tensor) != 0
        return self._grid.restore(positions.form_of(self._params).kept(nonzero, self._params, self._grid))

    def check(self, tensor: Tensor) -> None:
        """Refuse a tensor that has other zeros than the settings say."""
        expect(int(self.kept(tensor).sum()) == self.count, "the zeros are not as many as the settings say")


class _PrunedAffine(AffineIntegers):
    """A sparse parameter of integers, its zeros among them."""

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        self._pruned = _Pruned(params, shape)
        expect(isinstance(params["values"], dict), "values must be null or the settings of affine")
        super().__init__(_AFFINE, params["values"], shape, dtype)

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, PartSpec]:
        """The scale."""
        expect("zero_point" not in parts, "sparse values have no zero point")
        return super().layout(parts)

    def decode(self, integers: Integers, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor, if its zeros are those of the settings."""
        self._pruned.check(torch.from_numpy(integers.reshape(self.spec.shape)))
        return super().decode(integers, parts)


class _PrunedRaw(RawIntegers):
    """A sparse int8 parameter, its zeros among its integers."""

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        self._pruned = _Pruned(params, shape)
        super().__init__(_RAW, {}, shape, dtype)

    def decode(self, integers: Integers, parts: Mapping[str, Tensor]) -> Tensor:
        """The integers, if their zeros are those of the settings."""
        tensor = super().decode(integers, parts)
        self._pruned.check(tensor)
        return tensor


class _Mask(IntegerView):
    """A sparse parameter whose values are no integers: 1 where one is stored, 0 elsewhere."""

    def __init__(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        # Without the codec's bound on sizes: a mask may take fewer bytes than positions do.
        self._pruned, self._shape, self._dtype = _Pruned(params, shape), shape, dtype
        self.limits, self.spec = (0, 1), PartSpec(torch.int8, shape)

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, PartSpec]:
        """The values, as they are."""
        return {"values": PartSpec(self._dtype, (self._pruned.count,))}

    def bytes_of_other_parts(self, parts: Collection[str]) -> int:
        """Bytes of the values."""
        return self._pruned.count * self._dtype.itemsize

    def encode(self, tensor: Tensor, encoding: Encoding) -> tuple[Integers, dict[str, Tensor]]:
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
