"""Pairs of feature points: values of the student that are compared with those of the teacher."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.feature_points import FeaturePoint, embedding_point, feature_points
from modelopt_cli.methods.distill.losses import LooksAt, Term
from modelopt_cli.program import InputSpec
from modelopt_cli.settings import option


@dataclass(frozen=True)
class Pair:
    """Two values that a term compares.

    Attributes:
        term: its name and weight.
        student: where the student's value is.
        teacher: where the teacher's is.
    """

    term: Term
    student: FeaturePoint
    teacher: FeaturePoint


class NetworkPoints:
    """Feature points of a network, computed once.

    Args:
        network: the student or the teacher.
        sample: what its inputs are.
        name: for messages, such as ``the student``.
    """

    def __init__(self, network: nn.Module, sample: InputSpec, name: str) -> None:
        self._network, self._sample, self._name = network, sample, name
        self._points: list[FeaturePoint] | None = None

    @property
    def points(self) -> list[FeaturePoint]:
        """All points, in the order in which they are computed."""
        if self._points is None:
            self._points = feature_points(self._network, self._sample)
        return self._points

    @property
    def embedding(self) -> FeaturePoint:
        """Input of its last layer."""
        return embedding_point(self._network, self._sample)

    def find(self, glob: str) -> FeaturePoint:
        """Last point whose name the glob matches or that lies in a layer which it matches.

        The end of a block, such as the addition and activation behind its last layer, belongs to the block:
        what follows such a layer with the same shape, up to the next layer.

        Raises:
            UsageError: there is none.
        """
        exact = [point for point in self.points if fnmatchcase(point.name, glob)]
        if exact:
            return exact[-1]
        inside = [i for i, point in enumerate(self.points) if fnmatchcase(point.name, f"{glob}.*")]
        if not inside:
            names = list(dict.fromkeys(point.name for point in self.points))
            close = difflib.get_close_matches(glob, names, n=1, cutoff=0.0)
            hint = f"the nearest is {close[0]!r}" if close else None
            raise UsageError(f"{glob!r} matches no layer of {self._name}", where=option("loss"), hint=hint)
        last = inside[-1]
        while last + 1 < len(self.points) and self._continues(last):
            last += 1
        return self.points[last]

    def _continues(self, index: int) -> bool:
        """True if the next point is the output of a function of this one."""
        here, there = self.points[index : index + 2]
        return there.shape == here.shape and there.name == there.key

    def stages(self) -> dict[tuple[int, ...], FeaturePoint]:
        """Last maps ``(C, H, W)`` of each size, or sequences ``(T, C)`` of each length, in order."""
        pairs: dict[tuple[int, ...], FeaturePoint] = {}
        for point in self.points:
            size = point.shape[1:] if len(point.shape) == 3 else point.shape[:1]
            if len(point.shape) in (2, 3) and size != (1, 1):
                pairs.pop(size, None)
                pairs[size] = point
        return pairs


def pairs_of(term: Term, student: NetworkPoints, teacher: NetworkPoints) -> list[Pair]:
    """Pairs that a term compares; none for one on labels or logits.

    Layers that are named nowhere are chosen by size: of each size that both networks' values have, the last.

    Raises:
        UsageError: a glob matches nothing, or the networks have no size in common.
    """
    if not term.loss.looks_inside:
        return []
    if term.student is not None and term.teacher is not None:
        named = zip(term.student, term.teacher, strict=True)
        return [Pair(term, student.find(s), teacher.find(t)) for s, t in named]
    if term.loss.looks_at is LooksAt.EMBEDDINGS:
        return [Pair(term, student.embedding, teacher.embedding)]
    ours, theirs = student.stages(), teacher.stages()
    pairs = [Pair(term, ours[size], theirs[size]) for size in ours if size in theirs]
    if not pairs:
        raise UsageError(
            f"{term.name} finds no values of one size: the student has {_sizes(ours)}, "
            f"the teacher {_sizes(theirs)}",
            where=option("loss"),
            hint=f"name layers: {term.name}@STUDENT=TEACHER",
        )
    return pairs


def _sizes(stages: dict[tuple[int, ...], FeaturePoint]) -> str:
    return ", ".join("x".join(map(str, size)) for size in stages) or "none"


def described(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """Names of the values that each term compares, for the history and for the user."""
    names: dict[str, list[str]] = {}
    for pair in pairs:
        student, teacher = pair.student.name, pair.teacher.name
        names.setdefault(str(pair.term), []).append(student if student == teacher else f"{student}={teacher}")
    return names
