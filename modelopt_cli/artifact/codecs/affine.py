"""``affine``: evenly spaced steps, ``(values - zero_point) * scale``.

Settings: ``bits`` (2 to 8), and either ``axis`` (one scale per index along it) or ``group`` (one scale
per ``group`` neighbours along the last dimension, the last group possibly shorter), or both null for
one scale. Values and zero points are int8 within ``-2**(bits-1) .. 2**(bits-1) - 1``.

The product is taken once, in float32, and rounded to the parameter's dtype: one IEEE multiplication,
the same on every machine.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch

from modelopt_cli.artifact.codecs.base import (
    FLOATS,
    Codec,
    IntegerView,
    Params,
    PartSpec,
    Shape,
    Steps,
    expect,
)
from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.program import Encoding

_SCALES = (torch.float32, torch.float16, torch.bfloat16)
Block = slice | EllipsisType
_BLOCK = 1 << 18


class Affine(Codec):
    """Symmetric without a ``zero_point`` part, asymmetric with one."""

    name = "affine"
    help = "integers of 2 to 8 bits, evenly spaced steps of a scale"
    payload = ("values",)
    dtypes = FLOATS
    few_values = True

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """``values``, ``scale`` and perhaps ``zero_point``; parts may come in any shape of the right size."""
        parts = encoding.parts
        self.require_dtype(dtype)
        expect("scale" in parts and parts.keys() <= {"scale", "zero_point"}, "codec affine needs its scale")
        expect(parts["scale"].dtype in _SCALES, f"the scale cannot be {parts['scale'].dtype}")
        scale_shape = _scale_shape(shape, encoding.params)
        for name, part in parts.items():
            fits = part.numel() == math.prod(scale_shape)
            expect(fits, f"the {name} has {part.numel()} elements where the shape {scale_shape} is needed")
        layout = {"values": PartSpec(torch.int8, shape), "scale": PartSpec(parts["scale"].dtype, scale_shape)}
        if "zero_point" in parts:
            layout["zero_point"] = PartSpec(torch.int8, scale_shape)
        return layout

    def encode(self, tensor: torch.Tensor, encoding: Encoding) -> dict[str, torch.Tensor]:
        """The integers that the method hands over, or else recovered ones, if they stand for the tensor."""
        shape, params = tuple(tensor.shape), encoding.params
        layout = self.layout(shape, tensor.dtype, encoding)
        parts = {"scale": encoding.parts["scale"].detach().reshape(layout["scale"].shape)}
        if not bool(parts["scale"].isfinite().all()):
            raise ModeloptError("has a scale that is not finite, which codec affine cannot store")
        if "zero_point" in encoding.parts:
            zero_point = encoding.parts["zero_point"].detach().reshape(layout["zero_point"].shape)
            _check_zero_point(zero_point, *_range(params))
            parts["zero_point"] = zero_point.to(torch.int8)
        if encoding.integers is not None:
            return {**parts, "values": _checked(encoding.integers, tensor, parts, params)}
        values = torch.empty(shape, dtype=torch.int8)
        for some in _blocks(shape):
            values[some] = _recovered(tensor[some], _Grid.of(parts, shape, params, some), params)
        return {**parts, "values": values}

    def decode(
        self, parts: Mapping[str, torch.Tensor], params: Params, dtype: torch.dtype, shape: Shape
    ) -> torch.Tensor:
        """``(values - zero_point) * scale`` in float32, then ``dtype``."""
        settings = {name: part for name, part in parts.items() if name != "values"}
        layout = self.layout(shape, dtype, Encoding("affine", dict(params), settings))
        expect("values" in parts, "codec affine needs its values")
        for name, spec in layout.items():
            part = parts[name]
            fits = part.dtype == spec.dtype and tuple(part.shape) == spec.shape
            expect(fits, f"the {name} does not fit the parameter")
        low, high = _range(params)
        for name in layout.keys() & {"values", "zero_point"}:
            _check_range(parts[name], low, high, name)
        floats = torch.empty(shape, dtype=dtype)
        for some in _blocks(shape):
            floats[some] = _Grid.of(parts, shape, params, some).floats(parts["values"][some])
        return floats

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """One byte per value, four per float32 scale, one per zero point."""
        settings = {"scale": torch.empty(_scale_shape(shape, params), device="meta")}
        if "zero_point" in parts:
            settings["zero_point"] = settings["scale"].to(torch.int8)
        layout = self.layout(shape, dtype, Encoding("affine", dict(params), settings))
        return sum(spec.nbytes for spec in layout.values())

    def makes_integers(self, dtype: torch.dtype) -> bool:
        """Always."""
        return True

    def integers(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> "AffineIntegers":
        """The values."""
        return AffineIntegers(self, params, shape, dtype)

    def values_label(self, params: Params) -> str:
        """Name with the bits: ``affine8``."""
        return f"{self.name}{params['bits']}"

    def compute_type(self, encoding: Encoding) -> torch.dtype | None:
        """That of the scale, where it is half precision."""
        dtype = encoding.parts["scale"].dtype
        return dtype if dtype in (torch.float16, torch.bfloat16) else None

    def spread_steps(self, encoding: Encoding, shape: Shape) -> Steps:
        """The steps, whatever has a scale of its own."""
        everything = slice(None) if shape else ...
        grid = _Grid.of(encoding.parts, shape, encoding.params, everything)
        return Steps(grid.scale, grid.zero_point, int(encoding.params["bits"]))

    def channel_steps(self, encoding: Encoding) -> tuple[torch.Tensor, int] | None:
        """The scale, where that is all there is, and the bits."""
        bits = int(encoding.params["bits"])
        one_a_channel = dict(encoding.params) == channel_params(bits) and encoding.parts.keys() == {"scale"}
        return (encoding.parts["scale"], bits) if one_a_channel else None


def channel_params(bits: int) -> dict[str, Any]:
    """Settings with one scale for each index along the first dimension."""
    return {"bits": bits, "axis": 0, "group": None}


class AffineIntegers(IntegerView):
    """The values of ``affine``."""

    part = "values"

    def __init__(self, codec: Codec, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(codec, params, shape, dtype)
        self.limits, self.spec = _range(params), PartSpec(torch.int8, shape)

    def center(self, parts: Mapping[str, torch.Tensor]) -> int:
        """The mean zero point."""
        zero_point = parts.get("zero_point")
        return 0 if zero_point is None else int(zero_point.sum()) // zero_point.numel()


def _range(params: Params) -> tuple[int, int]:
    half = 1 << (int(params["bits"]) - 1)
    return -half, half - 1


def _scale_shape(shape: Shape, params: Params) -> Shape:
    expect(set(params) == {"bits", "axis", "group"}, "codec affine needs exactly bits, axis and group")
    bits, axis, group = params["bits"], params["axis"], params["group"]
    expect(type(bits) is int and 2 <= bits <= 8, "bits must be 2 to 8")
    expect(axis is None or group is None, "axis and group exclude each other")
    if axis is not None:
        expect(type(axis) is int and 0 <= axis < len(shape), f"axis {axis} does not exist in {shape}")
        return (shape[axis],)
    if group is not None:
        expect(
            type(group) is int and 0 < group < 1 << 31 and len(shape) > 0,
            f"group {group} does not fit {shape}",
        )
        return (*shape[:-1], -(-shape[-1] // group))
    return ()


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of some elements, in float32 and in a shape that broadcasts against them."""

    scale: torch.Tensor
    zero_point: torch.Tensor | None

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], shape: Shape, params: Params, some: Block) -> "_Grid":
        zero = parts.get("zero_point")
        scale = _spread(parts["scale"].float(), shape, params, some)
        return cls(scale, None if zero is None else _spread(zero.float(), shape, params, some))

    def floats(self, values: torch.Tensor) -> torch.Tensor:
        """The floats that integers stand for."""
        steps = values.to(torch.float32)
        if self.zero_point is not None:
            steps -= self.zero_point
        return steps.mul_(self.scale)

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """The integers nearest to floats, as float32 and not yet clamped."""
        steps = (tensor.float() / self.scale).nan_to_num_().round_()  # a scale may be zero
        return steps if self.zero_point is None else steps.add_(self.zero_point)


