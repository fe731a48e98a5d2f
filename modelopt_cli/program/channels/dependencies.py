"""Groups of channels that can be removed, and layers that cannot lose any."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelopt_cli.program.attention import split_attention
from modelopt_cli.program.attention_functions import split_attention_functions
from modelopt_cli.program.channels.labelling import run
from modelopt_cli.program.channels.trace import MAKES, Slot, Trace
from modelopt_cli.program.constant_layers import constant_layers
from modelopt_cli.program.program import Program
from modelopt_cli.program.windows import split_windows

ROLES = (MAKES, "in", "bias", "norm", "statistic", "tensor")


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer, as far as a group's channels are in it.

    Attributes:
        parameter: full name, e.g. ``layer1.0.conv1.weight``.
        dim: the dimension that shrinks.
        role: ``out`` weights that make the channel, ``in`` weights that read it, ``bias`` of a layer or
            norm, ``norm`` scale, ``statistic`` running mean or variance, ``tensor`` fetched by the graph
            itself (position embedding, class token, layer scale).
        positions: along ``dim``, ``(n,)`` int64, ordered by unit.
        units: the unit that each position belongs to, ``(n,)`` int64.
        gates: positions that each channel has: one for each gate of a recurrent layer.
    """

    parameter: str
    dim: int
    role: str
    positions: Tensor
    units: Tensor
    gates: int = 1

    @property
    def makes_channels(self) -> bool:
        """True of weights whose outputs the channels are."""
        return self.role == MAKES

    @property
    def index(self) -> tuple[Tensor, ...]:
        """The positions of each unit up to the last one that has any."""
        parts: tuple[Tensor, ...] = self.positions.split(torch.bincount(self.units).tolist())
        return parts


@dataclass(frozen=True)
class Group:
    """Channels of several layers that can only go together.

    Attributes:
        name: the first layer that makes them (``#2`` and so on where it makes those of several groups).
        units: how many can be chosen from; a unit is a channel with all it is coupled to, or a head.
        layers: all layers with a member, in the order of the graph.
        members: what shrinks when a unit goes.
        step: kept units have to be a multiple of this.
    """

    name: str
    units: int
    layers: tuple[str, ...]
    members: tuple[Member, ...]
    step: int = 1


@dataclass(frozen=True)
class Dependencies:
    """Channels that can be removed from a Program, and layers that cannot lose any.

    Attributes:
        groups: in the order of the graph.
        frozen: layer to the reason why none of its output channels can be removed.
        program: the Program the names refer to: attention modules are taken apart in it.
    """

    groups: tuple[Group, ...]
    frozen: dict[str, str]
    program: Program
    trace: Trace = field(repr=False)
    classes: dict[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)


def layered(program: Program) -> Program:
    """The Program with its attention taken apart, and products with constants as layers; itself without any.

    ``analyse`` and ``remove`` do this, too: call it first where parameter names have to be those that
    groups refer to. Doing it twice changes nothing more.
    """
    return split_windows(split_attention(constant_layers(split_attention_functions(program))))


def analyse(program: Program) -> Dependencies:
    """Find the channels of a Program that depend on one another.

    Every output channel gets a number, the graph is run on those numbers, and operations tie them: an
    addition ties what it adds, a grouped convolution the same places of its groups, attention a head's
    channels. Channels tied to one another are a unit; units made by the same layers are a group
    (cf. Fang et al., "DepGraph", CVPR 2023). Needs shapes only: weights may be on the meta device.

    Whatever units are kept, at least one of each group, no layer is left without channels.

    Args:
        program: any Program; it is not changed.
    """
    program = layered(program)
    trace = run(program)
    reasons = _reasons(trace, trace.ties.frozen)
    needed = _reasons(trace, trace.sole)
    needed |= _spared(trace, _bundles(trace, {*reasons, *needed}))
    bundles = _bundles(trace, {*reasons, *needed})
    owner, local = _places(trace, bundles)
    groups = [
        Group(bundle.name, len(bundle.roots), _layers(members), tuple(members))
        for bundle, members in zip(bundles, _members(trace, owner, local, len(bundles)), strict=True)
    ]
    classes = {bundle.name: bundle.roots for bundle in bundles}
    frozen = _frozen_layers(trace, owner, reasons, needed)
    return Dependencies(tuple(groups), frozen, program, trace, classes)


@dataclass(frozen=True)
class _Bundle:
    """The classes that the same slots make; ``roots`` stand for them, ``(units,)``."""

    name: str
    roots: Tensor


def _bundles(trace: Trace, fixed: Container[int]) -> list[_Bundle]:
    """Classes that can be removed, by what makes them, where there are several to choose from."""
    by_makers: dict[tuple[int, ...], list[int]] = {}
    for root, makers in _outputs_by_class(trace).items():
        if root not in fixed:
            by_makers.setdefault(tuple(makers), []).append(root)
    bundles = []
    names: dict[str, int] = {}
    for made_by, roots in sorted((m, r) for m, r in by_makers.items() if len(r) > 1):
        first = layer_of(trace.slots[made_by[0]].tensor)
        names[first] = names.get(first, 0) + 1
        bundles.append(
            _Bundle(first if names[first] == 1 else f"{first}#{names[first]}", torch.tensor(roots))
        )
    return bundles


