"""The leaf modules a Program may hold: name -> class and hyperparameters, as one literal table.

A leaf is described by its kind and the hyperparameters read back from the instance, and rebuilt from
them without its weights (on the meta device, so that a size in a file allocates nothing). Types and ranges
of the hyperparameters are those of ``program.fields``.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.fields import checked_config, parse_fields

_NORM = "num_features:size eps:level momentum:float? affine@weight track_running_stats:bool bias@bias"
_DROPOUT = "p:fraction inplace:bool"
_WINDOW = "kernel_size:counts2 dilation:counts2 padding:sizes2 stride:counts2"
_UPSAMPLE = (
    "size:counts? scale_factor:positives? mode:nearest|linear|bilinear|bicubic|trilinear|area|nearest-exact "
    "align_corners:bool? recompute_scale_factor:bool?"
)
_MHA = (
    "embed_dim:count num_heads:count dropout:fraction bias@in_proj_bias add_bias_kv@bias_k "
    "add_zero_attn:bool kdim:size vdim:size batch_first:bool"
)
_RNN = "input_size:count hidden_size:count num_layers:few bias:bool batch_first:bool dropout:fraction"
_RNN += " bidirectional:bool"
_RNN_CELL = "input_size:count hidden_size:count bias:bool"


def _by_rank(rank: int) -> dict[str, str]:
    """The kinds that there are for 1, 2 and 3 dimensions of space."""
    windows = f"kernel_size:counts{rank} stride:counts{rank} padding:sizes{rank}"
    conv = f"in_channels:size out_channels:size {windows} dilation:counts{rank} groups:count bias@bias "
    conv += "padding_mode:zeros|reflect|replicate|circular"
    average = f"{windows} ceil_mode:bool count_include_pad:bool"
    return {
        f"Conv{rank}d": conv.replace("padding:sizes", "padding:pad"),
        f"ConvTranspose{rank}d": f"{conv} output_padding:sizes{rank}",
        f"BatchNorm{rank}d": _NORM,
        f"InstanceNorm{rank}d": _NORM,
        f"MaxPool{rank}d": f"{windows} dilation:counts{rank} return_indices:bool ceil_mode:bool",
        f"AvgPool{rank}d": average if rank == 1 else f"{average} divisor_override:count?",
        f"LPPool{rank}d": f"norm_type:positive kernel_size:counts{rank} stride:counts{rank}? ceil_mode:bool",
        f"MaxUnpool{rank}d": windows,
        f"AdaptiveAvgPool{rank}d": f"output_size:targets{rank}",
        f"AdaptiveMaxPool{rank}d": f"output_size:targets{rank} return_indices:bool",
        **dict.fromkeys(
            [f"{name}Pad{rank}d" for name in ("Reflection", "Replication", "Zero", "Circular")],
            f"padding:ints{2 * rank}",
        ),
        f"ConstantPad{rank}d": f"padding:ints{2 * rank} value:float",
        f"Dropout{rank}d": _DROPOUT,
    }


# torch.nn: class name -> fields.
TORCH_KINDS: dict[str, str] = {
    **_by_rank(1),
    **_by_rank(2),
    **_by_rank(3),
    "Linear": "in_features:size out_features:size bias@bias",
    "Bilinear": "in1_features:size in2_features:size out_features:size bias@bias",
    "Embedding": "num_embeddings:size embedding_dim:size padding_idx:int? max_norm:float? norm_type:float "
    "scale_grad_by_freq:bool sparse:bool",
    "EmbeddingBag": "num_embeddings:size embedding_dim:size max_norm:float? norm_type:float "
    "scale_grad_by_freq:bool mode:sum|mean|max sparse:bool include_last_offset:bool padding_idx:int?",
    "MultiheadAttention": _MHA,
    "LSTM": f"{_RNN} proj_size:size",
    "GRU": _RNN,
    "RNN": f"{_RNN} nonlinearity:tanh|relu",
    **dict.fromkeys(("LSTMCell", "GRUCell"), _RNN_CELL),
    "RNNCell": f"{_RNN_CELL} nonlinearity:tanh|relu",
    "LayerNorm": "normalized_shape:sizes eps:level elementwise_affine@weight bias@bias",
    "RMSNorm": "normalized_shape:sizes eps:level? elementwise_affine@weight",
    "GroupNorm": "num_groups:count num_channels:size eps:level affine@weight bias@bias",
    "LocalResponseNorm": "size:count alpha:float beta:float k:float",
    **dict.fromkeys(("ReLU", "ReLU6", "SiLU", "Mish", "SELU", "Hardswish", "Hardsigmoid"), "inplace:bool"),
    **dict.fromkeys(("Sigmoid", "Tanh", "Tanhshrink", "Softsign", "LogSigmoid", "Softmax2d", "Identity"), ""),
    **dict.fromkeys(("ELU", "CELU"), "alpha:float inplace:bool"),
    "GELU": "approximate:none|tanh",
    "GLU": "dim:int",
    "Hardtanh": "min_val:float max_val:float inplace:bool",
    "LeakyReLU": "negative_slope:float inplace:bool",
    "PReLU": "num_parameters:count init:float",
    "RReLU": "lower:float upper:float inplace:bool",
    "Softplus": "beta:float threshold:float",
    "Threshold": "threshold:float value:float inplace:bool",
    **dict.fromkeys(("Hardshrink", "Softshrink"), "lambd:float"),
    **dict.fromkeys(("Softmax", "Softmin", "LogSoftmax"), "dim:int?"),
    **dict.fromkeys(("Dropout", "AlphaDropout", "FeatureAlphaDropout"), _DROPOUT),
    "Flatten": "start_dim:int end_dim:int",
    "Unflatten": "dim:int unflattened_size:ints",
    "Fold": f"output_size:counts2 {_WINDOW}",
    "Unfold": _WINDOW,
    "Upsample": _UPSAMPLE,
    **dict.fromkeys(
        ("UpsamplingNearest2d", "UpsamplingBilinear2d"), "size:counts2? scale_factor:positives2?"
    ),
    "PixelShuffle": "upscale_factor:count",
    "PixelUnshuffle": "downscale_factor:count",
    "ChannelShuffle": "groups:count",
}

# Classes of torchvision's that do nothing in inference but must come back for training.
OTHER_KINDS: dict[str, tuple[str, str]] = {
    "StochasticDepth": ("torchvision.ops.stochastic_depth", "p:fraction mode:batch|row"),
}

# Our own layers declare their fields, describe and rebuild themselves: config() and from_config().
QUANTIZED_MODULE = "modelopt_cli.program.quantized"
QUANTIZED_KINDS: dict[str, str] = {
    **dict.fromkeys(("QuantizedConv2d", "QuantizedLinear", "DynamicLinear"), QUANTIZED_MODULE),
    **dict.fromkeys(
        (
            "Quantize",
            "Dequantize",
            "QuantizedAdd",
            "QuantizedMul",
            "QuantizedMaxPool2d",
            "QuantizedAvgPool2d",
        ),
        f"{QUANTIZED_MODULE}_operations",
    ),
}


_FIELDS = {kind: parse_fields(text) for kind, text in TORCH_KINDS.items()}
_FIELDS |= {kind: parse_fields(text) for kind, (_, text) in OTHER_KINDS.items()}


@cache
def _class_of(kind: str) -> type[nn.Module] | None:
    """The class of a kind; None where this version of modelopt or its libraries has none."""
    if kind in TORCH_KINDS:
        found = getattr(nn, kind)
    elif kind in OTHER_KINDS:
        found = getattr(import_module(OTHER_KINDS[kind][0]), kind)
    elif kind in QUANTIZED_KINDS:
        found = getattr(import_module(QUANTIZED_KINDS[kind]), kind, None)
    else:
        return None
    return found  # type: ignore[no-any-return]


def kind_of(module: nn.Module) -> str | None:
    """The kind of a leaf module; None for everything else, subclasses of a listed class included."""
    cls = type(module)
    listed = cls.__name__ in _FIELDS or cls.__name__ in QUANTIZED_KINDS
    own = cls.__module__.startswith(("torch.nn.", "torchvision.ops.", QUANTIZED_MODULE))
    return cls.__name__ if listed and own and _class_of(cls.__name__) is cls else None


def config_of(module: nn.Module) -> dict[str, Any]:
    """The JSON-able hyperparameters of a leaf module, from which ``build`` makes its equal."""
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is not a leaf module")
    if kind in QUANTIZED_KINDS:
        return dict(module.config())  # type: ignore[operator]
    return {field.name: field.read(module) for field in _FIELDS[kind]}


def build(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A leaf module in eval mode on the meta device, its weights still to be assigned.

    Raises:
        ArtifactError: unknown kind, or hyperparameters that are missing, unknown or impossible.
    """
    cls = _class_of(kind)
    if cls is None:
        raise ArtifactError(f"unknown kind of layer {kind[:60]!r}", hint="a newer modelopt may know it")
    try:
        with torch.device("meta"):
            if kind in QUANTIZED_KINDS:
                built = cls.from_config(dict(config))  # type: ignore[attr-defined]
            else:
                built = cls(**checked_config(_FIELDS[kind], config))
    except Exception as error:  # whatever a constructor makes of impossible sizes
        reason = str(error).split("\n")[0][:200]
        raise ArtifactError(f"impossible hyperparameters for {kind}: {reason}") from error
    return built.eval()  # type: ignore[no-any-return]


