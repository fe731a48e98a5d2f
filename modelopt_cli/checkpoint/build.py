"""Weights into a network: all of them, or an error and no network."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.checkpoint.build_limits import build_within
from modelopt_cli.checkpoint.sources import SOURCES, parse_spec
from modelopt_cli.checkpoint.tensor_checks import check_finite, check_range
from modelopt_cli.checkpoint.tensor_names import Difference, Shape, compare, is_counter, shapes_of, spellings
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.settings import option
from modelopt_cli.text import first_line, listing, short


class SkipInit(torch.overrides.TorchFunctionMode):
    """Leaves parameters uninitialised while a network is built whose every parameter is then loaded.

    Drawing 138 million random numbers for VGG-16 takes two seconds, only to be overwritten.
    """

    _SKIPPED = frozenset(
        {
            torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_, torch.Tensor.clamp_,
            torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.fill_, torch.Tensor.zero_,
            torch.nn.init.kaiming_uniform_, torch.nn.init.kaiming_normal_, torch.nn.init.normal_,
            torch.nn.init.uniform_, torch.nn.init.constant_,
        }
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor untouched where a parameter would be filled."""
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if func in self._SKIPPED and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


def build_loaded(
    architecture: Architecture, state: Mapping[str, torch.Tensor], where: str
) -> tuple[nn.Module, list[str]]:
    """Build a network and load a file's weights into it.

    Every parameter and buffer comes from the file, converted to the network's float32; batch-norm's step
    counters may be absent. The network is in ``eval()`` mode.

    Args:
        architecture: what to build.
        state: the file's tensors.
        where: the file, for messages.

    Returns:
        The network, and one line for each thing done that the file's owner may want to know.

    Raises:
        ArchitectureError: names or shapes do not fit; nothing is loaded.
        CheckpointError: a weight is NaN or infinite.
    """
    if architecture.own:
        with SkipInit():
            module = architecture.build()
    elif architecture.bounded:
        module = build_within(architecture, state, where)
    else:
        module = architecture.build()
    module = module.float().eval()
    tied = list(_tied(module))
    adapted = _adapt(module, state, tied)
    if adapted is None and architecture.rename is not None:
        check_range(dict(state), where)
        renamed = architecture.rename(state)
        if isinstance(renamed, Difference):
            raise _misfit(architecture, renamed, where)
        adapted = renamed
    if adapted is None and not _load_by_hooks(module, state):
        raise _misfit(architecture, compare(*_closest(module, state)), where)
    notes = _dtype_notes(state)
    if adapted is not None:
        check_range(adapted, where)
        _load_exact(module, _complete(adapted, tied, where), where)
        unused = len(shapes_of(state)) - len(shapes_of(adapted))
        if unused > 0:
            notes.append(f"{unused} {'tensor' if unused == 1 else 'tensors'} outside the network left aside")
    check_finite(module.state_dict(), where, masks=True)
    return module, notes


def _adapt(
    module: nn.Module, state: Mapping[str, torch.Tensor], tied: list[list[str]]
) -> dict[str, torch.Tensor] | None:
    """The spelling of the file's names that fits the network, but for second names of tied weights.

    Buffers that the network makes itself and does not save, as older versions of a library did, are left out.
    """
    saved = module.state_dict()
    want = shapes_of(saved)
    made = {name: buffer for name, buffer in module.named_buffers() if name not in saved}
    for spelled in spellings(state):
        candidate = {
            name: tensor
            for name, tensor in spelled.items()
            if name not in made or not _same(tensor, made[name])
        }
        second = {name for group in tied if not candidate.keys().isdisjoint(group) for name in group}
        difference = compare(shapes_of(candidate), want)
        if not difference.unexpected and not difference.reshaped and second.issuperset(difference.missing):
            return candidate
    return None


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor.to(other), other)