def _places(trace: Trace, bundles: Sequence[_Bundle]) -> tuple[Tensor, Tensor]:
    """Bundle of each atom that stands for a class, or -1, and its place there."""
    owner = torch.full((max(1, len(trace.ties)),), -1)  # also of a network without layers
    local = torch.zeros_like(owner)
    for number, bundle in enumerate(bundles):
        owner[bundle.roots], local[bundle.roots] = number, torch.arange(len(bundle.roots))
    return owner, local


def _spared(trace: Trace, bundles: Sequence[_Bundle]) -> dict[int, str]:
    """Classes that have to stay so that no layer can end up without any channel.

    A layer that reads all of some group, or anything that stays anyway, is safe, since every group
    keeps a unit. One that reads parts of groups only, as after a channel shuffle, has one class spared.
    """
    owner, _ = _places(trace, bundles)
    sizes = torch.tensor([len(bundle.roots) for bundle in bundles])
    spared: dict[int, str] = {}
    for slot in trace.slots:
        roots = trace.ties.find(slot.line).unique()
        owners = owner[roots.clamp(min=0)]
        if bool((roots < 0).any()) or bool((owners < 0).any()):
            continue
        if bool((owners.bincount(minlength=len(sizes))[owners] == sizes[owners]).any()):
            continue
        spared[int(roots[0])] = f"is all that {layer_of(slot.tensor)} can count on"
        owner[roots[0]] = -1
        sizes[owners[0]] -= 1
    return spared


def _layers(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer_of(member.parameter) for member in members))


def layer_of(tensor: str) -> str:
    """The layer a tensor belongs to; a tensor of no layer stands for itself."""
    return tensor.rpartition(".")[0] or tensor


def _reasons(trace: Trace, marks: Iterable[tuple[Tensor, str]]) -> dict[int, str]:
    """The first reason given for each class."""
    reasons: dict[int, str] = {}
    for atoms, why in marks:
        for root in trace.ties.find(atoms).unique().tolist():
            reasons.setdefault(root, why)
    return reasons


def _outputs_by_class(trace: Trace) -> dict[int, list[int]]:
    """Slots that make each class, in the order of the graph; one slot for each dimension."""
    first: dict[tuple[str, int], int] = {}
    makers: dict[int, list[int]] = {}
    for number, slot in enumerate(trace.slots):
        if not slot.makes_channels or first.setdefault((slot.tensor, slot.dim), number) != number:
            continue
        roots = trace.ties.find(slot.line)
        for root in dict.fromkeys(roots[roots >= 0].tolist()):
            makers.setdefault(root, []).append(number)
    return makers


def _members(trace: Trace, owner: Tensor, local: Tensor, count: int) -> list[list[Member]]:
    """The members of each group, in the order of the graph."""
    members: list[list[Member]] = [[] for _ in range(count)]
    for slot in _once(trace.slots):
        roots = trace.ties.find(slot.line)
        group_of = torch.where(roots >= 0, owner[roots.clamp(min=0)], -1)
        for number in group_of.unique().tolist():
            if number < 0:
                continue
            positions = (group_of == number).nonzero().flatten()
            units = local[roots[positions]]
            order = units.argsort(stable=True)
            places = (positions[order], units[order])
            members[number].append(Member(slot.tensor, slot.dim, slot.role, *places, slot.gates))
    return members


def _once(slots: Iterable[Slot]) -> list[Slot]:
    """One slot for each dimension of a tensor; the roles of tied tensors are those of the first."""
    unique: dict[tuple[str, int], Slot] = {}
    for slot in slots:
        unique.setdefault((slot.tensor, slot.dim), slot)
    return list(unique.values())


def _frozen_layers(
    trace: Trace, owner: Tensor, reasons: dict[int, str], needed: dict[int, str]
) -> dict[str, str]:
    """The layers of which no output channel is in a group, and why."""
    notes = _reasons(trace, trace.ties.notes)
    frozen: dict[str, str] = {}
    prunable: set[str] = set()
    for slot in trace.slots:
        if not slot.makes_channels:
            continue
        layer, roots = layer_of(slot.tensor), trace.ties.find(slot.line)
        if bool((owner[roots] >= 0).any()):
            prunable.add(layer)
            continue
        own_roots = roots.unique().tolist()
        alone = "has one output channel" if len(roots) == 1 else "its channels can only stay or go together"
        known = [table[root] for table in (reasons, notes) for root in own_roots if root in table]
        if not known and len(own_roots) > 1:
            known = [needed[root] for root in own_roots if root in needed]
        frozen.setdefault(layer, (known or [alone])[0])
    frozen = trace.unfollowed | frozen
    return {layer: why for layer, why in frozen.items() if layer not in prunable}
