"""``entropy``: the integers of another codec in about as many bits as they are surprising.

Settings: ``codec`` and ``params``, the name and the settings of the codec whose integers these are;
``center`` and ``columns``, see ``matrix``; ``reach``, ``mirror``, ``signed`` and ``lag``, see ``blocks``; and
``blocks``, a list of ``[rows, lanes, last, bytes]``.

A ``sparse`` parameter is written densely: the context model says where its zeros are with fewer bits than
positions take. If its values are no integers, the stream says which of them are zero, and the others follow
as they are.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import IntegerView, Params, PartSpec, Shape, expect
from modelopt_cli.artifact.codecs.blocks import Alphabet, Passes
from modelopt_cli.artifact.codecs.matrix import (
    MOST_COLUMNS,
    MOST_STEPS,
    MOST_SYMBOLS,
    MatrixForm,
    decode,
    encode,
)
from modelopt_cli.artifact.codecs.wrapper import Wrapper
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program.program import Encoding

MAX_REACH = 1 << 11
FREE, EXPANSION = 1 << 16, 1 << 12
"""A tensor has at most ``FREE + EXPANSION * (bytes of its stream)`` elements."""
_SETTINGS = {"codec", "params", "center", "columns", "reach", "mirror", "signed", "lag", "blocks"}


class Entropy(Wrapper):
    """The stream of ``matrix``, and the inner codec's other parts."""

    name = "entropy"
    help = "the integers of another codec in about as many bits as they are surprising"
    payload = ("stream", "values")

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """``stream``, ``values`` of a sparse parameter without integers, the inner codec's other parts."""
        view = self._view(encoding.params, shape, dtype)
        form = _form(encoding.params, view)
        outer = {name: part for name, part in encoding.parts.items() if name not in self.payload}
        return {"stream": PartSpec(torch.uint8, (form.nbytes,)), **view.layout(outer)}

    def encode(self, tensor: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """All parts, for an encoding that :meth:`offer` made of this tensor."""
        view = self._view(encoding.params, tuple(tensor.shape), tensor.dtype)
        form, stream = _form(encoding.params, view), encoding.parts.get("stream")
        if stream is None or len(stream) != form.nbytes:
            raise ModeloptError("has an encoding without its stream")
        outer = {name: part for name, part in encoding.parts.items() if name != "stream"}
        return {"stream": stream, **view.encode(tensor, replace(encoding, parts=outer))[1]}

    def decode(self, parts: Mapping[str, Tensor], params: Params, dtype: torch.dtype, shape: Shape) -> Tensor:
        """Decode the integers and let the inner codec make the tensor of them."""
        inner_parts = {name: part for name, part in parts.items() if name != "stream"}
        layout = self.layout(shape, dtype, Encoding(self.name, dict(params), inner_parts))
        expect(layout.keys() == parts.keys(), f"codec entropy needs the parts {', '.join(layout)}")
        for name, spec in layout.items():
            fits = PartSpec(parts[name].dtype, tuple(parts[name].shape)) == spec
            expect(fits, f"the {name} does not fit the parameter")
        view = self._view(params, shape, dtype)
        stream = parts["stream"].contiguous().numpy()
        return view.decode(decode(stream, _form(params, view), view.limits, view.numpy_type), inner_parts)

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """The stream's bytes stand in the settings."""
        view = self._view(params, shape, dtype)
        return _form(params, view).nbytes + view.bytes_of_other_parts(parts)

    def offer(self, tensor: Tensor, encoding: Encoding) -> Encoding | None:
        """An encoding of integers, their stream among its parts; None where the codec cannot store them."""
        if not self._wraps(encoding, tensor.dtype) or not tensor.numel():
            return None
        view = self._view(self._wrapped(encoding), tuple(tensor.shape), tensor.dtype)
        integers, _ = view.encode(tensor, encoding)
        center = view.center(encoding.parts)
        if max(int(integers.max()) - center, center - int(integers.min())) >= MAX_REACH:
            return None
        form, stream = encode(integers, center)
        if view.count > FREE + EXPANSION * form.nbytes:
            return None
        blocks = [[passes.rows, passes.lanes, passes.last, size] for passes, size in form.blocks]
        settings = {"center": center, "columns": form.columns, **asdict(form.alphabet), "blocks": blocks}
        parts = {**encoding.parts, "stream": torch.from_numpy(stream)}
        params = {**self._wrapped(encoding), **settings}
        return replace(encoding, codec=self.name, params=params, parts=parts)


def _form(params: Params, view: IntegerView) -> MatrixForm:
    """The settings, which may come from a hostile file, checked."""
    expect(set(params) == _SETTINGS, f"codec entropy needs exactly {', '.join(sorted(_SETTINGS))}")
    center = _integer(params["center"], "center", -(1 << 16), 1 << 16)
    columns = _integer(params["columns"], "columns", 1, MOST_COLUMNS)
    reach = _integer(params["reach"], "reach", 0, MAX_REACH)
    mirror = _integer(params["mirror"], "mirror", -1, 1)
    lag = _integer(params["lag"], "lag", 1, MOST_COLUMNS)
    expect(type(params["signed"]) is bool, "signed must be true or false")
    expect(isinstance(params["blocks"], list), "blocks must be a list")
    blocks = [_block(block, columns) for block in params["blocks"]]
    form = MatrixForm(center, columns, Alphabet(reach, mirror, params["signed"], lag), blocks)
    rows = sum(passes.rows for passes, _ in blocks)
    expect(rows > 0 and rows * columns == view.count, "the blocks are not those of the parameter")
    expect(view.count <= FREE + EXPANSION * form.nbytes, "so few bytes cannot stand for so large a tensor")
    return form


def _block(block: object, columns: int) -> tuple[Passes, int]:
    if not isinstance(block, list) or len(block) != 4:
        raise ArtifactError("a block is rows, lanes, last rows and bytes")
    rows = _integer(block[0], "rows of a block", 1, MOST_SYMBOLS // columns)
    lanes = _integer(block[1], "lanes of a block", 1, rows)
    passes = Passes(rows, lanes, _integer(block[2], "last rows of a block", 0, rows - lanes))
    expect(passes.steps(columns) <= MOST_STEPS, "a block has too few lanes")
    return passes, _integer(block[3], "bytes of a block", 0, 1 << 40)


def _integer(value: object, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ArtifactError(f"{name} must be {low} to {high}")
    return value
