"""A sequence of classes, such as characters, from a longer one of frames: speech and lines of text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets, indices_hint
from modelopt_cli.errors import DataError, InputError
from modelopt_cli.settings import option
from modelopt_cli.tasks.task import Misfit, Scalar
from modelopt_cli.tasks.task_output import finite, form_of, require

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
AUTO, FIRST, SECOND = "auto", "true", "false"
"""Values of the option ``batch_first``."""


class SequenceTargets(TargetFormat):
    """Rows of class ids: ``ids`` int64 ``(N, longest)``, and ``lengths`` int64 ``(N,)``.

    Args:
        names: of the network's classes, by which a text is read character by character; None where it has
        none.
        blank: class id that stands for nothing, and is in no target.
    """

    def __init__(self, names: Sequence[str] | None, blank: int) -> None:
        self._numbers = {name: number for number, name in enumerate(names or ())}
        self._blank = blank

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Tensor:
        """The ids of one sample; see :class:`TargetFormat`."""
        ids = self._spelled(raw) if isinstance(raw, str) else raw
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 1:
            raise DataError("target is not a row of class ids")
        wrong = (ids < 0) | (ids == self._blank) | (False if classes is None else ids >= classes)
        if bool(wrong.any()):
            first = int(ids[wrong][0])
            if first == self._blank:
                hint = (
                    f"leave it out, or say {option('task', 'sequence?blank=N')} if another class is the blank"
                )
                raise DataError(f"target holds class {first}, the blank", hint=hint)
            known = "below 0" if classes is None else f"outside 0..{classes - 1}"
            raise DataError(f"target holds class {first}, {known}", hint=indices_hint(first, classes=classes))
        return ids.long()

    def collate(self, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Ids, padded, and lengths."""
        lengths = torch.tensor([len(target) for target in targets])
        return {"ids": pad_sequence(list(targets), batch_first=True), "lengths": lengths}

    def _spelled(self, text: str) -> Tensor:
        if not self._numbers:
            hint = "give rows of class ids, from FILE.py:CALLABLE"
            raise DataError("target is a text, and the network has no names for its classes", hint=hint)
        unknown = next((character for character in text if character not in self._numbers), None)
        if unknown is not None:
            problem = f"target holds {unknown!r}, which is none of the network's classes"
            raise DataError(problem, hint=self._other_case(text))
        return torch.tensor([self._numbers[character] for character in text], dtype=torch.int64)

    def _other_case(self, text: str) -> str | None:
        """A next step where the network has all characters of a text in capitals, or in small letters."""
        for made, words in ((text.upper(), "capitals"), (text.lower(), "small letters")):
            if all(character in self._numbers for character in made):
                return f"it has {words}: write the texts so"
        return None


class Spoken(NamedTuple):
    """Class ids that a network has found.

    Attributes:
        ids: of each sample.
    """

    ids: list[Ids]


def targets(names: tuple[str, ...] | None = None, blank: int = 0, batch_first: str = AUTO) -> SequenceTargets:
    """The format of the targets."""
    return SequenceTargets(names, blank)


def judged(logits: Any, ids: Targets, inputs: Any, blank: int = 0, batch_first: str = AUTO) -> Spoken:
    """The best path: the likeliest class of each frame, without repetitions and blanks.

    A. Graves et al., Connectionist Temporal Classification, ICML 2006, section 3.2.

    Raises:
        InputError: the network returns no class for each frame, or NaN.
        Misfit: a target holds a class that it does not have.
    """
    assert isinstance(ids, dict)
    frames = by_frames(logits, len(ids["lengths"]), batch_first)
    check_ids(ids, frames.shape[2])
    best = frames.argmax(2)
    changes = torch.cat([torch.ones_like(best[:, :1], dtype=torch.bool), best[:, 1:] != best[:, :-1]], 1)
    kept = changes & (best != blank)
    return Spoken([row[keep].cpu().numpy() for row, keep in zip(best, kept, strict=True)])


def by_frames(logits: Any, samples: int, batch_first: str = AUTO) -> Tensor:
    """Logits or log-probabilities ``(N, T, classes)``, float32; those of ``(T, N, classes)`` are turned.

    Raises:
        InputError: as :func:`batch_axis`, or one is NaN.
    """
    axis = batch_axis(logits, samples, batch_first=batch_first)
    checked = finite(logits)
    return checked if axis == 0 else checked.transpose(0, 1)


