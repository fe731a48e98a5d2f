"""Coverage of a Program: the layers that are compressed, and the reasons why the others are not.

A layer counts as compressed if its weights take less space than they did: they are stored in fewer bits
(``int8``, ``affine8``), zeros among them were put there by pruning and stay (``sparse 90 %``: so many of
its weights are zero, counted here), inputs or outputs of it were removed (``pruned 40 %``: so many of its
weights are gone), or it was removed altogether (``removed``). What is gone cannot be seen in the Program
any more: that is taken from the history, several prunings multiplied. A layer can be several of these.

That is a file's coverage. A method's says what that method did: held against the Program that it was given, a
layer counts only if its weights take less space than they did in that one, for the same reasons, and what
earlier methods had done to it stands apart.

A layer that is called several times counts once. Layers count alike, whatever their size, so the share of the
weights' bytes stands next to their number: the bytes of all weight matrices in float32, before anything of
them was removed. Tied weights count once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from modelopt_cli.artifact.encodings import is_pruned, values_label
from modelopt_cli.measure.layer_status import Coverage, LayerStatus
from modelopt_cli.program.attention import split_names
from modelopt_cli.program.parted import parts_of_network
from modelopt_cli.program.program import Program
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent
from modelopt_cli.program.weighted import (
    WEIGHTED_KINDS,
    fetched_weights,
    further_calls,
    parts_of_layers,
    weight_label,
    weight_tensors,
)

_FLOAT_BYTES = 4
_FEWEST = 0.0005
"""Share of a weight's numbers from which on zeros are worth a word; a padding row among many is less."""
_INTEGER = (Weighted, QuantizedRecurrent)
_KINDS: tuple[type[nn.Module], ...] = (*_INTEGER, *WEIGHTED_KINDS)


@dataclass(frozen=True)
class _Past:
    """The history's record of layers: reasons for leaving them out, share left of each, and removals."""

    reasons: dict[str, str]
    shares: dict[str, float]
    removed: dict[str, int]

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]], told: int = 0) -> "_Past":
        """The record; reasons are not taken from the first ``told`` entries."""
        past = cls({}, {}, {})
        for number, entry in enumerate(history):
            past.reasons.update(entry.get("skipped", {}) if number >= told else {})
            for name, share in entry.get("left", {}).items():
                past.shares[name] = past.shares.get(name, 1.0) * share
            counts = entry.get("removed_weights", {})
            past.removed.update({name: counts.get(name, 0) for name in entry.get("removed", ())})
        return past


@dataclass(frozen=True)
class _Facts:
    """Space that the weights of a layer take, as a measure of how far it is compressed.

    Attributes:
        stored: how each parameter that is not stored plainly is, by its name in the layer.
        scheme: the integers that the layer computes with, or an empty string.
        share: the share of its weights that is left.
    """

    stored: Mapping[str, list[str]] = field(default_factory=dict)
    scheme: str = ""
    share: float = 1.0

    @classmethod
    def of(cls, program: Program, name: str, module: nn.Module, past: _Past) -> "_Facts":
        own_names = {**dict(module.named_parameters(recurse=False)), **weight_tensors(module)}
        stored = {own: _stored(program, f"{name}.{own}") for own in own_names}
        not_plain = {own: schemes for own, schemes in stored.items() if schemes}
        scheme = module.label if isinstance(module, _INTEGER) else ""
        return cls(not_plain, scheme, past.shares.get(name, 1.0))

    def __str__(self) -> str:
        schemes = [self.scheme, *dict.fromkeys(scheme for own in self.stored.values() for scheme in own)]
        pruned = f"pruned {_percent(1 - self.share)} %" if self.share < 1 else ""
        return ", ".join(filter(None, (*schemes, pruned)))

    def since(self, earlier: "_Facts") -> "_Facts":
        """The facts that were not so before."""
        stored = {own: now for own, now in self.stored.items() if {*now} - {*earlier.stored.get(own, ())}}
        share = self.share if self.share < earlier.share else 1.0
        return _Facts(stored, "" if self.scheme == earlier.scheme else self.scheme, share)


@dataclass(frozen=True)
class _Earlier:
    """Coverage before a method; nothing is compressed where that is not known."""

    program: Program | None
    layers: dict[str, _Facts]
    removed: frozenset[str]
    shares: Mapping[str, float]

    @classmethod
    def of(cls, program: Program | None, now: Program) -> "_Earlier":
        """The coverage of ``program``, its layers by the names that they have ``now``."""
        if program is None:
            return cls(None, {}, frozenset(), {})
        past = _Past.of(program.history)
        modules = ((name, m) for name, m in program.named_modules() if isinstance(m, _KINDS))
        layers = {name: _Facts.of(program, name, module, past) for name, module in modules}
        moved = split_names(program, now) | {name: name for name in fetched_weights(program)}
        for old, new in moved.items():
            layer, _, own = new.rpartition(".")
            layers.setdefault(layer, _Facts({own: _stored(program, old)}, share=past.shares.get(layer, 1.0)))
        return cls(program, layers, frozenset(past.removed), past.shares)

    def facts(self, name: str, now: _Facts, past: _Past) -> _Facts:
        """Status of a layer; one of another name, which its method left out, is as it was."""
        if self.program is not None and name not in self.layers and name in past.reasons:
            return now
        return self.layers.get(name, _Facts())


