"""Losses of distillation, one row each, and the grammar of ``--loss``. Imports no torch.

``--loss`` is ``TERM+TERM...``, a term being ``NAME[:WEIGHT][@LAYERS[=LAYERS]]``.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum, auto
from typing import Any

from modelopt_cli.errors import UsageError
from modelopt_cli.lazy_names import deferred
from modelopt_cli.settings import did_you_mean, option

_PACKAGE = "modelopt_cli.methods.distill"
_hint = deferred(f"{_PACKAGE}.feature_losses", "Hint")
_attention = deferred(f"{_PACKAGE}.feature_losses", "Attention")
_relational = deferred(f"{_PACKAGE}.embedding_losses", "Relational")


class LooksAt(StrEnum):
    """Values that a loss compares."""

    LABELS = "labels"
    """The student's logits with the labels."""
    LOGITS = "logits"
    """Those of student and teacher."""
    FEATURES = "features"
    """Values inside the two."""
    EMBEDDINGS = "embeddings"
    """Inputs of the last layers of the two, flattened."""


class Needs(IntEnum):
    """The least that outputs must stand for, so that a loss can compare them."""

    NUMBERS = auto()
    """Anything."""
    PROBABILITIES = auto()
    """Classes, of which one is right, or each by itself."""
    CLASSES = auto()
    """Classes, of which one is right."""


@dataclass(frozen=True)
class Loss:
    """One part of the loss that a student learns by.

    Attributes:
        help: the quantity that is compared.
        paper: its source, authors and year.
        looks_at: values that are compared.
        weight: where the user gives none. It goes with weight 1 of the labels.
        make: for labels ``make(label_smoothing)`` gives a ``training.Objective``. For logits it is the loss
            itself, ``make(student, teacher, labels, temperature)``, as in ``logit_losses.py``. For features
            and embeddings ``make(student, teacher, samples)`` gives a module, from the two shapes without the
            batch and the number of training samples; the module is called with the two features and may have
            parameters that learn.
        needs: of a loss on logits, what they must stand for.
        needs_labels: it needs the right class of each row of logits, too.
    """

    help: str
    paper: str
    looks_at: LooksAt
    weight: float
    make: Callable[..., Any]
    needs: Needs = Needs.CLASSES
    needs_labels: bool = False

    @property
    def compares_outputs(self) -> bool:
        """True if it compares what the two networks return."""
        return self.looks_at is LooksAt.LOGITS

    @property
    def looks_inside(self) -> bool:
        """True if it compares values of layers, which may be named."""
        return self.looks_at in (LooksAt.FEATURES, LooksAt.EMBEDDINGS)


LOSSES: dict[str, Loss] = {
    "ce": Loss(
        "cross-entropy with the labels",
        "smoothed as by Szegedy et al. 2016",
        LooksAt.LABELS,
        1.0,
        deferred("modelopt_cli.training.objectives", "loss_on_labels"),
    ),
    "kd": Loss(
        "softened probabilities",
        "Hinton et al. 2015",
        LooksAt.LOGITS,
        0.9,
        deferred(f"{_PACKAGE}.logit_losses", "kd"),
        needs=Needs.PROBABILITIES,
    ),
    "mse": Loss(
        "logits, or outputs that are none",
        "Ba and Caruana 2014",
        LooksAt.LOGITS,
        1.0,
        deferred(f"{_PACKAGE}.logit_losses", "mse"),
        needs=Needs.NUMBERS,
    ),
    "dkd": Loss(
        "probability of the label's class, and apart from it those of the others",
        "Zhao et al. 2022",
        LooksAt.LOGITS,
        1.0,
        deferred(f"{_PACKAGE}.logit_losses", "dkd"),
        needs_labels=True,
    ),
    "std": Loss(
        "softened probabilities of standardised logits",
        "Sun et al. 2024",
        LooksAt.LOGITS,
        9.0,
        deferred(f"{_PACKAGE}.logit_losses", "std"),
    ),
    "dist": Loss(
        "correlation of probabilities over classes and over samples",
        "Huang et al. 2022",
        LooksAt.LOGITS,
        2.0,
        deferred(f"{_PACKAGE}.logit_losses", "dist"),
    ),
    "hint": Loss(
        "features, through an adapter that learns",
        "Romero et al. 2015",
        LooksAt.FEATURES,
        # 100 in the code of the authors of CRD, behind a batch norm: without that it diverges.
        1.0,
        lambda student, teacher, samples: _hint(student, teacher),
    ),
    "at": Loss(
        "positions where features are large",
        "Zagoruyko and Komodakis 2017",
        LooksAt.FEATURES,
        1000.0,
        lambda student, teacher, samples: _attention(student, teacher),
    ),
    "rkd": Loss(
        "distances and angles between samples",
        "Park et al. 2019",
        LooksAt.EMBEDDINGS,
        25.0,
        lambda student, teacher, samples: _relational(),
    ),
    "crd": Loss(
        "embeddings of one sample against those of others",
        "Tian et al. 2020",
        LooksAt.EMBEDDINGS,
        0.8,
        deferred(f"{_PACKAGE}.embedding_losses", "Contrastive"),
    ),
}
"""By the name in ``--loss``. Sums without a loss on labels get the first one that looks at them."""