def batch_axis(logits: Any, samples: int, blank: int = 0, batch_first: str = AUTO) -> int:
    """Dimension of the samples in logits of frames.

    Args:
        logits: that a network returned.
        samples: ``N``.
        blank: of no meaning here.
        batch_first: ``true`` or ``false``; ``auto`` tells it by the number of samples.

    Raises:
        InputError: they are of another form, or there are as many frames as samples, and nothing says which
            come first.
    """
    sides = {AUTO: (0, 1), FIRST: (0,), SECOND: (1,)}[batch_first]
    fits = isinstance(logits, Tensor) and logits.dim() == 3
    places = [side for side in sides if logits.shape[side] == samples] if fits else []
    require(bool(places), logits, samples, "a network for sequences", "frames, classes", "give one")
    if len(places) > 1:
        spec = option("task", f"sequence?batch_first={FIRST}")
        raise InputError(
            f"returned {form_of(logits)} for {samples} samples: they or the frames may come first",
            hint=f"say {spec}, or {SECOND}",
        )
    return places[0]


def inferred(output_for: Callable[[int], Any]) -> dict[str, Scalar]:
    """The option ``batch_first``, from outputs for two and three samples; nothing where they do not tell."""
    two, three = (output_for(samples) for samples in (2, 3))
    if not all(isinstance(output, Tensor) and output.dim() == 3 for output in (two, three)):
        return {}
    grown = [side for side in (0, 1) if (two.shape[side], three.shape[side]) == (2, 3)]
    return {"batch_first": (FIRST, SECOND)[grown[0]]} if len(grown) == 1 else {}


def check_ids(targets: dict[str, Tensor], classes: int) -> None:
    """Refuse class ids that the network does not have; raises Misfit."""
    outside = (targets["ids"] >= classes).any(1).nonzero() if targets["ids"].numel() else torch.empty(0)
    if outside.numel():
        place = int(outside[0])
        largest = int(targets["ids"][place].max())
        problem = f"target holds class {largest}, which is not among the network's {classes}"
        raise Misfit(place, problem, indices_hint(largest, classes=classes))


def require_frames(targets: dict[str, Tensor], frames: int) -> None:
    """Refuse targets that no path of so many frames spells: a symbol takes one, a blank parts equal ones.

    Raises:
        Misfit: names the first.
    """
    ids, lengths = targets["ids"].cpu(), targets["lengths"].cpu()
    within = torch.arange(1, max(ids.shape[1], 1)) < lengths[:, None]
    repeated = ((ids[:, 1:] == ids[:, :-1]) & within).sum(1)
    for place in (lengths + repeated > frames).nonzero().flatten().tolist()[:1]:
        needed = int(lengths[place] + repeated[place])
        problem = f"target of {int(lengths[place])} symbols needs {needed} frames, the network gives {frames}"
        raise Misfit(place, problem, hint="cut the samples into shorter texts, or leave this one out")


def errors(spoken: Spoken, targets: dict[str, Tensor]) -> Tensor:
    """Edit distance to the target and the target's length of each sample, ``(N, 2)``."""
    pairs = zip(spoken.ids, targets["ids"].cpu().numpy(), targets["lengths"].tolist(), strict=True)
    return torch.tensor(
        [[edit_distance(ids, wanted[:length]), length] for ids, wanted, length in pairs],
        dtype=torch.float64,
    )


def edit_distance(source: Ids, target: Ids) -> int:
    """Fewest insertions, deletions and substitutions that make ``target`` of ``source``.

    V. Levenshtein, Binary Codes Capable of Correcting Deletions, Insertions, and Reversals, 1966; a row of
    the table at a time.
    """
    steps = np.arange(len(target) + 1)
    row = steps.copy()
    for symbol in source:
        # Of a substitution and a deletion the cheaper, then insertions from the left.
        best = np.minimum(row[:-1] + (target != symbol), row[1:] + 1)
        row = np.minimum.accumulate(np.concatenate([[row[0] + 1], best]) - steps) + steps
    return int(row[-1])
