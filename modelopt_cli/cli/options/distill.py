"""The options of ``distill`` alone."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from modelopt_cli.cli.values import Reader

_distill = partial(typer.Option, rich_help_panel="Distillation")

_NOT_OF_THE_CONFIG = ("student", "student_arch", "also", "resize_for_teacher", "compare_scratch", "cache")


@dataclass(frozen=True)
class DistillOptions:
    """Who learns, from whom, and what counts."""

    student: Annotated[
        str | None,
        _distill(
            metavar="SPEC",
            help="What learns: an architecture as for --arch, a checkpoint or modelopt file, same (the "
            "teacher's architecture), width:F (of its channels) or depth:F (of its blocks).",
        ),
    ] = None
    student_arch: Annotated[
        str | None, _distill(metavar="SPEC", help="The architecture of a student's checkpoint.")
    ] = None
    also: Annotated[
        list[str] | None,
        _distill(metavar="FILE[=W]", help="Another teacher, whose answers count W times; may be repeated."),
    ] = None
    loss: Annotated[
        str,
        _distill(
            metavar="TERMS",
            help="A sum such as ce:0.1+kd:0.9+hint:1@layer3, of ce, kd, mse, dkd, std, dist, hint, at, rkd, "
            "crd.",
        ),
    ] = "ce:0.1+kd:0.9"
    temperature: Annotated[float, _distill(metavar="T", help="Softens the answers of both.")] = 4.0
    finetune_epochs: Annotated[
        int, _distill(min=0, metavar="N", help="Then train on the labels alone for so many epochs.")
    ] = 0
    finetune_lr: Annotated[
        float | None,
        _distill(metavar="X", help="Learning rate of that [default: a tenth of the rate before]."),
    ] = None
    resize_for_teacher: Annotated[
        bool, _distill("--resize-for-teacher", help="Resize images for a teacher of another input size.")
    ] = False
    compare_scratch: Annotated[
        bool,
        _distill("--compare-scratch", help="Train the student without a teacher, too, as OUTPUT-scratch."),
    ] = False
    cache: Annotated[
        Path | None,
        _distill(
            metavar="DIR",
            help="Keep the teacher's answers there, so that later epochs and other students need no teacher.",
        ),
    ] = None
    cache_top: Annotated[
        int,
        _distill(min=1, metavar="K", help="Keep the K largest logits of each answer, and the others' sum."),
    ] = 64

    def read(self, reader: Reader) -> dict[str, Any]:
        """The fields of ``methods.distill.DistillConfig``, which cannot be imported without torch."""
        reader.check(self.student is not None, "--student", "say what is to learn, e.g. builtin:resnet8")
        unused = self.cache is None and self.cache_top != DistillOptions.cache_top
        reader.check(not unused, "--cache-top", "has no meaning without --cache")
        for text in self.also or ():
            reader.read("--also", text, _weighted)
        return {name: value for name, value in vars(self).items() if name not in _NOT_OF_THE_CONFIG}

    def others(self) -> list[tuple[str, float]]:
        """The teachers of ``--also`` and their weights."""
        return [_weighted(text) for text in self.also or ()]


def _weighted(text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE=W``; raises ValueError."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0  # a name with an equals sign
    if not path or not 0 < value < float("inf"):
        raise ValueError(f"'{text}' is not FILE or FILE=W with a weight above 0")
    return path, value
