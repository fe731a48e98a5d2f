"""Who is learned from: one network, or several that answer together."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.errors import InputError
from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.fp32 import prepack
from modelopt_cli.measure.forms import agreeing
from modelopt_cli.measure.subject import is_quantized
from modelopt_cli.methods.distill.taps import Place, Taps, tapped
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import random_input
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.input_spec import InputType
from modelopt_cli.program.samples import zeros
from modelopt_cli.training.prepare import to_channels_last

Change = Callable[[Tensor], Tensor]
Call = Callable[[Tensor], Any]
_COMPARED = 2
"""Samples on which a faster form must agree with the network."""


@dataclass(frozen=True)
class Member:
    """A network that is learned from.

    Attributes:
        network: takes a batch and returns logits; it is never changed.
        shape: of one of its input samples.
        dtype: of their elements.
        weight: of its logits next to those of the other teachers.
        change: makes of the student's images what this network expects; None where that is the same.
        name: what it is called in messages and in the history.
    """

    network: nn.Module
    shape: tuple[int, ...]
    weight: float = 1.0
    change: Change | None = None
    name: str = "the teacher"
    dtype: InputType = "float32"

    @property
    def input(self) -> InputSpec:
        """Shape and element type of a sample."""
        return InputSpec(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Answer:
    """What a teacher says to a batch.

    Attributes:
        logits: ``(N, classes)``.
        features: its values at the places that are looked at.
    """

    logits: Tensor
    features: Mapping[Place, Tensor] = field(default_factory=dict)


class Teacher:
    """Members ready to answer: in evaluation mode, without gradients, in the fastest form there is.

    Together they answer the weighted mean of their logits, which is the geometric mean of their softmax
    probabilities up to scale (G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural
    Network", 2015, section 2). Features are those of the first.

    Args:
        members: at least one.
        looked_at: places of the first member.
        device: where to compute.
        batch_size: how many images the members see at a time, fewer being filled up. How a library rounds
            may depend on how many there are (oneDNN and MKL do for small batches): without this a sample's
            answer would, too, and one that was kept would not be the one that is given now. Not where
            features are looked at, which nobody keeps. None shows the images as they come.
        amp: whether it is called under torch's autocast to bfloat16.
        on_note: called with one line where a member cannot be trusted in its fastest form.
    """

    def __init__(
        self,
        members: Sequence[Member],
        looked_at: Sequence[Place] = (),
        device: str = "cpu",
        *,
        batch_size: int | None = None,
        amp: bool = False,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self._batch_size = None if looked_at else batch_size
        self._members, self._places = tuple(members), tuple(dict.fromkeys(looked_at))
        total = sum(member.weight for member in members)
        self._shares = [member.weight / total for member in members]
        networks = [copy.deepcopy(member.network).eval().requires_grad_(False) for member in members]
        self._taps: Taps | None = None
        self._open = ExitStack()  # for as long as this is there: the copy is its own
        self._calls: list[Callable[[Tensor], Tensor]] = []
        if self._places:
            first = _laid_out(networks.pop(0), members[0], device)
            self._taps = self._open.enter_context(tapped(first, self._places))
            self._calls.append(first)
        rest = members[len(self._calls) :]
        fast = [_fastest(*each, device, amp) for each in zip(networks, rest, strict=True)]
        for member, network, form in zip(rest, networks, fast, strict=True):
            if form is None and on_note is not None:
                on_note(f"{member.name}: its fastest form gives other outputs, so it runs as it is")
            self._calls.append(form or _laid_out(network, member, device))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Answer:
        """The answer to ``(N, *shape)`` images as the student sees them.

        Raises:
            InputError: the members have different classes.
        """
        if self._batch_size is None:
            return self._answer(images)
        blocks = [self._answer(block).logits for block in _blocks(images, self._batch_size)]
        return Answer(torch.cat(blocks)[: len(images)])

    def _answer(self, images: Tensor) -> Answer:
        total: Tensor | None = None
        for member, share, call in zip(self._members, self._shares, self._calls, strict=True):
            logits = call(images if member.change is None else member.change(images)).float()
            if total is not None and logits.shape != total.shape:
                raise InputError(
                    f"answers {logits.shape[1]} classes, {self._members[0].name} {total.shape[1]}",
                    where=member.name,
                )
            total = share * logits if total is None else total + share * logits
        assert total is not None
        taps = self._taps
        features = {} if taps is None else {place: taps.take(place) for place in self._places}
        return Answer(total, features)


def _blocks(images: Tensor, size: int) -> tuple[Tensor, ...]:
    """The images, ``size`` at a time; the last ones with copies of the last one, which no range grows by."""
    lacking = -len(images) % size
    if lacking:
        images = torch.cat([images, images[-1:].expand(lacking, *images.shape[1:])])
    blocks: tuple[Tensor, ...] = images.split(size)
    return blocks


def _fastest(network: nn.Module, member: Member, device: str, amp: bool) -> Call | None:
    """How to call a network that nothing of is to be seen but the outputs; None where that gives others."""
    if not isinstance(network, Program):
        return _laid_out(network, member, device)
    if is_quantized(network):
        return prepare(network, device)

    def make() -> Call:
        if device == "cpu" and not (amp and _computes_bfloat16()):
            return prepack(network)
        return _laid_out(fold_batch_norms(inference_form(network)), member, device)

    x = random_input(network, member.input, _COMPARED).to(device)
    with torch.inference_mode():
        expected = network.to(device)(x.clone())
    # Made again: weights are packed for the first batch that comes.
    return make() if agreeing(make, x, expected) is not None else None


def _laid_out(network: nn.Module, member: Member, device: str) -> nn.Module:
    """On the device, with the channels innermost unless something in it insists on the other order."""
    network = network.to(device)
    with torch.no_grad():
        to_channels_last(network, zeros(member.input, 1, device))
    return network


def _computes_bfloat16() -> bool:
    """Whether the processor does; without that bfloat16 is slower than packed float32."""
    return any(has and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())
