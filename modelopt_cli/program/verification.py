"""Trying a network on random inputs, and a Program next to the network it was captured from."""

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.errors import CaptureError, a_or_an
from modelopt_cli.program.input_batch import Inputs, call, clone, each_of, named, tensors_of, to
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.output_structure import flatten, leaves, plain
from modelopt_cli.program.patches import unchanged
from modelopt_cli.program.program import Program
from modelopt_cli.program.samples import noise, tokens_of
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.text import first_line

VERIFIED_BATCHES = (1, 3)
_SEED = 20240229
_ROUNDING = 1e-5
"""Largest difference, relative to the largest output, that adding the same numbers in another order makes."""


def random_input(model: nn.Module, input_spec: InputSpec, batch: int) -> Inputs:
    """A random batch on the model's device, floats in its dtype; always the same for one batch size."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = noise(input_spec, batch, seed=_SEED + batch, below=tokens_of(model.modules()))
    return each_of(inputs, lambda x: x.to(first.device, first.dtype if x.is_floating_point() else x.dtype))


def require_runnable(model: nn.Module, batch: Inputs) -> None:
    """Refuse a batch that the network itself refuses.

    Args:
        model: is left as it was.
        batch: samples, on any device.

    Raises:
        CaptureError: names the shape, and the reason in the network's own words.
    """
    home = next(model.parameters(), tensors_of(batch)[0]).device
    with evaluation_mode(model), torch.no_grad(), unchanged(model):
        _expected(model, to(batch, home))


def require_random_runnable(model: nn.Module, input_spec: InputSpec) -> None:
    """Refuse an input that the network itself refuses; one on the meta device is not tried.

    Raises:
        CaptureError: as ``require_runnable``.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    _expected(model, named(random_input(model, input_spec, VERIFIED_BATCHES[-1]), input_spec))


def compare(program: Program, model: nn.Module, input_spec: InputSpec, *, exact: bool) -> None:
    """Run a Program and its network on random inputs at two batch sizes and demand equal outputs.

    Args:
        program: in evaluation mode.
        model: in evaluation mode.
        input_spec: what one sample looks like.
        exact: equal to the last bit on a CPU, rather than up to rounding.

    Raises:
        CaptureError: names the shapes on which they differ.
    """
    for batch in VERIFIED_BATCHES:
        inputs = named(random_input(model, input_spec, batch), input_spec)
        expected = _expected(model, inputs)
        try:
            with redirect_stderr(StringIO()):  # where fx prints the line that fails
                actual = call(program, clone(inputs))
        except Exception as error:
            raise CaptureError(
                f"what was captured fails on {_shapes(inputs)}: {first_line(error)}"
            ) from error
        if not same_outputs(actual, expected, exact):
            raise CaptureError(
                f"what was captured does not compute what the network does on {_shapes(inputs)}",
                hint="its forward pass depends on the batch size, on chance, or on state of its own",
            )


def agree_on(program: Program, model: nn.Module, input_spec: InputSpec, *, exact: bool) -> bool:
    """True if both take such inputs and give the same; arguments are those of ``compare``."""
    inputs = named(random_input(model, input_spec, 1), input_spec)
    try:
        with unchanged(model):
            expected = _expected(model, inputs)
        with redirect_stderr(StringIO()):
            return same_outputs(call(program, clone(inputs)), expected, exact)
    except Exception:  # whatever either raises: these are no inputs for them
        return False


def _expected(model: nn.Module, inputs: Inputs) -> Any:
    """The network's plain outputs."""
    try:
        return plain(call(model, clone(inputs)))
    except Exception as error:
        raise CaptureError(
            f"the network cannot process {_shapes(inputs)}: {first_line(error)}",
            hint="give the right input size",
        ) from error


def _shapes(inputs: Inputs) -> str:
    """An input of some shape, or several, for a message."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_of(inputs)]
    return f"inputs of shapes {' and '.join(shapes)}" if shapes[1:] else f"an input of shape {shapes[0]}"


def same_outputs(actual: Any, expected: Any, exact: bool) -> bool:
    """True if two outputs have one structure and the same numbers.

    Raises:
        CaptureError: what is expected holds something else than tensors and None.
    """
    for name, value in leaves(expected):
        if value is not None and not isinstance(value, Tensor):
            place = f" at {name!r}" if name else ""
            raise CaptureError(
                f"the network returns {a_or_an(type(value).__name__)}{place}, not a tensor",
                hint="wrap it in a module that returns tensors",
            )
    actual = plain(actual)
    if _form(actual) != _form(expected):
        return False
    tensors, references = flatten(actual), flatten(expected)
    return all(_same(tensors[name], references[name], exact) for name in references)


def _form(outputs: Any) -> Any:
    """The containers of plain outputs, with the type of what is in them."""
    if isinstance(outputs, dict):
        return {name: _form(value) for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return type(outputs), [_form(value) for value in outputs]
    return type(outputs) if outputs is None else Tensor


def _same(actual: Tensor, expected: Tensor, exact: bool) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if actual.device.type != "cpu":  # other devices may choose another algorithm for the same call
        return torch.allclose(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    if bool(((actual == expected) | (actual.isnan() & expected.isnan())).all()):
        return True
    if exact or not expected.is_floating_point():
        return False
    largest = float(expected.nan_to_num(posinf=0, neginf=0).abs().max())
    return torch.allclose(actual, expected, rtol=0, atol=_ROUNDING * largest, equal_nan=True)
