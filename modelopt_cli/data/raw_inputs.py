"""Raw inputs: the tensors of a sample as its source has them, and as the network takes them.

A source hands over one tensor; or several, by place in a tuple or by name in a dictionary. Of a dictionary
the network takes what it knows by name, so that there may be more in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.errors import DataError
from modelopt_cli.program.input_batch import Inputs
from modelopt_cli.program.input_spec import INPUT_NAME, INPUT_TYPE, InputSpec, InputType, place_names
from modelopt_cli.program.samples import DTYPES
from modelopt_cli.settings import did_you_mean, option

RawInputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

INPUT_KEYS = ("pixel_values", "images", "image", "inputs", "input", "x", "input_ids")
"""Names of a single input in samples that are mappings; the first that is there counts."""
LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Names of the target in samples and batches that are mappings; the first that is there counts."""

_WHOLE = (torch.int32, torch.int64)
"""Types of indices, such as tokens. Bytes would be an image that is not scaled."""


def label_of(item: Mapping[str, Any]) -> str | None:
    """The key of the target in a sample or batch that is a mapping; None where it has none."""
    return next((key for key in LABEL_KEYS if key in item), None)


def without_label(item: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """The inputs in a sample or batch that is a mapping: what is an array and not the target."""
    arrays = {
        str(name): value
        for name, value in item.items()
        if name != label and isinstance(value, Tensor | np.ndarray | np.generic)
    }
    if not arrays:
        raise DataError("is a mapping without tensors", hint="give inputs by name, and labels")
    return arrays


def several(value: Any) -> bool:
    """True of inputs by place or by name."""
    if isinstance(value, Mapping):
        return bool(value)
    numbers = Tensor | np.ndarray | np.generic | int | float
    if not isinstance(value, tuple | list) or not all(isinstance(each, numbers) for each in value):
        return False
    return any(isinstance(each, Tensor | np.ndarray) for each in value)


def read_inputs(value: Any, where: str) -> RawInputs:
    """Inputs of a sample on the CPU: floats in float32, integers in int64, masks as they are.

    Args:
        value: a tensor, or arrays and numbers in a tuple, a list or a mapping.
        where: the sample, for messages.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, Mapping):
        return {str(name): _read(_tensor(part, where), where, mask=True) for name, part in value.items()}
    if several(value):
        return tuple(_read(_tensor(part, where), where, mask=True) for part in value)
    return _read(value, where)


def _tensor(value: Any, where: str) -> Any:
    """An array or a number as a tensor; anything else as it is."""
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        try:
            return torch.as_tensor(value)
        except TypeError as error:
            raise DataError(f"holds an array that is no tensor: {error}", where=where) from None
    return value


def _read(value: Any, where: str, *, mask: bool = False) -> Tensor:
    kinds = (*_WHOLE, torch.bool) if mask else _WHOLE
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype in kinds):
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"is {kind}, not a float tensor", where=where, hint="return it already preprocessed")
    if value.is_meta or value.layout != torch.strided:
        kind = "on the meta device, without values" if value.is_meta else f"of layout {value.layout}"
        raise DataError(f"is {kind}", where=where, hint="give dense tensors with values")
    if value.dtype == torch.bool:
        return value.detach().cpu()
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else torch.int64)


def describe_inputs(raw: RawInputs) -> InputSpec:
    """Names, shapes and element types of the inputs of a sample."""
    if isinstance(raw, Tensor):
        return _described(raw, INPUT_NAME)
    named = raw if isinstance(raw, dict) else dict(zip(place_names(len(raw)), raw, strict=True))
    first, *others = (_described(tensor, name) for name, tensor in named.items())
    return replace(first, others=tuple(others))


def _described(tensor: Tensor, name: str) -> InputSpec:
    own = str(tensor.dtype).removeprefix("torch.")
    dtype = cast(InputType, own if own in DTYPES else INPUT_TYPE)
    return InputSpec(tuple(tensor.shape), dtype=dtype, name=name)


def arranged(raw: RawInputs, spec: InputSpec) -> Inputs:
    """The inputs of a sample as the network takes them.

    Raises:
        DataError: there are too few or too many, or one has not the name it should have.
    """
    wanted = [each.name for each in spec.tensors]
    inputs = _by_name(raw, wanted)
    return inputs if len(wanted) > 1 else inputs[wanted[0]]


def _by_name(raw: RawInputs, wanted: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(raw, dict):
        if all(name in raw for name in wanted):
            return {name: raw[name] for name in wanted}
        if len(wanted) > 1 and (len(raw) != len(wanted) or tuple(wanted) != place_names(len(wanted))):
            raise _missing(raw, wanted)
        raw = _sole(raw) if len(wanted) == 1 else tuple(raw.values())
    tensors = (raw,) if isinstance(raw, Tensor) else raw
    if len(tensors) != len(wanted):
        counts = [f"{len(each)} input{'s' * (len(each) != 1)}" for each in (tensors, wanted)]
        raise DataError(f"has {counts[0]}, where the network takes {counts[1]}: {', '.join(wanted)}")
    return dict(zip(wanted, tensors, strict=True))


def _sole(raw: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The one input that a mapping has, or the one with a usual name."""
    usual = next((key for key in INPUT_KEYS if key in raw), None)
    return (raw[usual],) if usual is not None else tuple(raw.values())


def _missing(raw: Mapping[str, Tensor], wanted: Sequence[str]) -> DataError:
    missing = next((name for name in wanted if name not in raw), wanted[0])
    hint = did_you_mean(missing, raw) or f"it has {', '.join(raw)}"
    return DataError(f"has no input {missing!r}", hint=hint)


def require_finite(tensor: Tensor, prefix: str = "") -> None:
    """Raise DataError where a part of a sample, named by a word and a space, holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{prefix}holds NaN or infinity", hint="clean the data")


def check_input(tensor: Tensor, spec: InputSpec, *, ready: bool, tokenized: bool = False) -> Tensor:
    """One input of a sample in the type that the network takes.

    Args:
        tensor: as it was read.
        spec: what it should be.
        ready: True if it comes so from its source, False if it was made of an image.
        tokenized: True if a tokenizer made it of a text.

    Raises:
        DataError: it is of another shape or type, or not finite.
    """
    of = f"input {spec.name} " if spec.name != INPUT_NAME else ""
    if not spec.fits(tuple(tensor.shape)):
        got, want = ("x".join(map(str, s)) or "a scalar" for s in (tensor.shape, spec.shape))
        hint = (
            f"say with {option('input_shape')} what the network takes"
            if ready
            else f"set {option('input_size')}, or {option('resize')} and {option('crop')}"
        )
        raise DataError(f"{of}is {got}, where {want} is expected", hint=hint)
    if ready:
        require_finite(tensor, of)
    dtype = DTYPES[spec.dtype]
    if tensor.dtype.is_floating_point > dtype.is_floating_point:
        raise DataError(f"{of}holds fractions, where {spec.dtype} is expected", hint="give integers")
    if spec.below is not None and tensor.numel():
        least, most = map(int, tensor.aminmax())
        if least < 0 or most >= spec.below:
            index = least if least < 0 else most
            rows = f"the {spec.below} rows of the network's embedding, 0 to {spec.below - 1}"
            hint = "give " + ("the tokenizer" if tokenized else "indices") + " that it was trained with"
            raise DataError(f"{of}holds index {index}, outside {rows}", hint=hint)
    return tensor.to(dtype)
