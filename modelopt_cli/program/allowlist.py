"""Literal tables of all that a Program's graph may call: functions by name, tensor methods, attributes.

Capture refuses what is not here; reading a file looks names up here and nowhere else. Nothing here
reads or writes files, runs code, or changes anything but its tensor arguments.
"""

import operator
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Of Python's, x += y and the like.
IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
_OPERATORS = f"""
    add sub mul truediv floordiv mod pow matmul neg pos abs getitem lt le eq ne gt ge and_ or_ xor invert
    lshift rshift {" ".join(IN_PLACE_OPERATORS)}
"""
# Functions of torch that are tensor methods, too.
_BOTH = """
    add sub subtract mul multiply div divide true_divide floor_divide remainder fmod neg negative pow
    float_power abs absolute sign sgn signbit copysign square sqrt rsqrt reciprocal exp exp2 expm1 log
    log10 log1p log2 logaddexp logaddexp2 xlogy logit sin cos tan asin acos atan atan2 arcsin arccos arctan
    arctan2 sinh cosh tanh asinh acosh atanh arcsinh arccosh arctanh sinc hypot deg2rad rad2deg erf erfc
    erfinv lgamma digamma i0 heaviside round floor ceil trunc fix frac nan_to_num sigmoid relu relu_ lerp
    addcmul addcdiv clamp clamp_min clamp_max clip minimum maximum fmin fmax isnan isinf isfinite isposinf
    isneginf isclose lt le eq ne gt ge less less_equal greater greater_equal not_equal logical_and
    logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift
    bitwise_right_shift max min mean sum prod amax amin aminmax argmax argmin all any std var median
    nanmedian nanmean nansum mode quantile nanquantile count_nonzero norm dist logsumexp cumsum cumprod
    cummax cummin logcumsumexp diff renorm softmax log_softmax sort argsort msort topk kthvalue matmul bmm
    mm mv dot vdot inner outer ger baddbmm addbmm addmm addmv addr kron cross trace inverse pinverse positive
    det logdet matrix_power matrix_exp flatten ravel reshape permute transpose adjoint swapaxes swapdims
    movedim moveaxis t squeeze unsqueeze unflatten chunk split split_with_sizes tensor_split hsplit vsplit
    dsplit unbind narrow select diagonal diag diag_embed diagflat index_select index_add index_copy
    index_fill index_put gather scatter scatter_add scatter_reduce slice_scatter select_scatter
    diagonal_scatter take take_along_dim masked_fill masked_scatter where roll flip fliplr flipud rot90
    tile broadcast_to repeat_interleave tril triu clone detach prelu hardshrink angle conj resolve_conj
"""
_TORCH = f"""
    {_BOTH}
    rsub einsum tensordot chain_matmul cdist pairwise_distance cat concat concatenate stack hstack
    vstack dstack column_stack row_stack block_diag cartesian_prod combinations meshgrid broadcast_tensors
    atleast_1d atleast_2d atleast_3d std_mean var_mean trapezoid trapz cumulative_trapezoid bucketize
    searchsorted isin zeros ones full eye arange linspace logspace tril_indices triu_indices zeros_like
    ones_like full_like complex polar real imag view_as_real view_as_complex channel_shuffle pixel_shuffle
    pixel_unshuffle celu celu_ selu selu_ rrelu threshold adaptive_avg_pool1d adaptive_max_pool1d avg_pool1d
    max_pool1d max_pool2d max_pool3d constant_pad_nd dropout feature_dropout alpha_dropout
    feature_alpha_dropout batch_norm layer_norm group_norm instance_norm rms_norm bilinear embedding
    grid_sampler lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
"""
_FUNCTIONAL = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc linear bilinear embedding
    embedding_bag batch_norm layer_norm group_norm instance_norm local_response_norm rms_norm normalize
    cosine_similarity pairwise_distance pdist relu relu6 elu selu celu leaky_relu prelu rrelu gelu silu mish
    softplus softsign softshrink hardshrink tanhshrink threshold hardtanh hardswish hardsigmoid sigmoid tanh
    logsigmoid glu softmax log_softmax softmin avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
    max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_unpool1d
    max_unpool2d max_unpool3d lp_pool1d lp_pool2d lp_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices pad
    interpolate upsample grid_sample affine_grid pixel_shuffle pixel_unshuffle channel_shuffle fold unfold
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout scaled_dot_product_attention
    multi_head_attention_forward one_hot
