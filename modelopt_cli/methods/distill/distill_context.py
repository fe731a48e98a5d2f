"""Run settings of a distillation: those of any method, its teachers and their cache."""

from collections.abc import Callable
from dataclasses import dataclass

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.distill.cache import CacheRequest
from modelopt_cli.methods.distill.teacher import TeacherMember
from modelopt_cli.settings import option
from modelopt_cli.training import Training


@dataclass(frozen=True)
class DistillContext(Context):
    """Run settings of a distillation.

    Attributes:
        teachers: the networks that are learned from; at least one.
        cache: folder for their logits, or None.
        on_note: called with one line for each thing the user should know meanwhile.
    """

    teachers: tuple[TeacherMember, ...] = ()
    cache: CacheRequest | None = None
    on_note: Callable[[str], None] | None = None

    @property
    def trained_with(self) -> Training:
        """Training of the student.

        Raises:
            UsageError: there is none, or no teacher.
        """
        if self.training is None:
            raise UsageError("distill trains the student", hint=f"give {option('train')}")
        if not self.teachers:
            raise UsageError("distill needs a teacher")
        return self.training
