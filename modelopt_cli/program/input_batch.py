"""A batch of a network's inputs, and all that is done to one.

It is a tensor where the network has one input, and else a dictionary by input name, in the network's order.
No other module tells the two apart.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.program.calls import forward_of
from modelopt_cli.program.input_spec import InputSpec, place_names

Inputs = Tensor | dict[str, Tensor]

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def make_inputs(input_spec: InputSpec, make: Callable[[InputSpec], Tensor]) -> Inputs:
    """A batch whose tensors ``make`` gives, from the description of each."""
    made = {each.name: make(each) for each in input_spec.tensors}
    return made if input_spec.others else made[input_spec.name]


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of a batch, in the network's order."""
    return tuple(inputs.values()) if isinstance(inputs, dict) else (inputs,)


def named(inputs: Inputs, input_spec: InputSpec) -> dict[str, Tensor]:
    """The tensors of a batch by the names that their description gives."""
    return inputs if isinstance(inputs, dict) else {input_spec.name: inputs}


def any_images(inputs: Inputs) -> bool:
    """True if a batch has a tensor ``(N, C, H, W)``."""
    return any(tensor.dim() == 4 for tensor in tensors_of(inputs))


def channels_last(inputs: Inputs) -> Inputs:
    """A batch whose images are laid out with the channels innermost."""
    return each_of(inputs, lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)


def each_of(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """A batch of what ``change`` makes of each tensor."""
    if isinstance(inputs, dict):
        return {name: change(tensor) for name, tensor in inputs.items()}
    return change(inputs)


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Run a network on a batch.

    Several inputs go by name, or by place where its ``forward`` knows no such names.
    """
    if not isinstance(inputs, dict):
        return model(inputs)
    if not isinstance(model, nn.Module):
        return model(*inputs.values())
    args, kwargs = as_arguments(type(model).forward, inputs)
    return model(*args, **kwargs)


def as_arguments(
    forward: Callable[..., Any], inputs: Any, *, bound: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments that hand a batch to a ``forward``.

    Args:
        forward: a network's, whose first parameter is the network itself.
        inputs: a tensor, or several of anything by name.
        bound: True if the network is no parameter any more.
    """
    if not isinstance(inputs, dict):
        return (inputs,), {}
    if takes_names(forward, inputs, bound=bound):
        return (), inputs
    return tuple(inputs.values()), {}


def parameters_of(forward: Callable[..., Any], *, bound: bool = False) -> list[inspect.Parameter]:
    """The parameters of a ``forward`` that are inputs; none where it is not written in Python."""
    try:
        parameters = list(forward_of(forward).parameters.values())
    except (TypeError, ValueError):
        return []
    return parameters if bound else parameters[1:]


def takes_names(forward: Callable[..., Any], names: Iterable[str], *, bound: bool = False) -> bool:
    """True if a ``forward`` takes all these inputs by name."""
    parameters = parameters_of(forward, bound=bound)
    known = {p.name for p in parameters if p.kind in _BY_NAME}
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
    return all(name in known or (any_name and name not in taken) for name in names)


def names_by_place(forward: Callable[..., Any], count: int) -> tuple[str, ...]:
    """Names of the first ``count`` inputs of a network's ``forward``; x, x1, x2 where it has none."""
    parameters = [p.name for p in parameters_of(forward) if p.kind in _BY_PLACE][:count]
    return (*parameters, *place_names(count)[len(parameters) :])


def sample_shapes(inputs: Inputs) -> str:
    """Shapes of one sample of a batch, for a message: ``shape (3, 8, 8)``, ``shapes (4,) and (7,)``."""
    shapes = [str(tuple(tensor.shape[1:])) for tensor in tensors_of(inputs)]
    return f"shape{'s' * (len(shapes) > 1)} {' and '.join(shapes)}"


def batch_size(inputs: Inputs) -> int:
    """Number of samples in a batch."""
    return len(tensors_of(inputs)[0])


def to(inputs: Inputs, device: str | torch.device) -> Inputs:
    """A batch on a device."""
    return each_of(inputs, lambda tensor: tensor.to(device))


def clone(inputs: Inputs) -> Inputs:
    """A copy that the network may change."""
    return each_of(inputs, torch.clone)


def select(inputs: Inputs, indices: Any) -> Inputs:
    """The samples at these positions: a slice, a mask, or a tensor or list of numbers."""
    return each_of(inputs, lambda tensor: tensor[indices])


def concatenate(batches: Sequence[Inputs]) -> Inputs:
    """One batch of the samples of several."""
    return _joined(batches, torch.cat)


def stack(samples: Sequence[Inputs]) -> Inputs:
    """A batch of single samples, none of which has a batch dimension."""
    return _joined(samples, torch.stack)


def _joined(parts: Sequence[Inputs], join: Callable[[list[Tensor]], Tensor]) -> Inputs:
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: join([part[name] for part in parts]) for name in first}  # type: ignore[index]
    return join(list(parts))  # type: ignore[arg-type]