def _checked(
    integers: torch.Tensor, tensor: torch.Tensor, parts: Mapping[str, torch.Tensor], params: Params
) -> torch.Tensor:
    """Integers from a method, once it is sure that they decode to ``tensor``."""
    shape = tuple(tensor.shape)
    if integers.dtype != torch.int8 or tuple(integers.shape) != shape:
        raise ModeloptError("has integers of another type or shape than its values")
    _check_range(integers, *_range(params), "values")
    for some in _blocks(shape):
        floats = _Grid.of(parts, shape, params, some).floats(integers[some])
        if not torch.equal(floats.to(tensor.dtype), tensor[some]):
            raise ModeloptError("has integers that do not stand for its values")
    return integers


def _recovered(tensor: torch.Tensor, grid: _Grid, params: Params) -> torch.Tensor:
    """int8 values that decode to ``tensor``; in bfloat16 a step's own rounding can hide half a step."""
    low, high = _range(params)
    first = values = grid.integers(tensor).clamp_(low, high).to(torch.int8)
    for shift in (0, -1, 1):
        if shift:
            nearby = (first.short() + shift).clamp_(low, high).to(torch.int8)
            wrong = grid.floats(values).to(tensor.dtype) != tensor
            values = torch.where(wrong, nearby, values)
        if torch.equal(grid.floats(values).to(tensor.dtype), tensor):
            return values
    if not bool(tensor.isfinite().all()):
        raise ModeloptError("holds values that are not finite, which codec affine cannot store")
    raise ModeloptError(f"values are not {params['bits']}-bit multiples of their scale")


def _blocks(shape: Shape) -> Iterator[Block]:
    """All elements, some rows at a time: enough to be quick, few enough to stay in the cache."""
    if not shape:
        yield ...
        return
    rows = max(_BLOCK // max(math.prod(shape[1:]), 1), 1)
    yield from (slice(start, start + rows) for start in range(0, shape[0], rows))


def _spread(scales: torch.Tensor, shape: Shape, params: Params, some: Block) -> torch.Tensor:
    """Scales or zero points in a shape that broadcasts against some of the values."""
    if params["axis"] is not None:
        part = scales[some] if params["axis"] == 0 else scales
        return part.reshape([-1 if i == params["axis"] else 1 for i in range(len(shape))])
    if params["group"] is not None:
        index = torch.arange(shape[-1]) // params["group"]
        if len(shape) == 1:
            return scales[index[some]]
        return scales[some].index_select(-1, index)
    return scales


def _check_zero_point(zero_point: torch.Tensor, low: int, high: int) -> None:
    if zero_point.is_floating_point() or bool(((zero_point < low) | (zero_point > high)).any()):
        raise ModeloptError(f"a zero point is not an integer within {low} to {high}")


def _check_range(part: torch.Tensor, low: int, high: int, name: str) -> None:
    if (low, high) != (-128, 127) and part.numel():
        smallest, largest = part.aminmax()
        expect(low <= int(smallest) and int(largest) <= high, f"the {name} exceed {low} to {high}")
