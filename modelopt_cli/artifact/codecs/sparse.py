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
from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.artifact.codecs.base import Params, PartSpec, Shape, expect
from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.program import Encoding

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)
"""Element types of the parameters this codec stores."""

FREE, EXPANSION = 4096, 256
"""A tensor has at most ``FREE + EXPANSION * (bytes of its values and positions)`` elements."""

_AFFINE = Affine()
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sparse:
    """Values in row order of the form's grid; positions as a stream of bits."""

    payload = ("values", "positions")

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """``values``, ``positions`` unless all is stored, and the parts of ``affine`` if it is used."""
        params = encoding.params
        expect(dtype in DTYPES, f"codec sparse stores no {dtype}")
        positions.check(params, shape)
        outer = _outer_layout(shape, dtype, encoding)
        stored = torch.int8 if params["values"] is not None else dtype
        layout = {"values": PartSpec(stored, (params["count"],))}
        size = positions.stream_bytes(params, shape)
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
            outer = _AFFINE.encode(tensor, Encoding("affine", dict(params["values"]), encoding.parts))
            dense = outer.pop("values")
        grid = positions.grid_of(params, shape)
        rows = grid.read(dense)
        keep = positions.kept(rows, params, grid)
        parts = {"values": _take(rows, keep)}
        if params["form"] != "dense":
            parts["positions"] = positions.write(keep, params, grid)
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
        layout = self.layout(shape, dtype, Encoding("sparse", dict(params), outer))
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
        """From the counts and widths in the settings."""
        affine = params.get("values")
        bare = dict(params) | {"values": None}
        stored = torch.int8 if affine is not None else dtype
        layout = self.layout(shape, stored, Encoding("sparse", bare))
        size = sum(spec.nbytes for spec in layout.values())
        if affine is None:
            return size
        return size + _AFFINE.predicted_bytes(shape, dtype, affine, parts) - math.prod(shape)


def _outer_layout(shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
    """The parts of the codec whose integers are stored: none, or the scale of ``affine``."""
    affine: Any = encoding.params["values"]
    if affine is None:
        expect(not encoding.parts, "plain values have no extra parts")
        return {}
    expect(isinstance(affine, dict), "values must be null or the settings of affine")
    expect("zero_point" not in encoding.parts, "sparse values have no zero point")
    layout = _AFFINE.layout(shape, dtype, Encoding("affine", affine, dict(encoding.parts)))
    del layout["values"]
    return layout


def _bits(tensor: Tensor) -> npt.NDArray[Any]:
    """The elements as integers of their size, in the same memory: numpy knows no bfloat16."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize]).numpy()


def _take(rows: Tensor, keep: Tensor) -> Tensor:
    return torch.from_numpy(_bits(rows)[keep.numpy()]).view(rows.dtype)


def _place(parts: Mapping[str, Tensor], params: Params, shape: Shape) -> Tensor:
    values, grid = parts["values"], positions.grid_of(params, shape)
    if params["form"] == "dense":
        return values.reshape(shape)
    keep = positions.read(parts["positions"], params, grid)
    expect(int(keep.sum()) == len(values), "the positions are not as many as the values")
    rows = torch.zeros(grid.rows, grid.length, dtype=values.dtype)
    _bits(rows)[keep.numpy()] = _bits(values)
    again = positions.kept(rows, params, grid)
    expect(torch.equal(again, keep), "a stored block holds nothing but zeros")
    return grid.restore(rows)
