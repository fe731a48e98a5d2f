"""The leaf modules a Program may hold: name -> class and hyperparameters, as one literal table.

A leaf is described by its kind and the hyperparameters read back from the instance, and rebuilt from
them without its weights (on the meta device, so that a size in a file allocates nothing). Field types:

    size      int, 0 or more            int       any int
    float     finite or infinite        bool
    ints      an int or a flat list of them, None allowed inside (AdaptiveAvgPool2d)
    floats    a number or a flat list   pad       ints, or "same" / "valid"
    a|b|c     one of these strings

``?`` after a type allows None. ``name=attribute`` reads a field from another attribute than its own,
``name@parameter`` is true where that parameter exists.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.errors import ArtifactError

MAX_LIST = 8
MAX_INT = 2**40

_CONV = (
    "in_channels:size out_channels:size kernel_size:ints stride:ints padding:pad dilation:ints groups:size"
)
_CONV += " bias@bias padding_mode:zeros|reflect|replicate|circular"
_DECONV = _CONV.replace("padding:pad", "padding:ints output_padding:ints")
_NORM = "num_features:size eps:float momentum:float? affine@weight track_running_stats:bool bias@bias"
_MAX_POOL = "kernel_size:ints stride:ints padding:ints dilation:ints return_indices:bool ceil_mode:bool"
_AVG_POOL1D = "kernel_size:ints stride:ints padding:ints ceil_mode:bool count_include_pad:bool"
_AVG_POOL = f"{_AVG_POOL1D} divisor_override:int?"
_LP_POOL = "norm_type:float kernel_size:ints stride:ints? ceil_mode:bool"
_WINDOW = "kernel_size:ints dilation:ints padding:ints stride:ints"
_DROPOUT = "p:float inplace:bool"
_UPSAMPLE = (
    "size:ints? scale_factor:floats? mode:nearest|linear|bilinear|bicubic|trilinear|area|nearest-exact "
    "align_corners:bool? recompute_scale_factor:bool?"
)
_MHA = (
    "embed_dim:size num_heads:size dropout:float bias@in_proj_bias add_bias_kv@bias_k add_zero_attn:bool "
    "kdim:size vdim:size batch_first:bool"
)
_RNN = "input_size:size hidden_size:size num_layers:size bias:bool batch_first:bool dropout:float"
_RNN += " bidirectional:bool"
_RNN_CELL = "input_size:size hidden_size:size bias:bool"

# torch.nn: class name -> fields.
TORCH_KINDS: dict[str, str] = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _CONV),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), _DECONV),
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
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), _NORM),
    **dict.fromkeys(("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _NORM),
    "LayerNorm": "normalized_shape:ints eps:float elementwise_affine@weight bias@bias",
    "RMSNorm": "normalized_shape:ints eps:float? elementwise_affine@weight",
    "GroupNorm": "num_groups:size num_channels:size eps:float affine@weight bias@bias",
    "LocalResponseNorm": "size:size alpha:float beta:float k:float",
    **dict.fromkeys(("ReLU", "ReLU6", "SiLU", "Mish", "SELU", "Hardswish", "Hardsigmoid"), "inplace:bool"),
    **dict.fromkeys(("Sigmoid", "Tanh", "Tanhshrink", "Softsign", "LogSigmoid", "Softmax2d", "Identity"), ""),
    **dict.fromkeys(("ELU", "CELU"), "alpha:float inplace:bool"),
    "GELU": "approximate:none|tanh",
    "GLU": "dim:int",
    "Hardtanh": "min_val:float max_val:float inplace:bool",
    "LeakyReLU": "negative_slope:float inplace:bool",
    "PReLU": "num_parameters:size init:float",
    "RReLU": "lower:float upper:float inplace:bool",
    "Softplus": "beta:float threshold:float",
    "Threshold": "threshold:float value:float inplace:bool",
    **dict.fromkeys(("Hardshrink", "Softshrink"), "lambd:float"),
    **dict.fromkeys(("Softmax", "Softmin", "LogSoftmax"), "dim:int?"),
    **dict.fromkeys(("MaxPool1d", "MaxPool2d", "MaxPool3d"), _MAX_POOL),
    **dict.fromkeys(
        ("MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d"), "kernel_size:ints stride:ints padding:ints"
    ),
    "AvgPool1d": _AVG_POOL1D,
    **dict.fromkeys(("AvgPool2d", "AvgPool3d"), _AVG_POOL),
    **dict.fromkeys(("LPPool1d", "LPPool2d", "LPPool3d"), _LP_POOL),
    **dict.fromkeys(("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"), "output_size:ints"),
    **dict.fromkeys(
        ("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d"),
        "output_size:ints return_indices:bool",
    ),
    **dict.fromkeys(
        [f"{n}Pad{d}d" for n in ("Reflection", "Replication", "Zero") for d in (1, 2, 3)], "padding:ints"
    ),
    **dict.fromkeys([f"CircularPad{d}d" for d in (1, 2, 3)], "padding:ints"),
    **dict.fromkeys([f"ConstantPad{d}d" for d in (1, 2, 3)], "padding:ints value:float"),
    **dict.fromkeys(
        ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"), _DROPOUT
    ),
    "Flatten": "start_dim:int end_dim:int",
    "Unflatten": "dim:int unflattened_size:ints",
    "Fold": f"output_size:ints {_WINDOW}",
    "Unfold": _WINDOW,
    "Upsample": _UPSAMPLE,
    **dict.fromkeys(("UpsamplingNearest2d", "UpsamplingBilinear2d"), "size:ints? scale_factor:floats?"),
    "PixelShuffle": "upscale_factor:size",
    "PixelUnshuffle": "downscale_factor:size",
    "ChannelShuffle": "groups:size",
}

# Classes of torchvision's that do nothing in inference but must come back for training.
OTHER_KINDS: dict[str, tuple[str, str]] = {
    "StochasticDepth": ("torchvision.ops.stochastic_depth", "p:float mode:batch|row"),
}

# Our own layers describe and rebuild themselves: config() and from_config().
QUANTIZED_MODULE = "modelopt_cli.program.quantized"
QUANTIZED_KINDS: tuple[str, ...] = (
    "QuantizedConv2d",
    "QuantizedLinear",
    "DynamicLinear",
    "Quantize",
    "Dequantize",
    "QuantizedAdd",
    "QuantizedMul",
    "QuantizedMaxPool2d",
    "QuantizedAvgPool2d",
)


@dataclass(frozen=True)
class Field:
    """One hyperparameter: constructor name, where it is read from, and its type.

    ``presence`` fields are booleans read from whether the attribute is None.
    """

    name: str
    attribute: str
    type: str
    presence: bool = False

    def read(self, module: nn.Module) -> Any:
        """The JSON-able value this instance has."""
        value = getattr(module, self.attribute)
        if self.presence:
            return value is not None
        return list(value) if isinstance(value, tuple) else value

    def check(self, value: Any) -> Any:
        """The constructor argument for a value out of a file.

        Raises:
            ValueError: the value is not of this field's type.
        """
        if value is None:
            if not self.type.endswith("?"):
                raise ValueError(f"{self.name} is missing")
            return None
        base = self.type.removesuffix("?")
        accepts = _CHECKS.get(base)
        if not (accepts(value) if accepts else isinstance(value, str) and value in base.split("|")):
            raise ValueError(f"{self.name} must be {base}")
        return tuple(value) if isinstance(value, list) else value


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_INT


def _is_number(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and not math.isnan(value))


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_LIST and all(of(v) for v in value)


def _is_ints(value: Any) -> bool:
    return _is_int(value) or _is_list(value, lambda v: v is None or _is_int(v))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "size": lambda v: _is_int(v) and v >= 0,
    "int": _is_int,
    "float": _is_number,
    "bool": lambda v: type(v) is bool,
    "ints": _is_ints,
    "floats": lambda v: _is_number(v) or _is_list(v, _is_number),
    "pad": lambda v: v in ("same", "valid") if isinstance(v, str) else _is_ints(v),
}


def _parse(text: str) -> tuple[Field, ...]:
    fields = []
    for item in text.split():
        if "@" in item:
            name, attribute = item.split("@")
            fields.append(Field(name, attribute, "bool", presence=True))
        else:
            name, type_ = item.split(":")
            fields.append(Field(name, name, type_))
    return tuple(fields)


_FIELDS = {kind: _parse(text) for kind, text in TORCH_KINDS.items()}
_FIELDS |= {kind: _parse(text) for kind, (_, text) in OTHER_KINDS.items()}


@cache
def _class_of(kind: str) -> type[nn.Module] | None:
    """The class of a kind; None where this version of modelopt or its libraries has none."""
    if kind in TORCH_KINDS:
        found = getattr(nn, kind)
    elif kind in OTHER_KINDS:
        found = getattr(import_module(OTHER_KINDS[kind][0]), kind)
    elif kind in QUANTIZED_KINDS:
        found = getattr(import_module(QUANTIZED_MODULE), kind, None)
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
                built = cls.from_config(checked_json(dict(config)))  # type: ignore[attr-defined]
            else:
                built = cls(**_checked(_FIELDS[kind], config))
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


def _checked(fields: tuple[Field, ...], config: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields}
    if set(config) != names:
        raise ValueError(f"expected the fields {', '.join(sorted(names))}")
    return {field.name: field.check(config[field.name]) for field in fields}


def checked_json(value: Any, depth: int = 4) -> Any:
    """``value`` if it is JSON of bounded depth, list length and integers.

    Raises:
        ValueError: it is not.
    """
    if depth < 0:
        raise ValueError("nested too deep")
    if isinstance(value, dict):
        return {key: checked_json(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) > 4096:
            raise ValueError("list too long")
        return [checked_json(item, depth - 1) for item in value]
    if value is None or isinstance(value, str | bool) or _is_number(value):
        return value
    raise ValueError(f"a {type(value).__name__} that is out of range or not JSON")