"""
_LINALG = """
    norm vector_norm matrix_norm multi_dot vecdot cross inv pinv solve det matmul diagonal matrix_power
    matrix_exp
"""
_FFT = """
    fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 hfft2 ihfft2 fftn ifftn rfftn irfftn hfftn ihfftn
    fftshift ifftshift fftfreq rfftfreq
"""
_SPECIAL = """
    expit logit erf erfc erfinv exp2 expm1 log1p sinc softmax log_softmax logsumexp entr xlogy xlog1py ndtr
    i0e digamma gammaln
"""
_METHODS = f"""
    {_BOTH}
    size dim ndimension numel nelement view view_as reshape_as expand expand_as sum_to_size repeat contiguous
    unfold float double half bfloat16 int long short char byte bool to type_as new_zeros new_ones new_full
    new_tensor
"""
# These change what a tensor's sizes are, not what it holds.
_RESHAPING = ("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "detach_")
# These give a whole tensor other values; their pure form is ``set_item``.
ASSIGNING = ("copy_", "fill_", "zero_")


def set_item(input: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of ``input`` after ``copy[index] = value``: the pure form of an assignment.

    Args:
        input: any tensor.
        index: what may stand in brackets: numbers, slices, ``...``, None, tensors, or a tuple of them.
        value: a number, or a tensor that broadcasts to the shape of ``input[index]``.
    """
    changed = input.clone()
    changed[index] = value
    return changed


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
    **{f"torch.{name}_": getattr(torch, f"{name}_") for name in _TORCH.split() if hasattr(torch, f"{name}_")},
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"linalg.{name}": getattr(torch.linalg, name) for name in _LINALG.split()},
    **{f"special.{name}": getattr(torch.special, name) for name in _SPECIAL.split()},
    **{f"fft.{name}": getattr(torch.fft, name) for name in _FFT.split()},
    "modelopt.set_item": set_item,
    "getattr": getattr,
}

# Of a method that is on the list, the one that changes its tensor in place is, too.
METHODS: frozenset[str] = frozenset(
    name
    for method in _METHODS.split()
    for name in (method, f"{method}_")
    if name == method or (hasattr(torch.Tensor, name) and name not in _RESHAPING)
) | {*ASSIGNING}

# What getattr may fetch: facts about a tensor, views of it, and fields of max(), sort() and aminmax().
ATTRIBUTES: frozenset[str] = frozenset(
    {
        "shape",
        "ndim",
        "dtype",
        "device",
        "T",
        "mT",
        "H",
        "mH",
        "real",
        "imag",
        "values",
        "indices",
        "min",
        "max",
    }
)

_NAMES: dict[Callable[..., Any], str] = {}
for _name, _callable in FUNCTIONS.items():
    _NAMES.setdefault(_callable, _name)


def function_name(function: Callable[..., Any]) -> str | None:
    """The canonical name of a callable; None if it is not on the list."""
    if function in _NAMES:
        return _NAMES[function]
    name = getattr(function, "__name__", "")
    own = name in _TORCHVISION and _TORCHVISION[name] == getattr(function, "__module__", None)
    if own and _torchvision(name) is function:
        return f"torchvision.{name}"
    return None


def function_called(name: str) -> Callable[..., Any] | None:
    """The callable with this canonical name; None if there is none."""
    function = FUNCTIONS.get(name)
    if (
        function is None
        and name.removeprefix("torchvision.") in _TORCHVISION
        and name.startswith("torchvision.")
    ):
        return _torchvision(name.removeprefix("torchvision."))
    return function


@cache
def _torchvision(name: str) -> Callable[..., Any]:
    return getattr(import_module(_TORCHVISION[name]), name)  # type: ignore[no-any-return]


def is_in_place(node: fx.Node, layers: Mapping[str, nn.Module]) -> bool:
    """True if a call changes one of its arguments.

    Args:
        node: a node of a graph.
        layers: what its ``call_module`` nodes call, by path.
    """
    if node.op == "call_method":
        return str(node.target).endswith("_") or node.kwargs.get("out") is not None
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if (name.endswith("_") and name not in ("and_", "or_")) or name in IN_PLACE_OPERATORS:
            return True
        return bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    if node.op == "call_module":
        return bool(getattr(layers[str(node.target)], "inplace", False))
    return False
