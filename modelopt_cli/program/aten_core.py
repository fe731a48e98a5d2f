"""ATen's core operators, which ``run_decompositions`` leaves, as operations of the normal form.

These are what others are made of: a convolution of any kind, the norms with the statistics that only a
backward pass reads, a linear layer as a product with its transposed weight. Rows as in ``aten.ROWS``.
"""

from typing import Any

from torch import fx

from modelopt_cli.program.aten_rows import Arguments, Row, Writer, renamed
from modelopt_cli.program.calls import arguments as bound_arguments
from modelopt_cli.program.calls import operation

_NORM = ("input", "running_mean", "running_var", "weight", "bias", "momentum", "eps")


def _kept(arguments: Arguments, *names: str, **renamed: str) -> Arguments:
    """Those arguments that are given, some under other names."""
    names = (*names, *renamed)
    return {renamed.get(name, name): arguments[name] for name in names if arguments.get(name) is not None}


def _first_of(row: Row, count: int) -> Row:
    """A result, and as many that nothing in evaluation reads."""
    return lambda write, arguments: (row(write, arguments), *(None,) * (count - 1))


def _convolution(write: Writer, arguments: Arguments) -> Any:
    rank, kept = len(arguments["stride"]), _kept(arguments, "input", "weight", "bias", "groups")
    kept |= {name: tuple(arguments[name]) for name in ("stride", "padding", "dilation")}
    if not arguments["transposed"]:
        return write.call(f"conv{rank}d", **kept)
    return write.call(f"conv_transpose{rank}d", **kept, output_padding=tuple(arguments["output_padding"]))


def _batch_norm(write: Writer, arguments: Arguments) -> Any:
    return write.call("batch_norm", **_kept(arguments, *_NORM))


def _layer_norm(write: Writer, arguments: Arguments) -> Any:
    kept = _kept(arguments, "input", "weight", "bias", "eps")
    return write.call("layer_norm", **kept, normalized_shape=tuple(arguments["normalized_shape"]))


def _group_norm(write: Writer, arguments: Arguments) -> Any:
    return write.call("group_norm", **_kept(arguments, "input", "weight", "bias", "eps", group="num_groups"))


def _softmax(name: str) -> Row:
    return lambda write, arguments: write.call(name, **_kept(arguments, "input", "dim"))


def _with_indices(name: str, *lists: str) -> Row:
    """A pool, and the places of its results as a call of its own, since hardly any network reads those."""

    def row(write: Writer, arguments: Arguments) -> Any:
        named = {key: tuple(value) if key in lists else value for key, value in arguments.items()}
        if named.get("stride") == ():
            del named["stride"]
        both = write.call(f"{name}_with_indices", **named)
        return write.call(name, **named), write.call("getitem", input=both, index=1)

    return row


def _attention(write: Writer, arguments: Arguments) -> Any:
    """Attention by a kernel, which returns what its backward pass needs, too."""
    kept = _kept(arguments, "query", "key", "value", "attn_mask", "is_causal", "scale")
    return write.call("scaled_dot_product_attention", **kept)


def _product(x: str, weight: str, bias: str) -> Row:
    """A product with a transposed weight as the linear layer that it is."""

    def row(write: Writer, arguments: Arguments) -> Any:
        turned, added = _untransposed(arguments[weight]), arguments.get(bias)
        scaled = arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1
        if turned is None or scaled or (added is not None and not _is_fetched(added)):
            return write.call("addmm" if bias else "mm", **arguments)
        bound = {} if added is None else {"bias": added}
        return write.call("linear", input=arguments[x], weight=turned, **bound)

    return row


def _untransposed(value: Any) -> Any:
    """The fetched weight of which a value is the transpose; None where it is anything else."""
    if not isinstance(value, fx.Node) or value.op == "get_attr":
        return None
    bound = bound_arguments(value) if operation(value) in ("t", "permute", "transpose") else {}
    swaps = operation(value) == "t" or list(bound.get("dims", ())) == [1, 0]
    swaps = swaps or {bound.get("dim0"), bound.get("dim1")} == {0, 1}
    return bound["input"] if swaps and _is_fetched(bound.get("input")) else None


def _is_fetched(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


CORE: dict[str, Row] = {
    "convolution": _convolution,
    "_native_batch_norm_legit_no_training": _first_of(_batch_norm, 3),
    "native_layer_norm": _first_of(_layer_norm, 3),
    "native_group_norm": _first_of(_group_norm, 3),
    "_softmax": _softmax("softmax"),
    "_log_softmax": _softmax("log_softmax"),
    "max_pool2d_with_indices": _with_indices("max_pool2d", "kernel_size", "stride", "padding", "dilation"),
    "max_pool3d_with_indices": _with_indices("max_pool3d", "kernel_size", "stride", "padding", "dilation"),
    **{
        f"adaptive_max_pool{rank}d": _with_indices(f"adaptive_max_pool{rank}d", "output_size")
        for rank in (1, 2, 3)
    },
    **{f"_adaptive_avg_pool{rank}d": renamed(f"adaptive_avg_pool{rank}d") for rank in (2, 3)},
    "_scaled_dot_product_flash_attention_for_cpu": _first_of(_attention, 2),
    "addmm": _product("mat1", "mat2", "input"),
    "mm": _product("input", "mat2", ""),
}
"""Operator, without its namespace and overload, to how it is written."""
