"""What a Program's graph may call, as literal tables: functions by name, tensor methods, attributes.

Capture refuses what is not here; reading a file looks names up here and nowhere else. Nothing here
reads or writes files, runs code, or changes anything but its tensor arguments.
"""

import operator
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from modelopt_cli.program.kinds import OTHER_KINDS, QUANTIZED_KINDS, TORCH_KINDS, build, config_of, kind_of

__all__ = [
    "ATTRIBUTES",
    "FUNCTIONS",
    "KINDS",
    "METHODS",
    "build",
    "config_of",
    "function_called",
    "function_name",
    "is_in_place",
    "kind_of",
]

KINDS: tuple[str, ...] = (*TORCH_KINDS, *OTHER_KINDS, *QUANTIZED_KINDS)

_OPERATORS = """
    add sub mul truediv floordiv mod pow matmul neg pos abs getitem iadd isub imul itruediv lt le eq ne gt
    ge and_ or_ xor invert
"""
_TORCH = """
    add sub subtract mul multiply div divide true_divide floor_divide remainder neg negative pow abs
    square sqrt rsqrt reciprocal exp expm1 log log1p log2 sin cos tan atan erf sign round floor ceil
    sigmoid tanh relu relu_ clamp clamp_min clamp_max clip minimum maximum max min mean sum prod amax amin
    argmax std var norm logsumexp cumsum softmax log_softmax matmul bmm mm mv baddbmm addmm einsum
    tensordot flatten reshape permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze
    unflatten cat concat concatenate stack hstack vstack chunk split tensor_split unbind narrow select
    index_select gather take_along_dim masked_fill where roll flip tile broadcast_to repeat_interleave
    rot90 tril triu zeros ones full arange zeros_like ones_like full_like clone channel_shuffle
    pixel_shuffle pixel_unshuffle celu_ selu_ rrelu threshold adaptive_avg_pool1d avg_pool1d max_pool1d
    max_pool2d max_pool3d dropout batch_norm layer_norm group_norm instance_norm bilinear lt le eq ne gt
    ge logical_and logical_or logical_not
"""
_FUNCTIONAL = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear embedding
    batch_norm layer_norm group_norm instance_norm local_response_norm rms_norm normalize
    cosine_similarity relu relu6 elu selu celu leaky_relu prelu rrelu gelu silu mish softplus softsign
    softshrink hardshrink tanhshrink threshold hardtanh hardswish hardsigmoid sigmoid tanh logsigmoid glu
    softmax log_softmax softmin avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
    lp_pool1d lp_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d pad interpolate upsample grid_sample affine_grid pixel_shuffle
    pixel_unshuffle channel_shuffle fold unfold dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout scaled_dot_product_attention one_hot
"""
_METHODS = """
    add add_ sub sub_ mul mul_ div div_ true_divide floor_divide remainder neg pow pow_ abs square sqrt
    rsqrt reciprocal exp expm1 log log1p log2 sin cos tan atan erf sign round floor ceil sigmoid sigmoid_
    tanh tanh_ relu relu_ softmax log_softmax clamp clamp_ clamp_min clamp_max clip minimum maximum max
    min mean sum prod amax amin argmax std var norm logsumexp cumsum matmul bmm mm mv baddbmm addmm size
    dim ndimension numel view view_as reshape reshape_as flatten unflatten permute transpose t swapaxes
    swapdims movedim moveaxis squeeze unsqueeze expand expand_as repeat repeat_interleave tile
    broadcast_to contiguous clone detach chunk split tensor_split unbind narrow select index_select gather
    masked_fill masked_fill_ where roll flip tril triu unfold float double half bfloat16 int long bool to
    type_as new_zeros new_ones new_full lt le eq ne gt ge logical_and logical_or logical_not
"""

# Functions that torchvision keeps whole when it traces its own models: name -> module.
_TORCHVISION: dict[str, str] = {
    "stochastic_depth": "torchvision.ops.stochastic_depth",
    "drop_block2d": "torchvision.ops.drop_block",
    "drop_block3d": "torchvision.ops.drop_block",
    "shifted_window_attention": "torchvision.models.swin_transformer",
    "_get_relative_position_bias": "torchvision.models.swin_transformer",
    "_patch_merging_pad": "torchvision.models.swin_transformer",
}

# Canonical name -> callable. Of two names for one callable the first is canonical.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"F.{name}": getattr(F, name) for name in _FUNCTIONAL.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    "getattr": getattr,
}

METHODS: frozenset[str] = frozenset(_METHODS.split())

# What getattr may fetch: facts about a tensor, views of it, and fields of max() and min().
ATTRIBUTES: frozenset[str] = frozenset(
    {"shape", "ndim", "dtype", "device", "T", "mT", "H", "values", "indices"}
)

_NAMES: dict[Callable[..., Any], str] = {}
for _name, _callable in FUNCTIONS.items():
    _NAMES.setdefault(_callable, _name)


def function_name(function: Callable[..., Any]) -> str | None:
    """The canonical name of a callable; None if it is not on the list."""
    if function in _NAMES:
        return _NAMES[function]
    name = getattr(function, "__name__", "")
    if _TORCHVISION.get(name) == getattr(function, "__module__", None) and _torchvision(name) is function:
        return f"torchvision.{name}"
    return None


def function_called(name: str) -> Callable[..., Any] | None:
    """The callable with this canonical name; None if there is none."""
    found = FUNCTIONS.get(name)
    if (
        found is None
        and name.removeprefix("torchvision.") in _TORCHVISION
        and name.startswith("torchvision.")
    ):
        return _torchvision(name.removeprefix("torchvision."))
    return found


@cache
def _torchvision(name: str) -> Callable[..., Any]:
    return getattr(import_module(_TORCHVISION[name]), name)  # type: ignore[no-any-return]


def is_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call changes one of its arguments, and so must stay even if its result is not used.

    Args:
        node: a node of a graph over ``root``.
        root: where the targets of ``call_module`` nodes are.
    """
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv")
        return in_place or bool(node.kwargs.get("inplace"))
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    return False