_PLUS = re.compile(r"\+(?!\d)")
"""Not that of ``1e+3``."""


@dataclass(frozen=True)
class Term:
    """One part of the loss.

    Attributes:
        name: a key of ``LOSSES``.
        weight: that it is multiplied by, 0 or more.
        student: globs of the student's layers; None leaves the choice to whoever computes the loss.
        teacher: of the teacher's layers, as many: the first belongs to the student's first, and so on.
    """

    name: str
    weight: float
    student: tuple[str, ...] | None = None
    teacher: tuple[str, ...] | None = None

    @property
    def loss(self) -> Loss:
        """Row of its name."""
        return LOSSES[self.name]

    def __str__(self) -> str:
        text = f"{self.name}:{repr(self.weight).removesuffix('.0')}"
        if self.student is None or self.teacher is None:
            return text
        text += "@" + ",".join(self.student)
        return text if self.teacher == self.student else text + "=" + ",".join(self.teacher)


class Terms(tuple[Term, ...]):
    """Sum of terms. Its ``str`` is a text that parses to the same terms."""

    @property
    def compare_outputs(self) -> bool:
        """True if one that counts compares what the two networks return."""
        return any(term.weight and term.loss.compares_outputs for term in self)

    def __str__(self) -> str:
        return "+".join(map(str, self))


def parse_terms(text: str) -> Terms:
    """Terms of a text in the order given, after that of the labels if none is among them.

    ``kd:0.9+hint:1@layer3`` compares the layers of that name; ``hint@a,b=c,d`` the student's ``a`` with the
    teacher's ``c``, and ``b`` with ``d``.

    Raises:
        UsageError: a term is malformed or there twice, or all weights are 0.
    """
    terms = [_term(part) for part in _PLUS.split("".join(text.split()))]
    keys = set()
    for term in terms:
        key = term.name, term.student, term.teacher
        if key in keys:
            raise _wrong(f"{term.name} is there twice", "give it once, with its full weight")
        keys.add(key)
    if not any(term.loss.looks_at is LooksAt.LABELS for term in terms):
        name, labels = next((name, loss) for name, loss in LOSSES.items() if loss.looks_at is LooksAt.LABELS)
        terms.insert(0, Term(name, labels.weight))
    if not any(term.weight for term in terms):
        raise _wrong("all weights are 0", "give one that is not")
    return Terms(terms)


def _term(text: str) -> Term:
    head, at, layers = text.partition("@")
    name, colon, weight = head.partition(":")
    if name not in LOSSES:
        hint = did_you_mean(name, LOSSES) or f"there are {', '.join(LOSSES)}"
        raise _wrong(f"unknown loss {name!r}", hint)
    value = _weight(name, weight) if colon else LOSSES[name].weight
    if not at:
        return Term(name, value)
    if not LOSSES[name].looks_inside:
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


def _wrong(problem: str, hint: str) -> UsageError:
    return UsageError(problem, where=option("loss"), hint=hint)