def share(module: nn.Module) -> nn.Module:
    """A fresh leaf of the same kind, in eval mode, that shares the tensors of ``module`` and no hooks.

    Raises:
        ValueError: the module's tensors are not those of its kind, because of weight_norm or a pruning
            mask, say.
    """
    own = build(kind_of(module) or "", config_of(module))
    parts = dict(module.named_modules())
    for path, part in own.named_modules():
        source = parts[path]
        for mine, theirs in ((part._parameters, source._parameters), (part._buffers, source._buffers)):
            shapes = [{k: v.shape for k, v in d.items() if v is not None} for d in (mine, theirs)]
            if shapes[0] != shapes[1]:
                names = sorted(k for k in {*shapes[0], *shapes[1]} if shapes[0].get(k) != shapes[1].get(k))
                raise ValueError(f"{', '.join(names)} not as in a plain {kind_of(module)}")
        put_tensors(part, source._parameters, source._buffers)
    return own


def put_tensors(
    part: nn.Module, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor | None]
) -> None:
    """Give a module, but not what is inside it, these tensors for its own."""
    part._parameters.update(parameters)  # type: ignore[arg-type]
    part._buffers.update(buffers)
    if isinstance(part, nn.RNNBase):
        part._init_flat_weights()  # it computes with a list of them
