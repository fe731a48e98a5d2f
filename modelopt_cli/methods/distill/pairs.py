"""Which of the student's values are compared with which of the teacher's."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.table import LOSSES
from modelopt_cli.methods.distill.taps import Place, embedding, places
from modelopt_cli.methods.distill.terms import Term


@dataclass(frozen=True)
class Pair:
    """Two values that a term compares.

    Attributes:
        term: its name and weight.
        student: where the student's value is.
        teacher: where the teacher's is.
    """

    term: Term
    student: Place
    teacher: Place


class Network:
    """The places of a network, looked up once.

    Args:
        network: the student or the teacher.
        shape: of one of its input samples.
        who: what it is called in messages.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], who: str) -> None:
        self._network, self._shape, self._who = network, shape, who
        self._places: list[Place] | None = None

    @property
    def places(self) -> list[Place]:
        """All of them, in the order in which they are computed."""
        if self._places is None:
            self._places = places(self._network, self._shape)
        return self._places

    @property
    def embedding(self) -> Place:
        """What its last layer is given."""
        return embedding(self._network, self._shape)

    def find(self, glob: str) -> Place:
        """The last place whose name the glob matches or that lies in a layer which it matches.

        The end of a block, such as the addition and activation behind its last layer, belongs to the block:
        what follows such a layer with the same shape, up to the next layer.

        Raises:
            UsageError: there is none.
        """
        exact = [place for place in self.places if fnmatchcase(place.name, glob)]
        if exact:
            return exact[-1]
        inside = [i for i, place in enumerate(self.places) if fnmatchcase(place.name, f"{glob}.*")]
        if not inside:
            names = list(dict.fromkeys(place.name for place in self.places))
            close = difflib.get_close_matches(glob, names, n=1, cutoff=0.0)
            hint = f"the nearest is {close[0]!r}" if close else None
            raise UsageError(f"{glob!r} matches no layer of {self._who}", where="--loss", hint=hint)
        last = inside[-1]
        while last + 1 < len(self.places) and self._continues(last):
            last += 1
        return self.places[last]

    def _continues(self, index: int) -> bool:
        """Whether the next place is what a function makes of this one."""
        here, there = self.places[index : index + 2]
        return there.shape == here.shape and there.name == there.key

    def stages(self) -> dict[tuple[int, ...], Place]:
        """The last maps ``(C, H, W)`` of each size, or sequences ``(T, C)`` of each length, in order."""
        found: dict[tuple[int, ...], Place] = {}
        for place in self.places:
            size = place.shape[1:] if len(place.shape) == 3 else place.shape[:1]
            if len(place.shape) in (2, 3) and size != (1, 1):
                found.pop(size, None)
                found[size] = place
        return found


def pairs_of(term: Term, student: Network, teacher: Network) -> list[Pair]:
    """What a term compares; nothing for one on logits.

    Layers that are named nowhere are chosen by size: of each size that both networks' values have, the last.

    Raises:
        UsageError: a glob matches nothing, or the networks have no size in common.
    """
    looks_at = LOSSES[term.name].looks_at if term.name in LOSSES else "logits"
    if looks_at == "logits":
        return []
    if term.student is not None and term.teacher is not None:
        named = zip(term.student, term.teacher, strict=True)
        return [Pair(term, student.find(s), teacher.find(t)) for s, t in named]
    if looks_at == "embeddings":
        return [Pair(term, student.embedding, teacher.embedding)]
    ours, theirs = student.stages(), teacher.stages()
    found = [Pair(term, ours[size], theirs[size]) for size in ours if size in theirs]
    if not found:
        raise UsageError(
            f"{term.name} finds no values of one size: the student has {_sizes(ours)}, "
            f"the teacher {_sizes(theirs)}",
            where="--loss",
            hint=f"name layers: {term.name}@STUDENT=TEACHER",
        )
    return found


def _sizes(stages: dict[tuple[int, ...], Place]) -> str:
    return ", ".join("x".join(map(str, size)) for size in stages) or "none"


def described(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """What each term compares, for the history and for the user."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        mine, theirs = pair.student.name, pair.teacher.name
        found.setdefault(str(pair.term), []).append(mine if mine == theirs else f"{mine}={theirs}")
    return found
