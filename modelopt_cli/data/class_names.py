"""The data's classes and the network's, compared by name."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from modelopt_cli.errors import DataError
from modelopt_cli.settings import did_you_mean
from modelopt_cli.text import short

_SHOWN = 5
_CLOSE = 0.8  # among ImageNet's 1000 names, 'crate' is 0.75 like 'cat'
_NEXT = "name the folders by the network's class names, or number them with csv:FILE; see docs/data.md"


@dataclass(frozen=True)
class NameMatch:
    """Places of the data's classes among those of the network.

    Attributes:
        positions: of the network, one for each of the data's classes.
        note: one line where that is not the data's own order, or is taken from it without a name; or None.
        by_name: every class was found by its name.
    """

    positions: tuple[int, ...]
    note: str | None = None
    by_name: bool = True


def match_names(names: Sequence[str], classes: Sequence[str], where: str) -> NameMatch:
    """Find the data's classes among the network's by name: case, spaces, dashes and underscores do not count.

    Names that are all among the network's give their positions. As many names as the network has keep their
    own order, unless one of them is the network's at another position: renamed folders, or numbers for words.

    Args:
        names: of the data's classes, in label order.
        classes: of the network's, in logit order.
        where: the data, for messages.

    Raises:
        DataError: a name is not among the network's, and its position does not say which it is either.
    """
    own = tuple(range(len(names)))
    keys, known = [class_key(name) for name in names], [class_key(name) for name in classes]
    if keys == known:
        return NameMatch(own)
    twice = {key for key, count in Counter(keys).items() if count > 1}
    places = {key: i for key, i in places_of(classes).items() if key not in twice}
    if all(key in places for key in keys):
        positions = tuple(places[key] for key in keys)
        return NameMatch(positions, _by_name(len(names), len(classes)) if positions != own else None)
    strangers = [i for i, key in enumerate(keys) if key not in places]
    if len(names) == len(classes) and all(places.get(key, i) == i for i, key in enumerate(keys)):
        first = strangers[0]
        return NameMatch(
            own,
            f"{where}: {len(strangers)} of {len(names)} class names are not the network's; they are taken by "
            f"their order: '{short(names[first])}' for '{short(classes[first])}'",
            by_name=False,
        )
    stranger = names[strangers[0]]
    near = did_you_mean(stranger, map(short, classes), _CLOSE)
    raise DataError(
        f"class '{short(stranger)}' is not among the network's {len(classes)} ({_listed(classes)})",
        where=where,
        hint="; ".join(filter(None, (near, _NEXT))),
    )


def _by_name(some: int, classes: int) -> str:
    part = f"all {classes}" if some == classes else f"{some} of {classes}"
    return f"{part} classes of the network are in the data, matched by name"


def places_of(classes: Sequence[str]) -> dict[str, int]:
    """The places of the network's classes by :func:`class_key`.

    ImageNet has two cranes and two maillots: a name that there is twice says nothing, and is left out.
    """
    keys = [class_key(name) for name in classes]
    counts = Counter(keys)
    return {key: place for place, key in enumerate(keys) if counts[key] == 1}


def class_key(name: str) -> str:
    """A key that two names of a class have in common where they mean the same."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _listed(classes: Sequence[str]) -> str:
    few = ", ".join(short(name) for name in classes[:_SHOWN])
    return few if len(classes) <= _SHOWN else f"{few}, ..."
