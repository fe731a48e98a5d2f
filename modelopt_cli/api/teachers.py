"""The teachers of ``distill``: their files, and a check that they fit the student."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelopt_cli.api.opening import sample_of
from modelopt_cli.api.request import Note
from modelopt_cli.api.students import learned_output
from modelopt_cli.checkpoint import Opened, require_network
from modelopt_cli.data.class_names import match_names
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import Gates
from modelopt_cli.methods.distill.cache_identity import PROBED
from modelopt_cli.methods.distill.teacher import TeacherMember, input_change
from modelopt_cli.program import InputSpec
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec


@dataclass(frozen=True)
class TeacherFile:
    """A teacher's file.

    Attributes:
        path: where it is.
        opened: what is in it.
        weight: of its logits next to those of the other teachers.
    """

    path: str | Path
    opened: Opened
    weight: float = 1.0


def members_of(
    teachers: Sequence[TeacherFile], seen: InputSpec, *, resize: bool
) -> tuple[TeacherMember, ...]:
    """The teachers of a student.

    Args:
        teachers: their files.
        seen: what the student takes.
        resize: whether images may be resized for a teacher that takes another size.

    Raises:
        InputError: one is no network, or cannot look at the student's images.
    """
    members = []
    for each in teachers:
        network, input_spec = require_network(each.opened, each.path), sample_of(each.opened, each.path)
        change = input_change(seen, input_spec, resize=resize, where=str(each.path))
        members.append(TeacherMember(network, input_spec, each.weight, change, Path(each.path).name))
    return tuple(members)


def require_same_outputs(
    members: Sequence[TeacherMember], student: Opened, seen: InputSpec, task: TaskSpec = CLASSIFY
) -> None:
    """Refuse teachers that tell apart more or fewer classes than the student, or return other numbers."""
    learned = learned_output(require_network(student, "the student"), seen, task=task)
    for member in members:
        wanted = learned_output(member.network, member.input, task=task)
        if task.classes(wanted) != task.classes(learned):
            raise UsageError(
                f"has {task.classes(wanted)} classes, the student {task.classes(learned)}",
                where=member.name,
                hint=f"give the student as many, e.g. with ?num_classes= in {option('student')}",
            )
        if wanted.shape != learned.shape and member.change is None:
            raise UsageError(
                f"returns {tuple(wanted.shape)} for {PROBED} samples, the student {tuple(learned.shape)}",
                where=member.name,
                hint="give a student that returns the same",
            )


def require_same_names(teachers: Sequence[TeacherFile], student: Opened) -> tuple[str, ...] | None:
    """The names of the classes, where a teacher or the student has them.

    Raises:
        UsageError: two have other classes, or others in the same places.
    """
    names = [(str(each.path), each.opened.labels) for each in teachers]
    named = [(name, classes) for name, classes in [*names, ("the student", student.labels)] if classes]
    if not named:
        return None
    first, labels = named[0]
    for name, classes in named[1:]:
        if len(classes) != len(labels) or match_names(classes, labels, name).positions != tuple(
            range(len(labels))
        ):
            problem = f"does not have the classes of {first} in the same order"
            hint = "train one of them again on folders of the same names"
            raise UsageError(problem, where=name, hint=hint)
    return labels


def comparable(teacher: TeacherFile, sample: InputSpec) -> bool:
    """True if teacher and student can be measured on the same tensors."""
    return sample_of(teacher.opened, teacher.path).shape == sample.shape


def leave_out(teacher: TeacherFile, gates: Gates, on_note: Note | None) -> None:
    """Say, before anything is trained, that the teacher will not be in the table."""
    problem = "takes images of another size than the student"
    if gates:
        hint = "measure each with eval"
        raise UsageError(f"{problem}, so that no gate can compare them", where=str(teacher.path), hint=hint)
    if on_note is not None:
        on_note(f"{teacher.path} {problem}, and is not in the table")
