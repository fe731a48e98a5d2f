"""The leaf modules a Program may hold, as one literal table: a kind of layer is a row of ``KINDS``.

A leaf is described by its kind and the hyperparameters read back from the instance, and rebuilt from
them without its weights (on the meta device, so that a size in a file allocates nothing). Types and ranges
of the hyperparameters are those of ``program.fields``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.fields import Hyperparameter, checked_config, parse_fields
from modelopt_cli.text import first_line


@dataclass(frozen=True)
class Kind:
    """A kind of leaf layer; its name is that of its class.

    Attributes:
        fields: hyperparameters, as ``program.fields`` declares them; layers of ours declare their own.
        channels: rule of ``program.channels.layer_rules`` that says how it treats channels; without one, the
            channels that go through it stay.
        weighted: it holds weight matrices or kernels, which methods compress and reports count.
        idle: it returns its input in inference.
        module: where its class is.
        ours: a layer of ours, which describes and rebuilds itself: ``config()`` and ``from_config()``.
    """

    fields: str = ""
    channels: str | None = None
    weighted: bool = False
    idle: bool = False
    module: str = "torch.nn"
    ours: bool = False


_NORM = "num_features:size eps:level momentum:float? affine@weight track_running_stats:bool bias@bias"
_UPSAMPLE = (
    "size:counts? scale_factor:positives? mode:nearest|linear|bilinear|bicubic|trilinear|area|nearest-exact "
    "align_corners:bool? recompute_scale_factor:bool?"
)
_RNN = (
    "input_size:count hidden_size:count num_layers:few bias:bool batch_first:bool dropout:fraction "
    "bidirectional:bool"
)
_CELL = "input_size:count hidden_size:count bias:bool"
_WINDOW = "kernel_size:counts2 dilation:counts2 padding:sizes2 stride:counts2"
_DROPOUT = Kind("p:fraction inplace:bool", "same", idle=True)
_IN_PLACE = Kind("inplace:bool", "same")
_PLAIN = Kind("", "same")
_SCALED = Kind("size:counts2? scale_factor:positives2?", "spatial")


def _of_rank(rank: int) -> dict[str, Kind]:
    """The kinds that there are for 1, 2 and 3 dimensions of space."""
    windows = f"kernel_size:counts{rank} stride:counts{rank} padding:sizes{rank}"
    conv = f"in_channels:size out_channels:size {windows} dilation:counts{rank} groups:count bias@bias "
    conv += "padding_mode:zeros|reflect|replicate|circular"
    average = f"{windows} ceil_mode:bool count_include_pad:bool"
    most = f"{windows} dilation:counts{rank} return_indices:bool ceil_mode:bool"
    power = f"norm_type:positive kernel_size:counts{rank} stride:counts{rank}? ceil_mode:bool"
    pad = f"padding:ints{2 * rank}"
    return {
        f"Conv{rank}d": Kind(conv.replace("padding:sizes", "padding:pad"), "conv", weighted=True),
        f"ConvTranspose{rank}d": Kind(f"{conv} output_padding:sizes{rank}", "conv", weighted=True),
        f"BatchNorm{rank}d": Kind(_NORM, "channel_norm"),
        f"InstanceNorm{rank}d": Kind(_NORM, "channel_norm"),
        f"MaxPool{rank}d": Kind(most, "spatial"),
        f"AvgPool{rank}d": Kind(average if rank == 1 else f"{average} divisor_override:count?", "spatial"),
        f"LPPool{rank}d": Kind(power, "spatial"),
        f"MaxUnpool{rank}d": Kind(windows, "unpool"),
        f"AdaptiveAvgPool{rank}d": Kind(f"output_size:targets{rank}", "spatial"),
        f"AdaptiveMaxPool{rank}d": Kind(f"output_size:targets{rank} return_indices:bool", "spatial"),
        f"ReflectionPad{rank}d": Kind(pad, "spatial"),
        f"ReplicationPad{rank}d": Kind(pad, "spatial"),
        f"ZeroPad{rank}d": Kind(pad, "spatial"),
        f"CircularPad{rank}d": Kind(pad, "spatial"),
        f"ConstantPad{rank}d": Kind(f"{pad} value:float", "spatial"),
        f"Dropout{rank}d": _DROPOUT,
    }


KINDS: dict[str, Kind] = {
    **_of_rank(1),
    **_of_rank(2),
    **_of_rank(3),
    "Linear": Kind("in_features:size out_features:size bias@bias", "linear", weighted=True),
    "Bilinear": Kind("in1_features:size in2_features:size out_features:size bias@bias", weighted=True),
    "Embedding": Kind(
        "num_embeddings:size embedding_dim:size padding_idx:int? max_norm:float? norm_type:float "
        "scale_grad_by_freq:bool sparse:bool",
        "embedding",
        weighted=True,
    ),
    "EmbeddingBag": Kind(
        "num_embeddings:size embedding_dim:size max_norm:float? norm_type:float scale_grad_by_freq:bool "
        "mode:sum|mean|max sparse:bool include_last_offset:bool padding_idx:int?",
        weighted=True,
    ),
    "MultiheadAttention": Kind(
        "embed_dim:count num_heads:count dropout:fraction bias@in_proj_bias add_bias_kv@bias_k "
        "add_zero_attn:bool kdim:size vdim:size batch_first:bool",
        weighted=True,
    ),
    "LSTM": Kind(f"{_RNN} proj_size:size", "recurrent", weighted=True),
    "GRU": Kind(_RNN, "recurrent", weighted=True),
    "RNN": Kind(f"{_RNN} nonlinearity:tanh|relu", "recurrent", weighted=True),
    "LSTMCell": Kind(_CELL, "cell", weighted=True),
    "GRUCell": Kind(_CELL, "cell", weighted=True),
    "RNNCell": Kind(f"{_CELL} nonlinearity:tanh|relu", "cell", weighted=True),
    "LayerNorm": Kind(
        "normalized_shape:sizes eps:level elementwise_affine@weight bias@bias", "last_dims_norm"
    ),
    "RMSNorm": Kind("normalized_shape:sizes eps:level? elementwise_affine@weight", "last_dims_norm"),
    "GroupNorm": Kind("num_groups:count num_channels:size eps:level affine@weight bias@bias", "group_norm"),
    "LocalResponseNorm": Kind("size:count alpha:float beta:float k:float", "response_norm"),
    "ReLU": _IN_PLACE,
    "ReLU6": _IN_PLACE,
    "SiLU": _IN_PLACE,
    "Mish": _IN_PLACE,
    "SELU": _IN_PLACE,
    "Hardswish": _IN_PLACE,
    "Hardsigmoid": _IN_PLACE,
    "Sigmoid": _PLAIN,
    "Tanh": _PLAIN,
    "Tanhshrink": _PLAIN,
    "Softsign": _PLAIN,
    "LogSigmoid": _PLAIN,
    "Softmax2d": Kind("", "softmax_2d"),
    "Identity": Kind("", "same", idle=True),
    "ELU": Kind("alpha:float inplace:bool", "same"),
    "CELU": Kind("alpha:float inplace:bool", "same"),
    "GELU": Kind("approximate:none|tanh", "same"),
    "GLU": Kind("dim:int", "glu"),
    "Hardtanh": Kind("min_val:float max_val:float inplace:bool", "same"),
    "LeakyReLU": Kind("negative_slope:float inplace:bool", "same"),
    "PReLU": Kind("num_parameters:count init:float", "prelu"),
    "RReLU": Kind("lower:float upper:float inplace:bool", "same"),
    "Softplus": Kind("beta:float threshold:float", "same"),
    "Threshold": Kind("threshold:float value:float inplace:bool", "same"),
    "Hardshrink": Kind("lambd:float", "same"),
    "Softshrink": Kind("lambd:float", "same"),
    "Softmax": Kind("dim:int?", "softmax"),
    "Softmin": Kind("dim:int?", "softmax"),
    "LogSoftmax": Kind("dim:int?", "softmax"),
    "Dropout": _DROPOUT,
    "AlphaDropout": _DROPOUT,
    "FeatureAlphaDropout": _DROPOUT,
    "Flatten": Kind("start_dim:int end_dim:int", "reshape"),
    "Unflatten": Kind("dim:int unflattened_size:ints", "reshape"),
    "Fold": Kind(f"output_size:counts2 {_WINDOW}", "fold"),
    "Unfold": Kind(_WINDOW, "unfold"),
    "Upsample": Kind(_UPSAMPLE, "spatial"),
    "UpsamplingNearest2d": _SCALED,
    "UpsamplingBilinear2d": _SCALED,
    "PixelShuffle": Kind("upscale_factor:count", "pixel_shuffle"),
    "PixelUnshuffle": Kind("downscale_factor:count", "pixel_unshuffle"),
    "ChannelShuffle": Kind("groups:count", "channel_shuffle"),
    "StochasticDepth": Kind(
        "p:fraction mode:batch|row", "same", idle=True, module="torchvision.ops.stochastic_depth"
    ),
    **dict.fromkeys(
        ("QuantizedLinear", "DynamicLinear"),
        Kind(module="modelopt_cli.program.quantized_linear", ours=True),
    ),
    "QuantizedEmbedding": Kind(module="modelopt_cli.program.quantized_embedding", ours=True),
    **dict.fromkeys(
        ("QuantizedGRU", "QuantizedLSTM", "QuantizedGRUCell", "QuantizedLSTMCell"),
        Kind(module="modelopt_cli.program.quantized_recurrent", ours=True),
    ),
    **dict.fromkeys(
        (
            "QuantizedConv1d",
            "QuantizedConv2d",
            "QuantizedConv3d",
            "QuantizedConvTranspose1d",
            "QuantizedConvTranspose2d",
        ),
        Kind(module="modelopt_cli.program.quantized_convolutions", ours=True),
    ),
    **dict.fromkeys(
        (
            "Quantize",
            "Dequantize",
            "QuantizedAdd",
            "QuantizedMul",
            "QuantizedMaxPool1d",
            "QuantizedMaxPool2d",
            "QuantizedMaxPool3d",
            "QuantizedAvgPool1d",
            "QuantizedAvgPool2d",
            "QuantizedAvgPool3d",
        ),
        Kind(module="modelopt_cli.program.quantized_operations", ours=True),
    ),
}
"""Name of a kind to its row."""


@cache
def class_of(kind: str) -> type[nn.Module]:
    """The class of a kind."""
    return getattr(import_module(KINDS[kind].module), kind)  # type: ignore[no-any-return]


@cache
def fields_of(kind: str) -> tuple[Hyperparameter, ...]:
    """The hyperparameters of a kind that is not ours."""
    return parse_fields(KINDS[kind].fields)


def kind_of(module: nn.Module) -> str | None:
    """The kind of a leaf module; None for everything else, subclasses of a listed class included."""
    cls = type(module)
    row = KINDS.get(cls.__name__)
    if row is None or not cls.__module__.startswith(row.module):  # before torchvision is imported for it
        return None
    return cls.__name__ if class_of(cls.__name__) is cls else None


def row_of(module: nn.Module) -> Kind:
    """The row of a leaf module's kind; an empty one for what is none."""
    return KINDS.get(kind_of(module) or "", Kind())


def config_of(module: nn.Module) -> dict[str, Any]:
    """The JSON-able hyperparameters of a leaf module, from which ``build`` makes its equal.

    Raises:
        TypeError: it is no leaf module.
    """
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is not a leaf module")
    if KINDS[kind].ours:
        return dict(module.config())  # type: ignore[operator]
    return {field.name: field.read(module) for field in fields_of(kind)}


def build(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A leaf module in eval mode on the meta device, its weights still to be assigned.

    Raises:
        ArtifactError: unknown kind, or hyperparameters that are missing, unknown or impossible.
    """
    if kind not in KINDS:
        raise ArtifactError(f"unknown kind of layer {kind[:60]!r}", hint="a newer modelopt may know it")
    try:
        with torch.device("meta"):
            if KINDS[kind].ours:
                built = class_of(kind).from_config(dict(config))  # type: ignore[attr-defined]
            else:
                built = class_of(kind)(**checked_config(fields_of(kind), config))
    except Exception as error:  # whatever a constructor makes of impossible sizes
        problem = f"impossible hyperparameters for {kind}: {first_line(error)}"
        raise ArtifactError(problem) from error
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
