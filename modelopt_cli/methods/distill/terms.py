"""The grammar of ``--loss``: ``TERM+TERM...``, a term being ``NAME[:WEIGHT][@LAYERS[=LAYERS]]``."""

import math
import re
from dataclasses import dataclass

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.table import LOSSES
from modelopt_cli.settings import did_you_mean, option

LABELS = "ce"
"""The name of the labels' part in the loss, cross-entropy; it has weight 1 unless another is given."""
_PLUS = re.compile(r"\+(?!\d)")
"""Not that of ``1e+3``."""


@dataclass(frozen=True)
class Term:
    """One part of the loss.

    Attributes:
        name: ``ce`` or a key of ``LOSSES``.
        weight: that it is multiplied by, 0 or more.
        student: globs of the student's layers; None leaves the choice to whoever computes the loss.
        teacher: of the teacher's layers, as many: the first belongs to the student's first, and so on.
    """

    name: str
    weight: float
    student: tuple[str, ...] | None = None
    teacher: tuple[str, ...] | None = None

    def __str__(self) -> str:
        text = f"{self.name}:{repr(self.weight).removesuffix('.0')}"
        if self.student is None or self.teacher is None:
            return text
        text += "@" + ",".join(self.student)
        return text if self.teacher == self.student else text + "=" + ",".join(self.teacher)


class Terms(tuple[Term, ...]):
    """The whole loss, a sum. Its ``str`` is a text that parses to the same terms."""

    def __str__(self) -> str:
        return "+".join(map(str, self))


def parse_terms(text: str) -> Terms:
    """The terms in the order given, after that of the labels if it is not among them.

    ``kd:0.9+hint:1@layer3`` compares the layers of that name; ``hint@a,b=c,d`` the student's ``a`` with the
    teacher's ``c``, and ``b`` with ``d``.

    Raises:
        UsageError: a term is malformed or there twice, or all weights are 0.
    """
    terms = [_term(part) for part in _PLUS.split("".join(text.split()))]
    seen = set()
    for term in terms:
        key = term.name, term.student, term.teacher
        if key in seen:
            raise _wrong(f"{term.name} is there twice", "give it once, with its whole weight")
        seen.add(key)
    if not any(term.name == LABELS for term in terms):
        terms.insert(0, Term(LABELS, 1.0))
    if not any(term.weight for term in terms):
        raise _wrong("all weights are 0", "give one that is not")
    return Terms(terms)


def _term(text: str) -> Term:
    head, at, layers = text.partition("@")
    name, colon, weight = head.partition(":")
    known = (LABELS, *LOSSES)
    if name not in known:
        hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
        raise _wrong(f"unknown loss {name!r}", hint)
    usual = 1.0 if name == LABELS else LOSSES[name].weight
    value = _weight(name, weight) if colon else usual
    if not at:
        return Term(name, value)
    if name == LABELS or LOSSES[name].looks_at == "logits":
        raise _wrong(f"{name} looks at logits, not at a layer", f"leave out @{layers}")
    if ":" in layers:
        raise _wrong(f"{text!r} has its weight after the layer", f"write {name}:WEIGHT@LAYER")
    return Term(name, value, *_layers(text, layers))


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise _wrong(f"{text!r} is no weight of {name}", "give a number from 0")
    return abs(weight)  # -0.0 is 0


def _layers(term: str, text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    sides = [tuple(side.split(",")) for side in text.split("=")]
    student, teacher = sides[0], sides[-1]
    if len(sides) > 2 or "" in (*student, *teacher):
        raise _wrong(f"{term!r} names no layers", "write @LAYER,... or @STUDENT,...=TEACHER,...")
    if len(student) != len(teacher):
        raise _wrong(
            f"{term!r} has {len(student)} of the student's layers and {len(teacher)} of the teacher's",
            "give equally many",
        )
    return student, teacher


def _wrong(what: str, hint: str) -> UsageError:
    return UsageError(what, where=option("loss"), hint=hint)