def _tied(module: nn.Module) -> Iterator[list[str]]:
    """The names of each tensor that a network has under several, as an output layer and its embedding."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return (group for group in names.values() if len(group) > 1)


def _complete(state: dict[str, torch.Tensor], tied: list[list[str]], where: str) -> dict[str, torch.Tensor]:
    """A state dict with all names of tied weights, of which safetensors files have one."""
    for group in tied:
        names = [name for name in group if name in state]
        for name in names[1:]:
            if state[name] is not state[names[0]] and not torch.equal(state[name], state[names[0]]):
                both = f"'{short(names[0])}' and '{short(name)}'"
                raise ArchitectureError(
                    f"{both} differ in the file, but are one tensor in the network", where=where
                )
        if names:
            state = {**state, **dict.fromkeys(group, state[names[0]])}
    return state


def _load_exact(module: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load tensors whose names and shapes are known to fit."""
    own = module.state_dict()
    for name, tensor in state.items():
        if is_counter(name):  # averaging weights leaves these as floats
            continue
        if name in own and own[name].is_floating_point() != tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ArchitectureError(
                f"'{short(name)}' is {kind} in the file, a float in the network", where=where
            )
    # The network's own version metadata, for layers that rewrite names by version: they are new already.
    for name, tensor in own.items():
        source = state.get(name)
        if source is not None and source.shape == tensor.shape:
            own[name] = source
    try:
        module.load_state_dict(own, strict=True)
    except Exception as error:  # a user's own layer may check more
        raise ArchitectureError(
            f"the network refuses the weights: {first_line(error)}", where=where
        ) from error


def _load_by_hooks(module: nn.Module, state: Mapping[str, torch.Tensor]) -> bool:
    """Give the network's own loading hooks, which may rename, their chance."""
    try:
        module.load_state_dict(dict(state), strict=True)
    except Exception:  # hooks are the user's; the difference in names says more than their error
        return False
    return True


def _closest(
    module: nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, Shape], Mapping[str, Shape]]:
    want = shapes_of(module.state_dict())
    have = max(
        (shapes_of(candidate) for candidate in spellings(state)), key=lambda s: len(s.keys() & want.keys())
    )
    return have, want


def _misfit(architecture: Architecture, difference: Difference, where: str) -> ArchitectureError:
    if difference.reshaped and not difference.missing and not difference.unexpected:
        hint = _option_hint(architecture.spec, difference)
        return ArchitectureError(
            difference.first, where=where, hint=hint or f"the network is {short(architecture.spec)}"
        )
    parts = [
        f"{len(names)} {complaint} ({listing(list(names))})"
        for names, complaint in (
            (difference.missing, "missing"),
            (difference.unexpected, "unexpected"),
            (tuple(name for name, _have, _want in difference.reshaped), "of another shape"),
        )
        if names
    ]
    return ArchitectureError(
        f"the weights do not fit {short(architecture.spec)}: {', '.join(parts)}",
        where=where,
        hint=f"give the {option('arch')} they were trained with, or leave it out to have it recognised",
    )


def _option_hint(spec: str, difference: Difference) -> str | None:
    """``add ?num_classes=10`` where that alone explains every shape."""
    rows = {(have[:1], want[:1]) for _name, have, want in difference.reshaped if have[1:] == want[1:]}
    if len(rows) == 1 and all(have[1:] == want[1:] for _name, have, want in difference.reshaped):
        return _option(spec, f"num_classes={next(iter(rows))[0][0]}")
    _name, have, want = difference.reshaped[0]
    channels = SOURCES[parse_spec(spec).source].channels_option
    if channels and len(difference.reshaped) == 1 and len(have) == len(want) == 4:
        return _option(spec, f"{channels}={have[1]}")
    return None


def _option(spec: str, option: str) -> str:
    name = option.partition("=")[0]
    return f"write {option}" if f"{name}=" in spec else f"add {'&' if '?' in spec else '?'}{option}"


def _dtype_notes(state: Mapping[str, torch.Tensor]) -> list[str]:
    kinds = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()} - {
        "float32"
    }
    return [f"weights are {' and '.join(sorted(kinds))} in the file, float32 here"] if kinds else []
