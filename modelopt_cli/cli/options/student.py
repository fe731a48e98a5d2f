"""The networks of a distillation; how the student learns is a ``DistillConfig``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from modelopt_cli.cli.completion import architectures
from modelopt_cli.cli.values import Reader
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.settings import Config, Setting

if TYPE_CHECKING:
    from modelopt_cli.api import Student


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


@dataclass(frozen=True)
class StudentOptions(Config, title=DistillConfig.title):
    """The student, and teachers besides the first."""

    student: Annotated[
        str | None,
        Setting(
            "Network that learns: an architecture as for --arch, a checkpoint or modelopt file, same (the "
            "teacher's architecture), width:F (of its channels) or depth:F (of its blocks).",
            metavar="SPEC",
            suggest=architectures,
        ),
    ] = None
    student_arch: Annotated[
        str | None,
        Setting(
            "Architecture of a student's checkpoint.", metavar="SPEC", advanced=True, suggest=architectures
        ),
    ] = None
    also: Annotated[
        tuple[str, ...],
        Setting(
            "Another teacher, whose outputs count W times; may be repeated.",
            metavar="FILE[=W]",
            advanced=True,
        ),
    ] = ()
    resize_for_teacher: Annotated[
        bool, Setting("Resize images for a teacher of another input size.", advanced=True)
    ] = False
    compare_scratch: Annotated[
        bool, Setting("Train the student without a teacher, too, as OUTPUT-scratch.", advanced=True)
    ] = False
    cache: Annotated[
        Path | None,
        Setting(
            "Folder of the teacher's logits, so that later epochs and other students need no teacher.",
            metavar="DIR",
        ),
    ] = None

    def read(self, reader: Reader, config: DistillConfig) -> None:
        """Leave with ``reader`` what is missing or does not go together."""
        reader.check(self.student is not None, "--student", "say what is to learn, e.g. builtin:resnet8")
        idle = self.cache is None and config.cache_top != DistillConfig.cache_top
        reader.check(not idle, "--cache-top", "has no meaning without --cache")
        for text in self.also:
            reader.read("--also", text, _weighted)

    def further_teachers(self) -> list[tuple[str, float]]:
        """The teachers of ``--also`` and their weights."""
        return [_weighted(text) for text in self.also]

    def chosen(self) -> "Student":
        """The same for the Python API."""
        from modelopt_cli.api import Student

        return Student(
            self.student or "",
            self.student_arch,
            self.further_teachers(),
            self.resize_for_teacher,
            self.compare_scratch,
            self.cache,
        )
