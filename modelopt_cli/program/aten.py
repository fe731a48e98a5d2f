"""Torch's ATen operators, which ``torch.export`` records, as operations of the normal form.

Most have the name and arguments of a function on the allow-list, and need no row. A row of ``ROWS`` says how
another one is written: a function from what writes nodes and from the operator's arguments, by the names of
its schema (``self`` as ``input``), to the value.
"""

from typing import Any

import torch
from torch import fx

from modelopt_cli.program.aten_core import CORE
from modelopt_cli.program.aten_rows import Arguments, Row, Writer, renamed
from modelopt_cli.program.refusals import DATA, SIZES, VALUES, Refusal

_LAST = 2**63 - 1
NOTHING = frozenset(
    {
        "_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range",
        "sym_constrain_range_for_size", "_functional_assert_scalar", "_functional_assert_async",
    }
)  # fmt: skip
"""Checks, which leave nothing behind."""


def _only(name: str, *kept: str) -> Row:
    """Some of the arguments to another operation."""
    return lambda write, arguments: write.call(
        name, **{key: arguments[key] for key in kept if key in arguments}
    )


def _same(write: Writer, arguments: Arguments) -> Any:
    return arguments["input"]


def _slice(write: Writer, arguments: Arguments) -> Any:
    start, end, step = arguments.get("start"), arguments.get("end"), arguments.get("step", 1)
    start, end = None if start == 0 else start, None if end == _LAST else end
    if (start, end, step) == (None, None, 1):
        return arguments["input"]
    return _item(
        write, arguments["input"], arguments.get("dim", 0), slice(start, end, None if step == 1 else step)
    )


def _select(write: Writer, arguments: Arguments) -> Any:
    return _item(write, arguments["input"], arguments["dim"], arguments["index"])


def _item(write: Writer, tensor: Any, dim: int, part: Any) -> Any:
    if dim >= 0:
        return write.call("getitem", input=tensor, index=(*[slice(None)] * dim, part))
    return write.call("getitem", input=tensor, index=(..., part, *[slice(None)] * (-dim - 1)))


def _places(indices: Any) -> tuple[Any, ...]:
    """The index in brackets, from one tensor or None for each dimension."""
    return tuple(slice(None) if index is None else index for index in indices)


def _index(write: Writer, arguments: Arguments) -> Any:
    return write.call("getitem", input=arguments["input"], index=_places(arguments["indices"]))


def _index_put(write: Writer, arguments: Arguments) -> Any:
    if arguments.get("accumulate"):
        return write.call("index_put", **arguments)
    return write.call(
        "set_item", input=arguments["input"], index=_places(arguments["indices"]), value=arguments["values"]
    )


def _index_put_in_place(write: Writer, arguments: Arguments) -> Any:
    return write.call("copy_", input=arguments["input"], src=_index_put(write, arguments))


def _to(write: Writer, arguments: Arguments) -> Any:
    kept = {key: arguments[key] for key in ("input", "dtype", "other") if arguments.get(key) is not None}
    return write.call("to", **kept) if len(kept) > 1 else arguments["input"]


def _embedding(write: Writer, arguments: Arguments) -> Any:
    kept = {"input": arguments["indices"], "weight": arguments["weight"]}
    if arguments.get("padding_idx", -1) >= 0:
        kept["padding_idx"] = arguments["padding_idx"]
    return write.call("embedding", **kept)


def _interpolate(mode: str, *, antialias: bool = False) -> Row:
    def row(write: Writer, arguments: Arguments) -> Any:
        size = arguments.get("output_size")
        named: Arguments = (
            {"size": tuple(size)} if size else {"scale_factor": tuple(arguments["scale_factors"])}
        )
        if arguments.get("align_corners"):
            named["align_corners"] = True
        if antialias:
            named["antialias"] = True
        return write.call("interpolate", input=arguments["input"], mode=mode, **named)

    return row


def _filled(value: Any = None) -> Row:
    """A new tensor of a computed size, where the input is and of its type unless another is named."""

    def row(write: Writer, arguments: Arguments) -> Any:
        fill = arguments.get("fill_value", value)
        dtype = arguments.get("dtype") or torch.tensor(0 if isinstance(fill, fx.Node) else fill).dtype
        return write.call(
            "new_full", input=write.source, size=tuple(arguments["size"]), fill_value=fill, dtype=dtype
        )

    return row


def _on_device(name: str) -> Row:
    """A table of numbers, made where the input is."""

    def row(write: Writer, arguments: Arguments) -> Any:
        device = write.call("getattr", input=write.source, name="device")
        return write.call(name, **arguments, device=device)

    return row


def _einsum(write: Writer, arguments: Arguments) -> Any:
    return write.call("einsum", equation=arguments["equation"], operands=tuple(arguments["tensors"]))


def _number(write: Writer, arguments: Arguments) -> Any:
    return _filled()(write, {"size": (), "fill_value": arguments["s"], "dtype": arguments.get("dtype")})


# In place, these change what a tensor's sizes are, and what is read later is their result.
_RESHAPING = ("t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze")
_UPSAMPLING = {
    **{f"upsample_nearest{rank}d": "nearest" for rank in (1, 2, 3)},
    **{f"_upsample_nearest_exact{rank}d": "nearest-exact" for rank in (1, 2, 3)},
    **{"upsample_linear1d": "linear", "upsample_bilinear2d": "bilinear", "upsample_bicubic2d": "bicubic"},
    "upsample_trilinear3d": "trilinear",
}

ROWS: dict[str, Row] = {
    **CORE,
    **dict.fromkeys(("detach", "detach_", "alias", "lift_fresh_copy"), _same),
    **dict.fromkeys(("to", "_to_copy"), _to),
    **{f"__{name}__": renamed(name) for name in ("and", "or", "xor")},
    **{f"{name}_": renamed(name) for name in _RESHAPING},
    "_unsafe_view": renamed("view"),
    "_unsafe_index": _index,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put_in_place,
    "sym_size": renamed("size"),
    "sym_numel": renamed("numel"),
    "embedding": _embedding,
    "einsum": _einsum,
    "scalar_tensor": _number,
    "zeros": _filled(0.0),
    "empty": _filled(0.0),
    "ones": _filled(1.0),
    "full": _filled(),
    **{name: _on_device(name) for name in ("arange", "eye")},
    "new_empty": _only("new_zeros", "input", "size", "dtype"),
    "empty_like": _only("zeros_like", "input", "dtype"),
    "log_sigmoid": renamed("logsigmoid"),
    "im2col": renamed("unfold"),
    "col2im": renamed("fold"),
    "affine_grid_generator": renamed("affine_grid"),
    **{name: _interpolate(mode) for name, mode in _UPSAMPLING.items()},
    "_upsample_bilinear2d_aa": _interpolate("bilinear", antialias=True),
    "_upsample_bicubic2d_aa": _interpolate("bicubic", antialias=True),
}
"""Operator, without its namespace and overload, to how it is written."""

REFUSALS: dict[str, Refusal] = {
    **dict.fromkeys(("item", "_local_scalar_dense", "equal", "is_nonzero", "allclose"), VALUES),
    **dict.fromkeys(("nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim"), SIZES),
    "_has_compatible_shallow_copy_type": DATA,
}
"""Operators that no Program can hold."""
