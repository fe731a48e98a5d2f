"""Weights that are computed at each call, as plain parameters: weight_norm, spectral_norm, pruning masks."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Compute such weights once, and let every layer that has them be the plain layer that it was made from.

    Args:
        model: in evaluation mode. Its classes are as they were afterwards; its attributes only within
            ``unchanged``.
    """
    classes = [(module, type(module)) for module in model.modules() if parametrize.is_parametrized(module)]
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _set_apart(module)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _COMPUTING):
                hook(module, ())
                name: str = getattr(hook, "_tensor_name", "") or hook.name  # type: ignore[union-attr]
                del module._forward_pre_hooks[key]
                _put(module, name, vars(module).pop(name))
    try:
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls


def _set_apart(module: nn.Module) -> None:
    """Undo what ``register_parametrization`` did to a module, but keep what it computes."""
    parametrized = module._modules.pop("parametrizations")
    assert isinstance(parametrized, nn.ModuleDict)
    computed = {name: each() for name, each in parametrized.items()}
    module.__class__ = type(module).__bases__[0]
    for name, tensor in computed.items():
        _put(module, name, tensor)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    module._parameters[name] = nn.Parameter(tensor.detach().clone())
    for suffix in ("_g", "_v", "_orig"):
        module._parameters.pop(f"{name}{suffix}", None)
    for suffix in ("_mask", "_u", "_v"):
        module._buffers.pop(f"{name}{suffix}", None)
