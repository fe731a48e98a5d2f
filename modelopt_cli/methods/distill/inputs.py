"""Showing a teacher the student's images in the form it was trained with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.errors import UsageError
from modelopt_cli.program import InputSpec

Stats = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Change:
    """Makes of one network's input another's.

    Attributes:
        before: mean and standard deviation that the images were normalised with, or None.
        after: those that they are to be normalised with, or None.
        size: height and width they are to have, or None.
    """

    before: Stats | None
    after: Stats | None
    size: tuple[int, int] | None

    def __call__(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, *size)``; resized bilinearly, antialiased, as torchvision does."""
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        if self.before is not None and self.after is not None:
            (mean, std), (new_mean, new_std) = (
                [torch.tensor(each, device=images.device).view(-1, 1, 1) for each in stats]
                for stats in (self.before, self.after)
            )
            images = images * (std / new_std) + (mean - new_mean) / new_std
        return images


CHANNELS_HINT = "choose a student with the teacher's channels, which it gets where --student names none"


def change_between(student: InputSpec, teacher: InputSpec, *, resize: bool, where: str) -> Change | None:
    """What the student's images need for the teacher; None if nothing.

    Args:
        student: what the images are made for.
        teacher: what the teacher expects.
        resize: whether images of another size may be resized for the teacher.
        where: the teacher, for messages.

    Raises:
        UsageError: they differ in more than can be changed, or in size without ``resize``.
    """
    size = None
    if student.shape != teacher.shape:
        ours, theirs = ("x".join(map(str, spec.shape)) for spec in (student, teacher))
        if len(student.shape) != 3 or len(teacher.shape) != 3 or student.shape[0] != teacher.shape[0]:
            raise UsageError(f"takes {theirs}, the student {ours}", where=where, hint=CHANNELS_HINT)
        if not resize:
            hint = "resize the images for it with --resize-for-teacher"
            raise UsageError(f"takes {theirs}, the student {ours}", where=where, hint=hint)
        size = (teacher.shape[1], teacher.shape[2])
    before, after = _stats(student), _stats(teacher)
    if before == after or before is None or after is None:
        before = after = None
    return None if size is None and before is None else Change(before, after, size)


def _stats(spec: InputSpec) -> Stats | None:
    return None if spec.preprocess is None else (spec.preprocess.mean, spec.preprocess.std)
