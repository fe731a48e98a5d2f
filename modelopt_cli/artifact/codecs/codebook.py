"""``codebook``: centroids, and for each weight which of them it is.

Settings: ``entries`` (1 to 256, or to 65,536 for vectors), ``groups`` (the number of codebooks: the first
dimension is cut into so many runs of equal length, the last perhaps shorter), ``vector`` (how many
neighbouring weights of a row are one centroid; 1 for single weights) and ``pruned`` (true if the centroids
that are 0, one in each codebook, stand for weights that were pruned and are to stay zero).
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.base import Codec, IntegerView, Params, PartSpec, Shape, expect
from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.program import Encoding

MAX_CENTROIDS = 256
MAX_VECTOR_CENTROIDS = 1 << 16
MAX_VECTOR = 64
_CHUNK = 1 << 20
"""Indices looked up at once."""


class Codebook(Codec):
    """Each group's centroids are looked up by index; the value is rounded to the parameter's type.

    Codebooks have one of the types that parameters may have.
    """

    name = "codebook"
    help = "centroids, and for each weight or vector which of them it is"
    payload = ("indices",)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    few_values = True

    def layout(self, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> dict[str, PartSpec]:
        """``indices``, one for each weight or vector, and the ``table``, ``(groups, entries[, vector])``."""
        params, parts = encoding.params, encoding.parts
        self.require_dtype(dtype)
        check(params, shape)
        expect(parts.keys() == {"table"}, "codec codebook needs its centroids")
        codebooks = parts["table"]
        expect(codebooks.dtype in self.dtypes, f"the centroids cannot be {codebooks.dtype}")
        expected = codebooks_shape(params)
        expect(codebooks.numel() == math.prod(expected), f"the codebook has not the shape {expected}")
        return {
            "indices": PartSpec(index_type(params), index_shape(params, shape)),
            "table": PartSpec(codebooks.dtype, expected),
        }

    def encode(self, tensor: Tensor, encoding: Encoding) -> dict[str, Tensor]:
        """Find every weight's centroid; each weight must be one."""
        params = encoding.params
        layout = self.layout(tuple(tensor.shape), tensor.dtype, encoding)
        codebooks = encoding.parts["table"].detach().reshape(layout["table"].shape)
        if params["pruned"] and not bool((codebooks == 0).any(1).all()):
            raise ModeloptError("is pruned, but has no centroid that is zero")
        indices = torch.empty(layout["indices"].shape, dtype=layout["indices"].dtype)
        weights = tensor.detach().contiguous()
        for centroids, rows, places in _chunks(codebooks.to(tensor.dtype), weights, indices, params):
            index = _find(rows, centroids)
            if not torch.equal(centroids[index], rows):
                raise ModeloptError("has values that are not in its codebook")
            places.copy_(index)
        return {"indices": indices, "table": codebooks}

    def decode(self, parts: Mapping[str, Tensor], params: Params, dtype: torch.dtype, shape: Shape) -> Tensor:
        """The centroids that the indices name."""
        expect(set(parts) == {"indices", "table"}, "codec codebook needs indices and centroids")
        layout = self.layout(shape, dtype, Encoding("codebook", dict(params), {"table": parts["table"]}))
        for name, spec in layout.items():
            fits = parts[name].dtype == spec.dtype and tuple(parts[name].shape) == spec.shape
            expect(fits, f"the {name} does not fit the parameter")
        decoded, indices = torch.empty(shape, dtype=dtype), parts["indices"].contiguous()
        for centroids, rows, places in _chunks(parts["table"].to(dtype), decoded, indices, params):
            index = places.int()
            expect(int(index.max()) < params["entries"], "an index lies beyond the codebook")
            torch.index_select(centroids, 0, index, out=rows)
        return decoded

    def predicted_bytes(
        self, shape: Shape, dtype: torch.dtype, params: Params, parts: Collection[str] = ()
    ) -> int:
        """One or two bytes for an index, four for each number of a float32 codebook."""
        check(params, shape)
        parts_of = {"table": torch.empty(codebooks_shape(params), device="meta")}
        layout = self.layout(shape, dtype, Encoding("codebook", dict(params), parts_of))
        return sum(spec.nbytes for spec in layout.values())

    def makes_integers(self, dtype: torch.dtype) -> bool:
        """Always."""
        return True

    def integers(self, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> "CodebookIntegers":
        """The indices."""
        return CodebookIntegers(self, params, shape, dtype)

    def is_pruned(self, params: Params) -> bool:
        """True if the centroid at zero stands for pruned weights."""
        return bool(params.get("pruned"))

    def values_label(self, params: Params) -> str:
        """The number of centroids: ``shared 16``."""
        return f"shared {params['entries']}"

    def codebook_shape(self, params: Params) -> tuple[int, int, int]:
        """Groups, centroids and vector length that the settings say."""
        return params["groups"], params["entries"], params["vector"]

    def with_zeros(self, encoding: Encoding) -> Encoding:
        """The same codebook, whose centroid at zero now stands for pruned weights."""
        return replace(encoding, params={**encoding.params, "pruned": True})

    def without_zeros(self, encoding: Encoding) -> Encoding:
        """The same codebook, whose centroid at zero is one like any other."""
        return replace(encoding, params={**encoding.params, "pruned": False})


class CodebookIntegers(IntegerView):
    """The indices of ``codebook``."""

    part = "indices"

    def __init__(self, codec: Codec, params: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(codec, params, shape, dtype)
        self.limits = (0, params["entries"] - 1)
        self.spec = PartSpec(index_type(params), index_shape(params, shape))

    def center(self, parts: Mapping[str, Tensor]) -> int:
        """The index of the centroid next to zero; vectors have no order."""
        if self._params["vector"] > 1:
            return int(self._params["entries"]) // 2
        codebooks = parts["table"].float().reshape(-1, self._params["entries"])
        return int(codebooks.abs().sum(0).argmin())


def check(params: Params, shape: Shape) -> None:
    """Refuse settings that are malformed or do not fit a tensor of this shape.

    Raises:
        ArtifactError: naming the setting.
    """
    names = {"entries", "groups", "vector", "pruned"}
    expect(set(params) == names, f"codec codebook needs exactly {', '.join(sorted(names))}")
    vector, centroids, groups = params["vector"], params["entries"], params["groups"]
    expect(type(vector) is int and 1 <= vector <= MAX_VECTOR, f"vector must be 1 to {MAX_VECTOR}")
    most = MAX_CENTROIDS if vector == 1 else MAX_VECTOR_CENTROIDS
    expect(type(centroids) is int and 1 <= centroids <= most, f"entries must be 1 to {most}")
    rows = max(shape[0], 1) if shape else 1
    expect(type(groups) is int and 1 <= groups <= rows, "groups must be 1 to the first dimension")
    expect(-(-rows // -(-rows // groups)) == groups, "groups must not be empty")
    expect(type(params["pruned"]) is bool, "pruned must be true or false")
    expect(vector == 1 or not params["pruned"], "vectors are not pruned")
    row = math.prod(shape[1:])
    expect(row % vector == 0, f"rows of {row} weights cannot be cut into vectors of {vector}")


def codebooks_shape(params: Params) -> Shape:
    """Shape of the codebooks of checked settings."""
    shape = (params["groups"], params["entries"], params["vector"])
    return shape[:2] if params["vector"] == 1 else shape


def index_type(params: Params) -> torch.dtype:
    """Type of the indices."""
    return torch.uint8 if params["entries"] <= MAX_CENTROIDS else torch.uint16


def index_shape(params: Params, shape: Shape) -> Shape:
    """The parameter's shape, or ``(rows, vectors in a row)``."""
    if params["vector"] == 1:
        return shape
    return (shape[0] if shape else 1, math.prod(shape[1:]) // params["vector"])


def _chunks(
    codebooks: Tensor, tensor: Tensor, indices: Tensor, params: Params
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of some of a contiguous tensor's weights or vectors, of their indices, and their centroids."""
    weights, rows = tensor.view(-1, *codebooks.shape[2:]), max(len(indices), 1) if indices.dim() else 1
    height = -(-rows // params["groups"]) * (indices.numel() // rows)
    for group, centroids in enumerate(codebooks):
        end = min((group + 1) * height, indices.numel())
        for first in range(group * height, end, _CHUNK):
            some = slice(first, min(first + _CHUNK, end))
            yield centroids, weights[some], indices.view(-1)[some]


def _find(weights: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid that each weight or vector equals; any where it equals none."""
    if weights.dim() == 1:
        ascending, order = centroids.float().sort(stable=True)
        ranks = torch.searchsorted(ascending, weights.float()).clamp_(max=len(ascending) - 1)
        return order[ranks]
    # Whole vectors are compared as strings of bytes. Adding zero turns a negative zero into zero.
    rows, keys = (_as_strings(part.float() + 0.0) for part in (weights, centroids))
    ranked = np.argsort(keys, kind="stable")
    places = np.searchsorted(keys[ranked], rows).clip(max=len(keys) - 1)
    return torch.from_numpy(ranked[places])


def _as_strings(rows: Tensor) -> npt.NDArray[np.void]:
    floats = rows.contiguous().numpy()
    return floats.view(np.dtype((np.void, floats.shape[1] * 4))).reshape(-1)