def _bytes(tensors: Iterable[torch.Tensor], counted: set[int], share: float = 1.0) -> int:
    """Bytes of tensors in float32 before pruning; those ``counted`` before take nothing."""
    fresh = {id(tensor): tensor.numel() for tensor in tensors if id(tensor) not in counted}
    counted.update(fresh)
    return round(_FLOAT_BYTES * sum(fresh.values()) / share) if share > 0 else 0


def _status(
    program: Program, name: str, module: nn.Module, past: _Past, earlier: _Earlier, counted: set[int]
) -> LayerStatus | None:
    if not isinstance(module, _KINDS):
        return None
    kind = type(module).__name__.removeprefix("Quantized").removeprefix("Dynamic")
    now = _Facts.of(program, name, module, past)
    then = earlier.facts(name, now, past)
    new, weights = now.since(then), weight_tensors(module)
    as_it_was = not new.scheme and new.share == 1
    untouched = [t for own, t in weights.items() if as_it_was and own not in new.stored]
    plain = _bytes(untouched, counted, now.share)
    size = plain + _bytes(weights.values(), counted, now.share)
    if str(new):
        return LayerStatus(name, kind, True, str(now), bytes=size, plain_bytes=plain, before=str(then))
    parent = name.rpartition(".")[0]  # of which this is a part: attention has a linear layer inside
    why = past.reasons.get(name) or past.reasons.get(parent, "not selected")
    return LayerStatus(name, kind, False, reason=why, bytes=size, before=str(then))


def _stored(program: Program, parameter: str) -> list[str]:
    """Names of the ways in which a parameter is stored, if not plainly."""
    encoding = program.encodings.get(parameter)
    schemes = list(filter(None, [values_label(encoding)]))
    if not is_pruned(encoding):
        return schemes
    path, _, leaf = parameter.rpartition(".")
    tensor = getattr(program.get_submodule(path), leaf)
    zeros = 1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel())
    return [*schemes, f"sparse {_percent(zeros)} %"] if zeros >= _FEWEST else schemes


def _percent(fraction: float) -> str:
    """Whole percents, or tenths where nearly nothing or nearly everything is gone."""
    return f"{100 * fraction:.0f}" if 0.01 <= fraction <= 0.99 else f"{100 * fraction:.1f}"


def _fetched(program: Program, past: _Past, earlier: _Earlier, counted: set[int]) -> list[LayerStatus]:
    """Statuses of the weights that no layer has."""
    statuses = []
    there = fetched_weights(earlier.program) if earlier.program is not None else {}
    for name, tensor in fetched_weights(program).items():
        label = weight_label(name)
        stored = _stored(earlier.program, name) if earlier.program is not None and name in there else []
        then = _Facts({name: stored}, share=earlier.shares.get(label, 1.0))
        now = _Facts({name: _stored(program, name)}, share=past.shares.get(label, 1.0))
        is_new = bool(str(now.since(then)))
        scheme = str(now) if is_new else ""
        why = "" if is_new else past.reasons.get(label, "used inside a function, not by a layer")
        size = _bytes([tensor], counted, now.share)
        statuses.append(LayerStatus(label, "fetched weight", is_new, scheme, why, size, before=str(then)))
    return statuses


def _outside_of_parts(program: Program, counted: set[int]) -> Iterator[LayerStatus]:
    """Statuses of the weights of a network that was captured in parts, and that belong to none."""
    parts = parts_of_network(program)
    for name in () if parts is None else parts.remaining:
        tensor = attrgetter(name)(program)
        if isinstance(tensor, nn.Parameter) and sum(side > 1 for side in tensor.shape) > 1:
            why, size = "outside of what was captured", _bytes([tensor], counted)
            yield LayerStatus(weight_label(name), "weight", False, reason=why, bytes=size)


def coverage(
    program: Program,
    history: Sequence[Mapping[str, Any]] | None = None,
    *,
    given: Program | None = None,
) -> Coverage:
    """The Program's weight-carrying layers: convolutions, linears, attention, embeddings.

    Weights that a function fetches without a layer of their own are listed after those, layers that
    pruning removed at the end. The reasons come from the history entries that list skipped layers.

    Args:
        program: as it is.
        history: instead of the Program's own.
        given: what a method made it of: only what that method compressed counts, and only its reasons.
    """
    told = 0 if given is None else len(given.history)
    past = _Past.of(program.history if history is None else history, told)
    earlier, counted = _Earlier.of(given, program), set[int]()
    left_out = {*further_calls(program), *parts_of_layers(program)}
    modules = ((name, module) for name, module in program.named_modules() if name not in left_out)
    statuses = (_status(program, name, module, past, earlier, counted) for name, module in modules)
    layers = [layer for layer in statuses if layer is not None]
    there = {layer.name for layer in layers} | earlier.removed
    gone = (
        LayerStatus(name, "removed", True, "removed", bytes=_FLOAT_BYTES * count)
        for name, count in past.removed.items()
        if name not in there
    )
    fetched = (layer for layer in _fetched(program, past, earlier, counted) if layer.name not in there)
    return Coverage((*layers, *fetched, *_outside_of_parts(program, counted), *gone))
