"""Teachers: one network or several whose logits are averaged, and images in the form that each takes."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.fp32 import prepack
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.measure.variants import equivalent
from modelopt_cli.methods.distill.feature_points import FeaturePoint, FeatureValues, recording
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.input_batch import Inputs, batch_size, call, clone, concatenate, each_of, select, to
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.verification import random_input
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.tasks.task_output import form_of
from modelopt_cli.training.prepare import to_channels_last

Change = Callable[[Inputs], Inputs]
Call = Callable[..., Any]
Stats = tuple[tuple[float, ...], tuple[float, ...]]
_COMPARED = 2
"""Samples on which a faster form must agree with the network."""


@dataclass(frozen=True)
class TeacherMember:
    """Network that is learned from.

    Attributes:
        network: takes a batch and returns logits; it is never changed.
        input: what one of its samples is.
        weight: of its logits next to those of the other teachers.
        change: makes of the student's images what this network expects; None where that is the same.
        name: for messages and the history.
    """

    network: nn.Module
    input: InputSpec
    weight: float = 1.0
    change: Change | None = None
    name: str = "the teacher"


@dataclass(frozen=True)
class TeacherOutput:
    """Output of a teacher for a batch.

    Attributes:
        logits: of classifiers ``(N, classes)``; else the output that the task judges. None where no loss
            compares it.
        features: values at the points that are recorded.
    """

    logits: Tensor | None
    features: Mapping[FeaturePoint, Tensor] = field(default_factory=dict)


class Teacher:
    """Networks ready to be called: in evaluation mode, without gradients, in the fastest form there is.

    Together they return the weighted mean of their logits, which is the geometric mean of their softmax
    probabilities up to scale (G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural
    Network", 2015, section 2). Features are those of the first.

    Args:
        members: at least one.
        points: of the first member, to be recorded.
        device: where to compute.
        batch_size: how many images the members see at a time, fewer being filled up. How a library rounds
            may depend on how many there are (oneDNN and MKL do for small batches): without this a sample's
            logits would, too, and those that were kept would not be those that are computed now. Not where
            features are recorded, which nobody keeps. None shows the images as they come.
        amp: True if it is called under torch's autocast to bfloat16.
        on_note: called with one line where a member cannot be trusted in its fastest form.
        task: says which output of a network with several are its logits.
        compares_output: False if features alone are compared.
    """

    def __init__(
        self,
        members: Sequence[TeacherMember],
        points: Sequence[FeaturePoint] = (),
        device: str = "cpu",
        *,
        batch_size: int | None = None,
        amp: bool = False,
        on_note: Callable[[str], None] | None = None,
        task: TaskSpec = CLASSIFY,
        compares_output: bool = True,
    ) -> None:
        self._task, self._compares_output = task, compares_output
        self._batch_size = None if points else batch_size
        self._members, self._points = tuple(members), tuple(dict.fromkeys(points))
        total = sum(member.weight for member in members)
        self._shares = [member.weight / total for member in members]
        networks = [copy.deepcopy(member.network).eval().requires_grad_(False) for member in members]
        self._recorded: FeatureValues | None = None
        self._open = ExitStack()  # for as long as this is there: the copy is its own
        self._calls: list[Call] = []
        if self._points:
            first = _laid_out(networks.pop(0), members[0], device)
            self._recorded = self._open.enter_context(recording(first, self._points))
            self._calls.append(first)
        own = members[len(self._calls) :]
        fast = [_fastest(*each, device, amp) for each in zip(networks, own, strict=True)]
        for member, network, form in zip(own, networks, fast, strict=True):
            if form is None and on_note is not None:
                on_note(f"{member.name}: its fastest form gives other outputs, so it runs as it is")
            self._calls.append(form or _laid_out(network, member, device))

    @torch.no_grad()
    def __call__(self, images: Inputs) -> TeacherOutput:
        """Output for a batch as the student sees it.

        Raises:
            InputError: the members have different classes, or return no single output.
        """
        if self._batch_size is None:
            return self._outputs(images)
        if not self._compares_output and not self._points:
            return TeacherOutput(None)
        outputs = [self._outputs(block).logits for block in _blocks(images, self._batch_size)]
        blocks = [block for block in outputs if block is not None]
        axis = self._task.batch_axis(blocks[0], self._batch_size)
        return TeacherOutput(torch.cat(blocks, axis).narrow(axis, 0, batch_size(images)))

    def _outputs(self, images: Inputs) -> TeacherOutput:
        total: Tensor | None = None
        used = self._members if self._compares_output else self._members[:1]
        for member, share, network in zip(used, self._shares, self._calls, strict=False):
            outputs = call(network, images if member.change is None else member.change(images))
            if not self._compares_output:
                continue
            logits = _single(self._task.find(outputs), member)
            if total is not None and logits.shape != total.shape:
                raise InputError(
                    f"returns {logits.shape[1]} logits, {self._members[0].name} {total.shape[1]}",
                    where=member.name,
                )
            total = share * logits if total is None else total + share * logits
        values = self._recorded
        features = {} if values is None else {point: values.take(point) for point in self._points}
        return TeacherOutput(total, features)


def _single(output: Any, member: TeacherMember) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputError(f"returns {form_of(output)}, and no single output to compare", where=member.name)
    return output.float()


def _blocks(images: Inputs, size: int) -> list[Inputs]:
    """The images, ``size`` at a time; the last ones with copies of the last one, which no range grows by."""
    count = batch_size(images)
    if lacking := -count % size:
        images = concatenate([images, select(images, [count - 1] * lacking)])
    return [select(images, slice(start, start + size)) for start in range(0, count, size)]


def _fastest(network: nn.Module, member: TeacherMember, device: str, amp: bool) -> Call | None:
    """Fastest form of a network; None where its outputs are others."""
    if not isinstance(network, Program):
        return _laid_out(network, member, device)
    if is_quantized(network):
        return prepare(network, device)

    def make() -> Call:
        if device == "cpu" and not (amp and _computes_bfloat16()):
            return prepack(network)
        return _laid_out(fold_batch_norms(inference_form(network)), member, device)

    inputs = to(random_input(network, member.input, _COMPARED), device)
    with torch.inference_mode():
        expected = call(network.to(device), clone(inputs))
    # Made again: weights are packed for the first batch that comes.
    return make() if equivalent(make, inputs, expected) is not None else None


def _laid_out(network: nn.Module, member: TeacherMember, device: str) -> nn.Module:
    """The network on the device, with channels innermost unless something in it needs the other order."""
    network = network.to(device)
    with torch.no_grad():
        to_channels_last(network, zeros(member.input, 1, device))
    return network


def _computes_bfloat16() -> bool:
    """True if the processor does; without that bfloat16 is slower than packed float32."""
    return any(has and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())


@dataclass(frozen=True)
class InputChange:
    """Change of images from the form of one network's input to that of another's.

    Attributes:
        before: mean and standard deviation that the images were normalised with, or None.
        after: those that they are to be normalised with, or None.
        size: height and width they are to have, or None.
    """

    before: Stats | None
    after: Stats | None
    size: tuple[int, int] | None

    def __call__(self, inputs: Inputs) -> Inputs:
        """The images ``(N, C, H, W)`` of a batch as ``(N, C, *size)``; what else there is stays as it is.

        They are resized bilinearly, antialiased, as torchvision does.
        """
        return each_of(inputs, lambda tensor: self._changed(tensor) if tensor.dim() == 4 else tensor)

    def _changed(self, images: Tensor) -> Tensor:
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        if self.before is not None and self.after is not None:
            (mean, std), (new_mean, new_std) = (
                [torch.tensor(each, device=images.device).view(-1, 1, 1) for each in stats]
                for stats in (self.before, self.after)
            )
            images = images * (std / new_std) + (mean - new_mean) / new_std
        return images


def channels_hint() -> str:
    """Next step where a student takes other channels than its teacher."""
    student = option("student")
    return f"choose a student with the teacher's channels, which it gets where {student} names none"


def input_change(student: InputSpec, teacher: InputSpec, *, resize: bool, where: str) -> InputChange | None:
    """Change that the student's images need for the teacher; None if they need none.

    Args:
        student: what the images are made for.
        teacher: what the teacher expects.
        resize: allow resizing of images of another size.
        where: the teacher, for messages.

    Raises:
        UsageError: they differ in more than can be changed, or in size without ``resize``.
    """
    size = None
    if student.shape != teacher.shape:
        ours, theirs = ("x".join(map(str, spec.shape)) for spec in (student, teacher))
        if len(student.shape) != 3 or len(teacher.shape) != 3 or student.shape[0] != teacher.shape[0]:
            raise UsageError(f"takes {theirs}, the student {ours}", where=where, hint=channels_hint())
        if not resize:
            hint = f"resize the images for it with {option('resize_for_teacher')}"
            raise UsageError(f"takes {theirs}, the student {ours}", where=where, hint=hint)
        size = (teacher.shape[1], teacher.shape[2])
    before, after = _stats(student), _stats(teacher)
    if before == after or before is None or after is None:
        before = after = None
    return None if size is None and before is None else InputChange(before, after, size)


def _stats(spec: InputSpec) -> Stats | None:
    return None if spec.preprocess is None else (spec.preprocess.mean, spec.preprocess.std)
